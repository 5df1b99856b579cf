"""Words and phrases of the examples as runs of their tokens."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsdistill.data.batch import PHRASE, WORD
from dsdistill.data.cache import rows as cache_rows
from dsdistill.data.chunkers import Chunker, Span, chunker

MOST = 256  # spans of a kind in one example

Chunks = tuple[list[Span], list[Span]]  # words and phrases of a text, by character


@dataclass(frozen=True)
class Spans:
    """Of n examples, laid end to end: those of example i are rows starts[i] to starts[i + 1]."""

    table: Tensor  # (spans of all examples, 3) int32: first token, one past the last, kind (WORD or PHRASE)
    starts: Tensor  # (n + 1,) int64

    def of(self, row: int) -> Tensor:
        return self.table[self.starts[row] : self.starts[row + 1]]

    def take(self, rows: list[int]) -> "Spans":
        starts = torch.cat([self.starts.new_zeros(1), self.starts.diff()[rows].cumsum(0)])
        return Spans(torch.cat([self.of(row) for row in rows]), starts)

    def batch(self, rows: list[int]) -> Tensor:
        """(S, 4) int64 as Batch.spans, of these examples as the rows of a batch."""
        tables = [torch.nn.functional.pad(self.of(row), (1, 0), value=i) for i, row in enumerate(rows)]
        return torch.cat([self.table.new_zeros(0, 4), *tables]).long()


def chunks(texts: Sequence[str], ids: Sequence[str], name: str, cache: str) -> list[Chunks]:
    """Words and phrases of each text by the named chunker, which sees a line at a time.

    Kept in the cache folder under the examples' ids: a parser takes longer than all else before training.

    Raises UserError naming what the chunker lacks.
    """
    find = chunker(name)

    def make() -> Iterator[dict]:
        for i, (words, phrases) in zip(ids, _found(texts, find), strict=True):
            yield {"id": i, "words": words, "phrases": phrases}

    rows = cache_rows(Path(cache, f"spans-{_key(name, texts, ids)}.jsonl").expanduser(), make)
    kept = {row["id"]: (row["words"], row["phrases"]) for row in rows}
    return [kept[i] for i in ids]


def _found(texts: Sequence[str], find: Chunker) -> Iterator[Chunks]:
    """Yield the words and phrases of each text, by character."""
    for text in texts:
        words, phrases, at = [], [], 0
        for line in text.split("\n"):
            for into, spans in zip((words, phrases), find(line), strict=True):
                into += [(start + at, end + at) for start, end in spans]
            at += len(line) + 1
        yield words, phrases


def token_spans(offsets: np.ndarray, of: Chunks) -> np.ndarray:
    """(spans, 3): runs of the tokens that share a character with each span, words first.

    offsets: (tokens, 2) first character and one past the last, in order; tokens that stand for no character are empty.
    """
    places = np.flatnonzero(offsets[:, 1] > offsets[:, 0])
    starts, ends = offsets[places].T
    tables = [np.empty((0, 3), dtype=np.int64)]
    for kind, spans in ((WORD, of[0]), (PHRASE, of[1])):
        if spans and len(places):
            first_character, last_character = np.array(spans).T
            first = np.searchsorted(ends, first_character, side="right")
            past = np.searchsorted(starts, last_character, side="left")
            seen = past > first  # the text may have been truncated
            first, last = places[first[seen]], places[past[seen] - 1]
            tables.append(np.stack([first, last + 1, np.full_like(first, kind)], axis=1))
    return np.concatenate(tables)


def pack(tables: list[np.ndarray]) -> Spans:
    """One for each example; at most MOST of a kind are kept, the first."""
    tables = [
        np.concatenate([table[table[:, 2] == kind][:MOST] for kind in (WORD, PHRASE)]) for table in tables
    ]
    starts = np.cumsum([0, *map(len, tables)])
    return Spans(torch.from_numpy(np.concatenate(tables).astype(np.int32)), torch.from_numpy(starts))


def in_blocks(table: np.ndarray, starts: Sequence[int]) -> list[np.ndarray]:
    """Spans of one long run of tokens, of each of the blocks that it is cut into; a span that is cut is dropped."""
    starts = np.asarray(starts)
    block = np.searchsorted(starts, table[:, 0], side="right") - 1
    inside = block < len(starts) - 1
    table, block = table[inside], block[inside]
    whole = table[:, 1] <= starts[block + 1]
    table, block = table[whole], block[whole]
    table = table - np.stack([starts[block], starts[block], np.zeros_like(block)], axis=1)
    order = np.lexsort((table[:, 0], block))
    edges = np.searchsorted(block[order], np.arange(len(starts)))
    return np.split(table[order], edges[1:-1])


def _key(name: str, texts: Sequence[str], ids: Sequence[str]) -> str:
    """Changes with the chunker's code too."""
    digest = hashlib.sha256(Path(__file__).with_name("chunkers.py").read_bytes())
    for part in (name, *ids, *texts):
        digest.update(f"{len(part)} {part}".encode(errors="backslashreplace"))
    return digest.hexdigest()[:16]
