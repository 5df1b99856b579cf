"""Define the settings of a run's data."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dsdistill.config.bounded import parse_size
from dsdistill.config.errors import UserError
from dsdistill.config.section import NAME, LearningRate, Positive, Section

Files = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
Texts = Annotated[tuple[str, ...], Field(strict=False, min_length=1, max_length=2)]
Layout = Literal["template", "raw", "separator"]
TrainOn = Literal["assistant", "last", "all"]


def _size(value: Any) -> Any:
    if isinstance(value, bool) or not (
        parse_size(value) if isinstance(value, str) else isinstance(value, int) and value > 0
    ):
        raise UserError("data.max_file", repr(value)[:60], "a size such as 200GiB or 500MB, or bytes")
    return value


class Part(Section):
    """One of several sources of the train set. Settings that are not given here are those of `data`."""

    name: str | None = Field(default=None, description="name in the log; default: its subset, source or file")
    source: str | None = Field(default=None, description="as data.source")
    subset: str | None = Field(default=None, description="as data.subset")
    root: str | None = Field(default=None, description="as data.root")
    train: str | Files | None = Field(default=None, description="files or hub split, as data.train")
    text: Texts | None = Field(default=None, description="as data.text")
    messages: str | None = Field(default=None, description="as data.messages; text is then not read")
    label: str | None = Field(default=None, description="as data.label")
    layout: Layout | None = Field(default=None, description="as data.layout")
    train_on: TrainOn | None = Field(default=None, description="as data.train_on")
    max_train: Positive | None = Field(
        default=None, description="number of examples used, from the front; default: all"
    )
    weight: LearningRate = Field(
        default=1.0,
        description="share of the drawn examples that come from this part, relative to the other parts",
    )


Parts = Annotated[tuple[Part, ...], Field(strict=False, min_length=1)]
DevSets = Annotated[dict[Annotated[str, Field(pattern=NAME)], str], Field(min_length=1)]


DevLabels = Annotated[dict[Annotated[str, Field(pattern=NAME)], str], Field(min_length=1)]


class Data(Section):
    """Labelled texts; texts or pairs without labels; or, for language models, plain texts, prompts or conversations."""

    source: str = Field(
        default="docstrings",
        description="docstrings (built in), files, or the name of a hub data set such as nyu-mll/glue",
    )
    subset: str | None = Field(default=None, description="subset of a hub data set, such as sst2")
    root: str | None = Field(
        default=None,
        description="folder where relative paths in train and dev start. For a hub data set: folder of a local copy; "
        "the files ROOT/SUBSET/{train,dev}.{tsv,jsonl,...} are read instead of the hub",
    )
    train: str | Files | Parts = Field(
        default="train",
        description="a file (tsv, csv, jsonl, parquet, txt; .gz too), a list of files, a hub split, or a list of "
        "{source, subset, train, weight, ...} from which examples are drawn by weight",
    )
    dev: str | DevSets = Field(
        default="dev",
        description="a file or hub split to evaluate on, or several by name: {matched: FILE, mismatched: FILE}",
    )
    text: Texts = Field(
        default=("text",),
        description="column of the text, or the two columns of a pair of texts. For causal_lm a pair is a prompt and "
        "its response. For embedding it is a query and its document, or two texts whose similarity is in `label`. "
        "dsdistill/data/README.md says more",
    )
    messages: str | None = Field(
        default=None,
        description="causal_lm: column of conversations, which is read instead of `text`. A conversation is a list of "
        "{role, content} (or ShareGPT's {from, value}); the tokenizer's chat template renders it",
    )
    prompts: Annotated[tuple[str, ...], Field(strict=False, min_length=1, max_length=2)] | None = Field(
        default=None,
        description="embedding: prefixes of the texts, one for each column of `text`. Default: those in the teacher's "
        "sentence-encoder folder, else those in the student's: the query and document prompts for pairs, the default "
        "prompt for single texts",
    )
    chat_template: str | None = Field(
        default=None, description="file with a chat template (Jinja) that replaces the tokenizer's own"
    )
    template_options: dict[str, Any] = Field(
        default_factory=dict,
        description="further inputs of the chat template, such as enable_thinking: false or tools",
    )
    train_on: TrainOn = Field(
        default="assistant",
        description="turns of a conversation that have labels; assistant: all assistant turns; last: the last "
        "assistant turn; all: every token",
    )
    turns: Literal["split", "refuse"] = Field(
        default="split",
        description="what happens if a chat template changes earlier turns when later ones follow; split: each "
        "assistant turn becomes a separate example; refuse: the run is refused",
    )
    layout: Layout | None = Field(
        default=None,
        description="layout of prompt and response. template: a user turn and an assistant turn. raw: one directly "
        "after the other, unchanged. separator: [CLS] prompt [SEP] response [SEP] or, for tokenizers without these, "
        "prompt, line break, response, end of text. Default: template if there is a chat template, else separator",
    )
    packing: Literal["auto", True, False] = Field(
        default="auto",
        description="causal_lm: how documents fill rows. true: each row is a block of max_length tokens, filled with "
        "whole documents, which do not see each other. auto: the same if the models keep documents apart, else one "
        "document per row. false: plain text is laid end to end and cut into blocks, and each conversation or prompt "
        "is a row",
    )
    overlong: Literal["truncate", "split", "drop"] | None = Field(
        default=None,
        description="what happens to documents longer than max_length: they are truncated, split into several, or "
        "dropped. Default: split for plain text, truncate for prompts and conversations. Layout separator supports "
        "only truncate",
    )
    streaming: bool = Field(
        default=False,
        description="for a hub data set larger than the disk: read and tokenise it during the run, and keep one part "
        "at a time",
    )
    drop_unlabelled: bool = Field(
        default=False, description="leave out rows whose label is missing, empty or -; for classes, also -1"
    )
    label: str | DevLabels | None = Field(
        default="label",
        description="column of the label. Tasks that predict tokens do not read it. For embedding: column of "
        "similarity scores in the dev sets, or one column for each dev set that has scores, such as {stsb: score}; "
        "default: none",
    )
    labels: Annotated[tuple[str, ...], Field(strict=False, min_length=2)] | None = Field(
        default=None,
        description="names of the classes in order; labels may then be numbers from 0; default: the data set's own "
        "names, else the names in the train set, sorted",
    )
    max_length: Annotated[int, Field(ge=2)] = Field(
        default=128, description="length of the longest sequence, in tokens"
    )
    max_train: Positive | None = Field(
        default=None, description="number of train examples used, from the front; default: all"
    )
    max_dev: Positive | None = Field(
        default=None, description="number of dev examples used, from the front; default: all"
    )
    holdout: Positive | None = Field(
        default=None,
        description="number of train examples that are not trained on. They are scored as a further dev set named "
        "holdout: choose settings on it, and look at dev only once. Every seed holds out the same examples. A short "
        "text is held out if all texts that contain it are held out; it is left out if only some of them are. Give a "
        "teacher recipe the same number",
    )
    fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="share of the train examples used, drawn with run.seed; a larger share contains a smaller one",
    )
    label_noise: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="share of the train labels that are replaced by another class, or by another example's score; "
        "drawn with run.seed",
    )
    tokenizer: str | None = Field(
        default=None, description="hub id or folder; default: the teacher's, else the student's"
    )
    train_tokenizer: Annotated[int, Field(ge=100)] | None = Field(
        default=None,
        description="vocabulary size of a tokenizer that is first trained on the train texts, for a model without "
        "one; tokenizer_kind says which kind",
    )
    tokenizer_kind: Literal["wordpiece", "bytes"] = Field(
        default="wordpiece",
        description="kind of tokenizer that train_tokenizer makes; wordpiece: uncased words and their pieces; bytes: "
        "a lossless byte-level BPE, with <|im_start|> and <|im_end|> for conversations",
    )
    sampler: Literal["uniform", "entropy", "random_masked", "hard_negative", "domain_aware", "ddk"] = Field(
        default="uniform",
        description="how train examples are drawn; every epoch draws the same number. uniform: each example once. "
        "entropy: examples with high teacher entropy more often. random_masked: as uniform, with 15% of the input "
        "masked for both models. hard_negative: an example together with its nearest neighbours, by the teacher's "
        "vectors, that have another answer. domain_aware: examples similar to `domain` more often. ddk: more examples "
        "from those parts of `train` where the student is further behind its teacher; each evaluation measures this "
        "again, on dev sets with the same names as the parts",
    )
    mixup: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="classification and regression: half of a step's examples are mixed with others (MixKD). Both "
        "models read mixed embeddings of tokens, and labels are mixed by the same share. The shares are drawn from "
        "Beta(mixup, mixup)",
    )
    sampler_temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="T in an example's probability p ∝ exp(score / T); default: 0.1 for entropy, 1 (nat per token) "
        "for domain_aware",
    )
    domain: Files | None = Field(
        default=None,
        description="files with text of the domain; comparison with `general` shows what is typical of it",
    )
    general: Files | None = Field(default=None, description="files with general text")
    chunker: Literal["builtin", "spacy", "jieba"] = Field(
        default="builtin",
        description="method that finds the words and phrases that some terms compare; builtin: runs of content words; "
        "spacy: English, parsed; jieba: Chinese; spacy and jieba must be installed",
    )
    cache: str = Field(
        default="runs/cache", description="folder for results that are costly to compute again"
    )
    max_file: Annotated[int | str, BeforeValidator(_size)] = Field(
        default="200GiB",
        description="largest data file, decompressed: a size such as 200GiB or 500MB, or bytes",
    )

    @property
    def most_bytes(self) -> int:
        """Return the size of the largest data file that is read, in bytes."""
        most = self.max_file if isinstance(self.max_file, int) else parse_size(self.max_file)
        assert most is not None  # _size has checked it
        return most

    @property
    def train_columns(self) -> int:
        """Return how many columns of text a row of the train set has; checks refuse parts that differ."""
        first = self.train[0]
        return len(first.text if isinstance(first, Part) and first.text is not None else self.text)
