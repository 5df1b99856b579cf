"""Show examples as the models read them, and count the sets' examples and tokens, for `dsdistill preview`."""

from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from dsdistill.config import Config, UserError
from dsdistill.config.schema import EMBEDDING
from dsdistill.data import NO_LABEL, Batch, Examples, Mixture, Packed, Set, collate, texts_of
from dsdistill.engine.resolve import read_sets, resolve

SHOWN_BAD = 20  # most unusable rows that are listed

# The kinds of tokens, and how a terminal shows them: by colours, or by marks if it has none.
CONTEXT, LABELLED, PADDING, BORDER = "context", "labelled", "padding", "border"
COLOURS = {CONTEXT: "\x1b[2m", LABELLED: "\x1b[32m", PADDING: "\x1b[90m", BORDER: "\x1b[33m"}
MARKS = {CONTEXT: ("", ""), LABELLED: ("[", "]"), PADDING: ("<", ">"), BORDER: ("", "")}
PLAIN = "\x1b[0m"


@dataclass
class Bad:
    """Bad collects the rows that cannot be used."""

    rows: dict[str, None] = field(default_factory=dict)  # by the messages of their errors, in order

    def __call__(self, error: UserError) -> None:
        """Note a row; a row of several sets is noted once."""
        self.rows[str(error)] = None


@dataclass
class Preview:
    """A Preview holds the first examples of the train set and the numbers of all sets."""

    examples: list[dict[str, Any]]
    sets: dict[str, dict[str, Any]]
    bad: Bad
    tokenizer: Any


def preview(config: Config, count: int) -> Preview:
    """Return the first `count` examples of the train set, in the set's order, and the numbers of every set.

    A row that cannot be used is counted and left out; a run would refuse it.
    """
    bad = Bad()
    found = resolve(config, lambda _: None)  # tokenising reports the same rows
    data = read_sets(found.config, found.tokenizer, found.student, found.teacher, bad)
    pad = found.tokenizer.pad_token_id or 0
    rows = range(min(count, len(data.train)))
    batches = [collate(data.train, [row], pad, 0) for row in rows]
    sets = {"train": numbers(data.train, config.data.max_length)}
    for name, dev in data.devs.items():
        sets[f"dev {name}".strip()] = numbers(dev, config.data.max_length)
    classes = data.labels if config.task == "classification" else None
    shown = [
        _example(batch, text, found.tokenizer, config.task, classes)
        for batch in batches
        for text in range(1 if batch.pair is None else 2)
    ]
    return Preview(shown, sets, bad, found.tokenizer)


def numbers(examples: Set, length: int) -> dict[str, Any]:
    """Return the numbers that describe a set.

    These are the numbers of examples, of documents (if they are packed), of tokens, and of truncated and dropped
    documents; labelled, the share of tokens that have labels (None if labels belong to whole examples); and filler, the
    share of packed rows that is empty.
    """
    if isinstance(examples, Mixture):
        parts = {
            name: numbers(part, length) for name, part in zip(examples.names, examples.parts, strict=True)
        }
        tokens = sum(part["tokens"] for part in parts.values())
        whole = {
            key: sum(part[key] for part in parts.values()) for key in ("examples", "truncated", "dropped")
        }
        return whole | {"tokens": tokens, "sources": parts}
    own = examples.parts.take(examples.order) if isinstance(examples, Packed) else texts_of(examples)
    tokens = int(own.lengths.sum())
    found: dict[str, Any] = {"examples": len(examples)}
    if isinstance(examples, Packed):
        found |= {"documents": len(own), "filler": round(1 - tokens / (len(examples) * length), 4)}
    found |= {"tokens": tokens, "labelled": _labelled(own, tokens)}
    return found | {"truncated": own.lost.truncated, "dropped": own.lost.dropped}


def _labelled(examples: Examples, tokens: int) -> float | None:
    if examples.labels is not None:
        return None
    if examples.masking is not None and examples.masking.predicted:
        return examples.masking.predicted
    return round(examples.count_labelled() / tokens, 4)


