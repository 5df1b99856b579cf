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
    """One of several sources of a set; what it does not say is as in `data`."""

    name: str | None = Field(default=None, description="for the log; default: its subset, source or file")
    source: str | None = Field(default=None, description="as data.source")
    subset: str | None = Field(default=None, description="as data.subset")
    root: str | None = Field(default=None, description="as data.root")
    train: str | Files | None = Field(default=None, description="files or hub split, as data.train")
    text: Texts | None = Field(default=None, description="as data.text")
    messages: str | None = Field(default=None, description="as data.messages; text beside it is not read")
    label: str | None = Field(default=None, description="as data.label")
    layout: Layout | None = Field(default=None, description="as data.layout")
    train_on: TrainOn | None = Field(default=None, description="as data.train_on")
    max_train: Positive | None = Field(default=None, description="examples used, from the front; default all")
    weight: LearningRate = Field(
        default=1.0, description="share of the examples drawn from it, relative to the other parts"
    )


Parts = Annotated[tuple[Part, ...], Field(strict=False, min_length=1)]
DevSets = Annotated[dict[Annotated[str, Field(pattern=NAME)], str], Field(min_length=1)]


DevLabels = Annotated[dict[Annotated[str, Field(pattern=NAME)], str], Field(min_length=1)]


class Data(Section):
    """Labelled texts, texts or pairs without labels, or for language models plain texts, prompts or conversations."""

    source: str = Field(
        default="docstrings",
        description="docstrings (built in), files, or the name of a hub data set such as nyu-mll/glue",
    )
    subset: str | None = Field(default=None, description="subset of a hub data set, such as sst2")
    root: str | None = Field(
        default=None,
        description="folder that relative train and dev paths start from; of a hub data set: read it from "
        "ROOT/SUBSET/{train,dev}.{tsv,jsonl,...} instead of the hub",
    )
    train: str | Files | Parts = Field(
        default="train",
        description="file (tsv, csv, jsonl, parquet, txt; .gz too), a list of files, hub split, or a list of "
        "{source, subset, train, weight, ...} to draw examples from by their weights",
    )
    dev: str | DevSets = Field(
        default="dev",
        description="file or hub split to evaluate on, or several by name: {matched: FILE, mismatched: FILE}",
    )
    text: Texts = Field(
        default=("text",),
        description="columns of the text, or of the two texts of a pair; a file without them may have text_a "
        "and text_b; of embedding two are a query and its document, or two texts whose similarity `label` tells, each "
        "read by itself; parts of the train set may have single texts where the dev sets have pairs; of causal_lm two "
        "are a prompt, which has no loss, and its response, a row an example, as "
        "`layout` says; where tokens are predicted, blank rows of single texts are left out",
    )
    messages: str | None = Field(
        default=None,
        description="causal_lm: column of conversations, lists of {role, content} (or ShareGPT's {from, value}), "
        "which the tokenizer's chat template renders; read in place of `text`",
    )
    prompts: Annotated[tuple[str, ...], Field(strict=False, min_length=1, max_length=2)] | None = Field(
        default=None,
        description="embedding: what is put before each text, one for each column of `text`; default: what the folder "
        "of the teacher (without one, the student's) says under query and document, of single texts by its default",
    )
    chat_template: str | None = Field(
        default=None, description="file of a chat template (Jinja) in place of the tokenizer's own"
    )
    template_options: dict[str, Any] = Field(
        default_factory=dict,
        description="what the chat template is told beside the messages, such as enable_thinking: false or tools",
    )
    train_on: TrainOn = Field(
        default="assistant",
        description="turns of a conversation that have labels: assistant, all of the assistant's; last, the "
        "assistant's last; all, every token",
    )
    turns: Literal["split", "refuse"] = Field(
        default="split",
        description="where a chat template changes earlier turns once later ones follow: split, each assistant turn "
        "becomes an example of its own; refuse",
    )
    layout: Layout | None = Field(
        default=None,
        description="of prompt and response: template, as a user's turn and the assistant's; raw, one after the "
        "other as they stand; separator, [CLS] prompt [SEP] response [SEP] or, for tokenizers without these, prompt, "
        "line break, response, end of text; default: template where the tokenizer has one, else separator",
    )
    packing: Literal["auto", True, False] = Field(
        default="auto",
        description="causal_lm: true, blocks of max_length are filled with whole documents, none of which sees "
        "another; auto, so where the models keep documents apart, else one a row; false, plain text runs on from "
        "document to document through the blocks, and a conversation or prompt is a row",
    )
    overlong: Literal["truncate", "split", "drop"] | None = Field(
        default=None,
        description="documents longer than max_length: truncate, split into several, or drop; default: plain text "
        "is split, prompts and conversations are truncated; layout separator truncates alone",
    )
    streaming: bool = Field(
        default=False,
        description="hub set larger than the disk: read and tokenised while the run goes on, a part kept at a time",
    )
    drop_unlabelled: bool = Field(
        default=False, description="leave out rows whose label is missing, empty or -, or of classes -1"
    )
    label: str | DevLabels | None = Field(
        default="label",
        description="column of the label; texts that predict tokens have none; embedding: column of the dev sets with "
        "the similarity of two texts as people judge it, a number of any scale, or that of some dev sets by name, "
        "{stsb: score}, beside others without labels; by default there is none",
    )
    labels: Annotated[tuple[str, ...], Field(strict=False, min_length=2)] | None = Field(
        default=None,
        description="names of the classes in order; labels may then be numbers from 0; default: as the data set "
        "declares them, else the names in the train set, sorted",
    )
    max_length: Annotated[int, Field(ge=2)] = Field(default=128, description="longest sequence, tokens")
    max_train: Positive | None = Field(
        default=None, description="train examples used, from the front; default all"
    )
    max_dev: Positive | None = Field(
        default=None, description="dev examples used, from the front; default all"
    )
    fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="share of the train examples used, drawn by run.seed; a smaller one lies in a larger",
    )
    label_noise: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="share of the train labels replaced, by run.seed: by another class, or by another's score",
    )
    tokenizer: str | None = Field(
        default=None, description="hub id or folder; default: the teacher's, else the student's"
    )
    train_tokenizer: Annotated[int, Field(ge=100)] | None = Field(
        default=None,
        description="entries of a WordPiece tokenizer trained on the train texts, for a model that has none",
    )
    tokenizer_kind: Literal["wordpiece", "bytes"] = Field(
        default="wordpiece",
        description="of train_tokenizer: wordpiece, uncased words and their pieces; bytes, a byte-level BPE that "
        "loses nothing, with <|im_start|> and <|im_end|> for conversations",
    )
    sampler: Literal["uniform", "entropy", "random_masked", "hard_negative", "domain_aware"] = Field(
        default="uniform",
        description="of the train examples, equally many each time: uniform, each once an epoch; entropy, those the "
        "teacher is unsure of; random_masked, uniform with 15% of the input masked for both models; hard_negative, "
        "each with its nearest in teacher space that have other answers; domain_aware, those like `domain`",
    )
    sampler_temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="T of p ∝ exp(score / T); default 0.1 for entropy, 1 (nat a token) for domain_aware",
    )
    domain: Files | None = Field(
        default=None,
        description="files of text of the domain, which beside `general` tell what is typical of it",
    )
    general: Files | None = Field(default=None, description="files of general text")
    chunker: Literal["builtin", "spacy", "jieba"] = Field(
        default="builtin",
        description="what finds words and phrases for terms over spans: builtin (runs of content words), spacy "
        "(English, parsed) or jieba (Chinese); the last two as installed",
    )
    cache: str = Field(default="runs/cache", description="folder for what is costly to make again")
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
