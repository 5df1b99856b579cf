"""Define the forms of data between sources and loader: rows of text with labels, then examples of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from dsdistill.config.errors import UserError
from dsdistill.data.batch import NO_LABEL
from dsdistill.data.masking import Masking
from dsdistill.data.spans import limited
from dsdistill.data.store import Documents

T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """Hold n checked rows of one split, not yet tokenised."""

    place: str  # where they come from, for messages
    texts: list[tuple[str, ...]]  # one text, or the two of a pair
    labels: list[int] | list[float]  # class index | score
    ids: Sequence[str]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Dropped:
    """Count the documents that did not become examples as a whole."""

    truncated: int = 0  # documents that were cut
    dropped: int = 0  # documents, or parts of them, that were left out


@dataclass(frozen=True)
class Examples:
    """Hold n examples. Each is a non-empty run of tokens of a stored document; a document may have several."""

    documents: Documents
    starts: Tensor  # (n,) int64, where each example begins in the tokens of all documents
    lengths: Tensor  # (n,) int64
    # (n,) int64 class | (n,) float32 score, NaN for a text without one | None: tokens are labels
    labels: Tensor | None = None
    given_ids: Sequence[str] | None = None  # names; None: the name is the example's place in its source
    masking: Masking | None = None  # hides tokens from the models; None: none are hidden
    lost: Dropped = field(default_factory=Dropped)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def prompted(self) -> bool:
        """Return whether some tokens may be context without labels."""
        return self.documents.ranges is not None

    def name(self, row: int) -> str:
        """Return the name of an example in messages and files."""
        if self.given_ids is not None:
            return self.given_ids[row]
        owner = np.searchsorted(self.documents.starts, int(self.starts[row]), side="right") - 1
        return self.documents.name(int(owner))

    def tokens(self, row: int) -> np.ndarray:
        """Return (length,) ids of an example."""
        start = int(self.starts[row])
        return self.documents.tokens.read(start, start + int(self.lengths[row]))

    def types(self, row: int) -> np.ndarray | None:
        """Return (length,) token types of an example; None if the tokenizer has none."""
        if self.documents.types is None:
            return None
        start = int(self.starts[row])
        return self.documents.types.read(start, start + int(self.lengths[row]))

    def ranges(self, row: int) -> np.ndarray | None:
        """Return (k, 2) runs of an example's tokens that have labels; None: all tokens."""
        if self.documents.ranges is None:
            return None
        start, length = int(self.starts[row]), int(self.lengths[row])
        return self.documents.ranges.touching(start, start + length).clip(0, length)

    def spans(self, row: int) -> np.ndarray:
        """Return (s, 3) words and phrases completely inside an example, at most MOST of each; see Batch.spans."""
        assert self.documents.spans is not None  # called only if a term reads spans
        start = int(self.starts[row])
        return limited(self.documents.spans.inside(start, start + int(self.lengths[row])))

    def token_labels(self, row: int) -> np.ndarray:
        """Return (length,) int64: the tokens to predict, NO_LABEL elsewhere."""
        tokens, ranges = self.tokens(row).astype(np.int64), self.ranges(row)
        if ranges is None:
            return tokens
        labels = np.full(len(tokens), NO_LABEL)
        for first, past in ranges:
            labels[first:past] = tokens[first:past]
        return labels

    def context(self, row: int) -> int:
        """Return how many tokens come before the last run of tokens that have labels."""
        ranges = self.ranges(row)
        return 0 if ranges is None or not len(ranges) else int(ranges[-1, 0])

    def count_labelled(self) -> int:
        """Return how many tokens of all examples have labels; only for examples whose labels are tokens."""
        if self.documents.ranges is None:
            return int(self.lengths.sum())
        first, past = self.documents.ranges.bounds()
        before = np.concatenate([[0], np.cumsum(past - first)])  # labelled tokens before each run

        def until(places: np.ndarray) -> np.ndarray:
            run = np.searchsorted(first, places)
            # If a place lies in a run, the run's tokens after it are subtracted.
            over = np.where(run > 0, np.append(past, 0)[run - 1] - places, 0).clip(min=0)
            return before[run] - over

        starts = self.starts.numpy()
        return int((until(starts + self.lengths.numpy()) - until(starts)).sum())

    def unmasked(self) -> "Examples":
        """Return the examples with nothing hidden from the models."""
        return replace(self, masking=None)

    def take(self, rows: Sequence[int]) -> "Examples":
        """Return some of the examples, in the order given."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        return replace(
            self,
            starts=self.starts[index],
            lengths=self.lengths[index],
            labels=None if self.labels is None else self.labels[index],
            given_ids=None if self.given_ids is None else [self.given_ids[row] for row in rows],
        )


def whole(documents: Documents) -> Examples:
    """Return each document as one example."""
    starts = torch.from_numpy(documents.starts)
    return Examples(documents, starts[:-1], starts.diff(), lost=Dropped(documents.truncated))


def end_to_end(documents: Documents, length: int, limit: int | None, ended: bool) -> Examples:
    """Return blocks of `length` tokens of all documents laid end to end, at most `limit` of them.

    A last block of one token is left out, as it would predict nothing. If documents are `ended` by a token, the last
    one's end token is left out, too: it only separates documents.

    Raises:
        UserError: there are fewer than two tokens.
    """
    count = len(documents.tokens) - ended
    count = count if limit is None else min(count, limit * length)
    if count < 2:
        raise UserError(documents.places[0][0], f"a text of {count} tokens", "at least 2 tokens")
    starts = torch.arange(0, count - 1, length)
    lengths = torch.full_like(starts, length)
    lengths[-1] = min(length, count - int(starts[-1]))
    return Examples(documents, starts, lengths, given_ids=_Numbers(len(starts)))


def cut(documents: Documents, length: int, overlong: str) -> Examples:
    """Return each document as an example; documents of more than `length` tokens are handled as `overlong` says.

    Parts without a token to predict (of one token, or without labels) are left out.
    """
    starts, lengths = documents.starts[:-1], np.diff(documents.starts)
    long = lengths > length
    lost = int(long.sum())
    if overlong == "drop" and lost:
        starts, lengths = starts[~long], lengths[~long]
    elif overlong == "truncate":
        lengths = np.minimum(lengths, length)
    elif overlong == "split" and lost:
        starts, lengths = _split(starts, lengths, long, length)
    learning = _learning(documents, starts, lengths)
    gone = len(learning) - int(learning.sum())
    if gone:
        starts, lengths = starts[learning], lengths[learning]
    examples = Examples(documents, torch.from_numpy(starts), torch.from_numpy(lengths))
    gone += lost if overlong == "drop" else 0
    return replace(examples, lost=Dropped(lost if overlong == "truncate" else 0, gone))


def _split(
    starts: np.ndarray, lengths: np.ndarray, long: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return starts and lengths with each long document split into parts of `length` tokens and a rest.

    Parts are counted only for long documents. The many others are copied unchanged, in a fraction of the time that
    counting the parts of all documents would take.
    """
    places = np.flatnonzero(long)
    further = -(-lengths[places] // length) - 1  # parts after the first
    ends = np.repeat(starts[places] + lengths[places], further)
    within = np.arange(further.sum()) - np.repeat(further.cumsum() - further, further) + 1
    begins = np.repeat(starts[places], further) + within * length
    after = np.repeat(places + 1, further)
    first = np.minimum(lengths, length)
    return np.insert(starts, after, begins), np.insert(first, after, np.minimum(ends - begins, length))


def _learning(documents: Documents, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return (n,) bool: whether a part of a document has a token to predict after its first token."""
    if documents.ranges is None:
        return lengths > 1
    first, past = documents.ranges.bounds()
    if not len(first):
        return np.zeros(len(starts), bool)
    # A part has one if the first labelled run that ends after the part's first token begins inside the part.
    place = np.searchsorted(past, starts + 1, side="right")
    return (place < len(past)) & (first[place.clip(max=len(past) - 1)] < starts + lengths) & (lengths > 1)


class _Numbers(Sequence[str]):
    """Name examples by their numbers."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row):
        return str(range(self.count)[row])


@dataclass(frozen=True)
class Packed:
    """Hold packed examples: blocks of several documents, none of which sees another."""

    parts: Examples  # the documents, or parts of them
    order: np.ndarray  # (n,) the parts, block by block
    bounds: np.ndarray  # (blocks + 1,) int64: block b has the parts order[bounds[b]:bounds[b + 1]]
    sizes: np.ndarray | None = None  # (blocks,) int64: tokens of each block, if known
    labels: None = None
    masking: None = None

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def lengths(self) -> Tensor:
        """Return (blocks,) int64: the tokens of each block."""
        if self.sizes is not None:
            return torch.tensor(self.sizes)
        total = np.concatenate([[0], self.parts.lengths.numpy()[self.order].cumsum()])
        return torch.from_numpy(np.diff(total[self.bounds]))

    def of(self, block: int) -> list[int]:
        """Return the parts of a block."""
        return self.order[self.bounds[block] : self.bounds[block + 1]].tolist()

    def name(self, block: int) -> str:
        """Return the name of a block in messages: that of its first document."""
        return self.parts.name(self.of(block)[0])

    def unmasked(self) -> "Packed":
        """Return the blocks unchanged: nothing in them is hidden."""
        return self

    def take(self, blocks: Sequence[int]) -> "Packed":
        """Return some of the blocks, in the order given."""
        chosen = [self.order[self.bounds[b] : self.bounds[b + 1]] for b in blocks]
        order = np.concatenate(chosen) if chosen else self.order[:0]
        return replace(self, order=order, bounds=np.cumsum([0, *map(len, chosen)]), sizes=None)


@dataclass(frozen=True)
class TextPairs:
    """Hold examples of two texts that are read separately: example i has the texts 2i and 2i + 1."""

    texts: Examples

    def __len__(self) -> int:
        return len(self.texts) // 2

    @property
    def labels(self) -> Tensor | None:
        """Return (n,) float32, the scores of the examples, NaN for those without one."""
        return None if self.texts.labels is None else self.texts.labels[::2]

    @property
    def masking(self) -> Masking | None:
        """Return the masking of the texts."""
        return self.texts.masking

    @cached_property
    def lengths(self) -> Tensor:
        """Return (n,) int64: the tokens of each example's longer text."""
        return self.texts.lengths.view(-1, 2).amax(1)

    def name(self, row: int) -> str:
        """Return the name of an example in messages and files."""
        return self.texts.name(2 * row)

    def unmasked(self) -> "TextPairs":
        """Return the examples with nothing hidden from the models."""
        return replace(self, texts=self.texts.unmasked())

    def take(self, rows: Sequence[int]) -> "TextPairs":
        """Return some of the examples, in the order given."""
        first = 2 * torch.as_tensor(rows, dtype=torch.int64)
        return TextPairs(self.texts.take(torch.stack([first, first + 1], dim=1).flatten().tolist()))


def texts_of(examples: "Examples | Packed | TextPairs") -> Examples:
    """Return the single texts that examples of any form consist of."""
    if isinstance(examples, Packed):
        return examples.parts
    return examples.texts if isinstance(examples, TextPairs) else examples


@dataclass(frozen=True)
class Splits(Generic[T]):
    """Hold all sets of a run, as Rows or as Examples, and the names of the classes in the order of their indices."""

    train: T
    devs: dict[str, T]  # by name; a single set without a name in the config is called ""
    labels: tuple[str, ...]  # () unless the task is classification

    @property
    def dev(self) -> T:
        """Return the first dev set."""
        return next(iter(self.devs.values()))