def _example(
    batch: Batch, text: int, tokenizer: Any, task: str, classes: tuple[str, ...] | None
) -> dict[str, Any]:
    """Return an example, or one text of a pair, as JSON: what the models read, and its text."""
    ids, mask = batch.input_ids[text].tolist(), batch.mask[text].tolist()
    assert batch.labels is not None
    labels = None if task == EMBEDDING else batch.labels[0].tolist()
    if task == "causal_lm" and batch.position_ids is not None:
        # Nothing comes before the first token of a document, so it is not predicted.
        labels = [NO_LABEL if at == 0 else label for at, label in zip(_positions(batch), labels, strict=True)]
    shown = {
        "id": batch.ids[0],
        "input_ids": ids,
        "labels": labels,
        "mask": [int(valid) for valid in mask],
        "position_ids": _positions(batch),
        "segments": batch.segments[0].tolist() if batch.segments is not None else [0] * len(ids),
        "text": tokenizer.decode([token for token, valid in zip(ids, mask, strict=True) if valid]),
    }
    if classes:
        shown["label"] = classes[labels]
    return shown


def _positions(batch: Batch) -> list[int]:
    if batch.position_ids is not None:
        return batch.position_ids[0].tolist()
    return list(range(batch.input_ids.shape[1]))


def render(found: Preview, *, colours: bool, ids: bool) -> str:
    """Return a preview as text for a terminal.

    colours: show kinds of tokens by colours, else by marks. ids: write the tokens' ids after each example.
    """
    lines = []
    for number, example in enumerate(found.examples, 1):
        lines += [f"example {number} ({example['id']}), {sum(example['mask'])} tokens", ""]
        lines += [_painted(example, found.tokenizer, colours), ""]
        if "label" in example:
            lines += [f"label: {example['label']}", ""]
        if ids:
            lines += [" ".join(map(str, example["input_ids"])), ""]
    lines.append(_legend(colours))
    for name, of in found.sets.items():
        lines += _counts(name, of)
    if found.bad.rows:
        lines.append(f"{len(found.bad.rows)} rows cannot be used:")
        lines += [f"  {row}" for row in islice(found.bad.rows, SHOWN_BAD)]
        if len(found.bad.rows) > SHOWN_BAD:
            lines.append("  …")
    return "\n".join(lines) + "\n"


def _painted(example: dict[str, Any], tokenizer: Any, colours: bool) -> str:
    """Return the text of an example; each run of tokens of one kind has its colour or its marks."""
    labels = example["labels"]
    by_token = isinstance(labels, list)
    runs: list[tuple[str, list[int]]] = []
    before = 0
    for place, token in enumerate(example["input_ids"]):
        if example["segments"][place] != before and example["mask"][place]:
            before = example["segments"][place]
            runs.append((BORDER, []))
        kind = PADDING if not example["mask"][place] else CONTEXT
        if kind is CONTEXT and by_token and labels[place] != NO_LABEL:
            kind = LABELLED
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(token)
    texts = []
    for kind, tokens in runs:
        text = "\n――――――――\n" if kind == BORDER else tokenizer.decode(tokens)
        if kind == PADDING:
            text = f"{len(tokens)} padding"
        first, last = (COLOURS[kind], PLAIN) if colours else MARKS[kind]
        texts.append(f"{first}{text}{last}")
    return "".join(texts)


def _legend(colours: bool) -> str:
    kinds = (CONTEXT, LABELLED, PADDING)
    if colours:
        return (
            "  ".join(f"{COLOURS[kind]}{kind}{PLAIN}" for kind in kinds)
            + f"  {COLOURS[BORDER]}――― border{PLAIN}\n"
        )
    return "[labelled] <padding> ――― border between documents\n"


def _counts(name: str, of: dict[str, Any]) -> list[str]:
    parts = [f"{of['examples']:,} examples"]
    if "documents" in of:
        parts.append(f"{of['documents']:,} documents, {of['filler']:.2%} filler")
    parts.append(f"{of['tokens']:,} tokens")
    if of.get("labelled") is not None:
        parts.append(f"{of['labelled']:.1%} labelled")
    parts += [f"{of[key]:,} {key}" for key in ("truncated", "dropped")]
    lines = [f"{name}: {', '.join(parts)}"]
    for source, inner in of.get("sources", {}).items():
        lines += [f"  {line}" for line in _counts(source, inner)]
    return lines
