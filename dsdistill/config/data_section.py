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
        description="folder where relative paths in train and dev start; for a hub data set: folder of a local copy, "
        "which is read from ROOT/SUBSET/{train,dev}.{tsv,jsonl,...} instead of the hub",
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
        description="column of the text, or the two columns of a pair of texts; pairs are prompt and response "
        "(causal_lm), or query and document or two texts with a similarity in `label` (embedding); "
        "dsdistill/data/README.md says more",
    )
    messages: str | None = Field(
        default=None,
        description="causal_lm: column of conversations, lists of {role, content} (or ShareGPT's {from, value}), "
        "which the tokenizer's chat template renders; read instead of `text`",
    )
    prompts: Annotated[tuple[str, ...], Field(strict=False, min_length=1, max_length=2)] | None = Field(
        default=None,
        description="embedding: prefix of each text, one for each column of `text`; default: the query and document "
        "prompts (for single texts the default prompt) of the teacher's sentence-encoder folder, else of the "
        "student's",
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
        description="if a chat template changes earlier turns when later ones follow; split: each assistant turn "
        "becomes a separate example; refuse: the run is refused",
    )
    layout: Layout | None = Field(
        default=None,
        description="layout of prompt and response; template: a user turn and an assistant turn; raw: one directly "
        "after the other, unchanged; separator: [CLS] prompt [SEP] response [SEP] or, for tokenizers without these, "
        "prompt, line break, response, end of text; default: template if there is a chat template, else separator",
    )
    packing: Literal["auto", True, False] = Field(
        default="auto",
        description="causal_lm; true: blocks of max_length are filled with whole documents, which do not see each "
        "other; auto: the same if the models keep documents apart, else one document per row; false: plain text "
        "continues from document to document through the blocks, and each conversation or prompt is a row",
    )
    overlong: Literal["truncate", "split", "drop"] | None = Field(
        default=None,
        description="documents longer than max_length are truncated, split into several, or dropped; default: split "
        "for plain text, truncate for prompts and conversations; layout separator supports only truncate",
    )
    streaming: bool = Field(
        default=False,
        description="for a hub data set larger than the disk: read and tokenise it during the run, and keep one part "
        "at a time",
    )
    drop_unlabelled: bool = Field(
        default=False, description="leave out rows whose label is missing, empty or -, or -1 for classes"
    )
    label: str | DevLabels | None = Field(
        default="label",
        description="column of the label; not read by tasks that predict tokens; embedding: column of similarity "
        "scores in the dev sets, or one column for each dev set that has scores: {stsb: score}; default for "
        "embedding: none",
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
        description="number of train examples that are not trained on but scored as the dev set holdout, so that you "
        "choose settings on it and look at dev once; every seed holds out the same ones; a short text goes with the "
        "texts that contain it, and is left out if these are on both sides; give a teacher recipe the same number",
    )
    fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="share of the train examples used, drawn with run.seed; a larger share contains a smaller one",
    )
    label_noise: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="share of the train labels replaced, drawn with run.seed: by another class, or by another "
        "example's score",
    )
    tokenizer: str | None = Field(
        default=None, description="hub id or folder; default: the teacher's, else the student's"
    )
    train_tokenizer: Annotated[int, Field(ge=100)] | None = Field(
        default=None,
        description="vocabulary size of a tokenizer (WordPiece, or as tokenizer_kind says) trained on the train "
        "texts, for a model without one",
    )
    tokenizer_kind: Literal["wordpiece", "bytes"] = Field(
        default="wordpiece",
        description="kind of train_tokenizer; wordpiece: uncased words and their pieces; bytes: a lossless "
        "byte-level BPE, with <|im_start|> and <|im_end|> for conversations",
    )
    sampler: Literal["uniform", "entropy", "random_masked", "hard_negative", "domain_aware", "ddk"] = Field(
        default="uniform",
        description="how train examples are drawn, the same number in each epoch; uniform: each once; entropy: those "
        "with high teacher entropy more often; random_masked: uniform, with 15% of the input masked for both models; "
        "hard_negative: each example with its nearest neighbours, by the teacher's vectors, that have another "
        "answer; domain_aware: those like `domain` more often; ddk: more from those parts of `train` in whose dev "
        "sets, of the same names, the student is further behind its teacher, found again at each evaluation",
    )
    mixup: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="classification and regression: half of a step's examples are mixed with others, whose share is "
        "drawn from Beta(mixup, mixup): both models read mixed embeddings of tokens, and labels are mixed (MixKD)",
    )
    sampler_temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="T in p ∝ exp(score / T); default: 0.1 for entropy, 1 (nat per token) for domain_aware",
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
