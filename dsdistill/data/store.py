"""Read tokenised documents from stores on disk. `dsdistill tokenize` writes a store; every rank maps it into memory.

CACHE/tokens-KEY/
  store.json            what it was made from, its totals and its hash; written last, when all else is complete
  00000/ 00001/ …       shards, each complete or absent
    ids.bin             uint16 if the vocabulary fits, else int32; the tokens of all documents, end to end
    begins.bin          (n,) int32, where in the shard each document begins; earlier tokens continue a document of the
                        shard before
    lines.bin           (n,) uint32, the line or row of each document in its source
    ranges.bin          (r, 2) int32 runs of tokens that have labels, in order; absent if all tokens have
    types.bin           uint8 token types; absent if there are none
    spans.bin           (s, 3) int32 words and phrases, sorted by their first tokens: first, one past the last, kind;
                        absent if there are none
    shard.json          totals, hashes, and the position that it reaches in its source
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsdistill.config.bounded import read_json
from dsdistill.config.errors import UserError

STORE, SHARD_NOTE = "store.json", "shard.json"
NOTE_BYTES = 2**26  # most bytes of a note
FORMAT = 1
# The type of each column's numbers and how many make one entry; the store itself tells the type of ids.
COLUMNS = {
    "ids": (None, 1),
    "begins": ("int32", 1),
    "lines": ("uint32", 1),
    "ranges": ("int32", 2),
    "types": ("uint8", 1),
    "spans": ("int32", 3),
}


class Mapped:
    """Read several arrays, usually mapped files, as one column laid end to end."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = list(parts)
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, end: int) -> np.ndarray:
        """Return entries start to end; a view if they are in one part."""
        first = bisect_right(self.starts, start) - 1
        if first < len(self.parts) and end <= self.starts[first + 1]:
            return self.parts[first][start - self.starts[first] : end - self.starts[first]]
        found = []
        while start < end:
            stop = min(end, int(self.starts[first + 1]))
            found.append(self.parts[first][start - self.starts[first] : stop - self.starts[first]])
            start, first = stop, first + 1
        return np.concatenate(found) if found else self.parts[0][:0]

    def whole(self) -> np.ndarray:
        """Return a copy of all entries; only for small columns."""
        return np.concatenate(self.parts) if self.parts else np.empty(0, np.int64)


class Runs:
    """Hold intervals of tokens, sorted by their first tokens, in parts that are laid end to end as the tokens are."""

    def __init__(self, parts: Sequence[np.ndarray], bases: Sequence[int]):
        """Take (k, 2 or 3) tables, counted from `bases`, the first token of each part."""
        self.parts, self.bases = list(parts), list(bases)

    def touching(self, start: int, end: int) -> np.ndarray:
        """Return the runs that share a token with [start, end), counted from start; runs do not overlap each other."""
        return self._found(start, end, 1)

    def inside(self, start: int, end: int) -> np.ndarray:
        """Return the runs that lie completely in [start, end), counted from start."""
        found = self._found(start, end, 0)
        return found[found[:, 1] <= end - start]

    def _found(self, start: int, end: int, column: int) -> np.ndarray:
        tables = []
        first = max(0, bisect_right(self.bases, start) - 1)
        for part, base in zip(self.parts[first:], self.bases[first:], strict=True):
            if base >= end:
                break
            low = np.searchsorted(part[:, column], start - base, side="right" if column else "left")
            high = np.searchsorted(part[:, 0], end - base)
            table = part[low:high].astype(np.int64)
            table[:, :2] += base - start
            tables.append(table)
        return np.concatenate(tables)

    def bounds(self) -> np.ndarray:
        """Return (2, k) int64, the first and one past the last token of all runs."""
        return np.concatenate(
            [
                part[:, :2].T.astype(np.int64) + base
                for part, base in zip(self.parts, self.bases, strict=True)
            ],
            axis=1,
        )


@dataclass(frozen=True)
class Documents:
    """Hold n tokenised texts of one or more stores."""

    tokens: Mapped  # of all documents, end to end
    starts: np.ndarray  # (n + 1,) int64
    ranges: Runs | None  # of tokens that have labels; None: all tokens
    types: Mapped | None  # like tokens
    spans: Runs | None  # words and phrases
    lines: Mapped  # the line or row of each in its source
    places: tuple[tuple[str, int], ...]  # the sources and how many documents each has, in order
    digest: str  # of all contents
    paths: tuple[str, ...] = ()  # of the stores
    truncated: int = 0  # documents that were truncated by tokenising

    def __len__(self) -> int:
        return len(self.starts) - 1

    def name(self, document: int) -> str:
        """Return a document's source and line, for messages."""
        ends = np.cumsum([count for _, count in self.places])
        place, _ = self.places[int(np.searchsorted(ends, document, side="right"))]
        return f"{place}:{int(self.lines.read(document, document + 1)[0])}"


def open_store(path: Path) -> Documents:
    """Map a complete store.

    Raises:
        UserError: it is damaged; the message names it and says what to do.
    """
    try:
        note = read_json(path / STORE, NOTE_BYTES)
        shards = [path / name for name in note["shards"]]
        written = {*read_json(shards[0] / SHARD_NOTE, NOTE_BYTES)["hashes"], "begins", "lines"}
        columns = {
            name: [_map(shard / f"{name}.bin", kind or note["dtype"], width) for shard in shards]
            for name, (kind, width) in COLUMNS.items()
            if name in written
        }
        lengths, documents = ([*map(len, columns[name])] for name in ("ids", "begins"))
        if sum(lengths) != note["tokens"] or sum(documents) != note["documents"]:
            raise ValueError(f"{sum(lengths)} tokens of {sum(documents)} documents")
        before = np.cumsum([0, *lengths])
        begins = [part.astype(np.int64) + at for part, at in zip(columns["begins"], before, strict=False)]
        starts = np.concatenate([*begins, before[-1:]])
        if starts[0] or (np.diff(starts) < 0).any() or [*map(len, columns["lines"])] != documents:
            raise ValueError("documents out of order")
    except (OSError, KeyError, IndexError, TypeError, ValueError, UserError) as error:
        raise UserError(
            str(path), f"a damaged store ({error})", "an intact one: remove it, and it is made again"
        ) from None
    return Documents(
        Mapped(columns["ids"]),
        starts,
        Runs(columns["ranges"], before[:-1].tolist()) if "ranges" in columns else None,
        Mapped(columns["types"]) if "types" in columns else None,
        Runs(columns["spans"], before[:-1].tolist()) if "spans" in columns else None,
        Mapped(columns["lines"]),
        ((note["place"], len(starts) - 1),),
        note["hash"],
        (str(path),),
        note["truncated"],
    )


def _map(path: Path, kind: str, width: int) -> np.ndarray:
    size = path.stat().st_size
    if not size:  # nothing can be mapped then
        return np.empty((0, width)[: 1 if width == 1 else 2], kind)
    found = np.memmap(path, dtype=kind, mode="r")
    return found if width == 1 else found.reshape(-1, width)


def joined(parts: Sequence[Documents]) -> Documents:
    """Return the documents of several stores as one."""
    if len(parts) == 1:
        return parts[0]
    before = np.cumsum([0, *(len(part.tokens) for part in parts)])
    starts = [part.starts[:-1] + at for part, at in zip(parts, before, strict=False)]
    digest = hashlib.sha256("".join(part.digest for part in parts).encode())
    return Documents(
        Mapped([array for part in parts for array in part.tokens.parts]),
        np.concatenate([*starts, before[-1:]]),
        _joined_runs([part.ranges for part in parts], before),
        None if parts[0].types is None else Mapped([array for part in parts for array in part.types.parts]),
        _joined_runs([part.spans for part in parts], before),
        Mapped([array for part in parts for array in part.lines.parts]),
        tuple(place for part in parts for place in part.places),
        digest.hexdigest(),
        tuple(path for part in parts for path in part.paths),
        sum(part.truncated for part in parts),
    )


def _joined_runs(parts: Sequence[Runs | None], before: np.ndarray) -> Runs | None:
    held = [(runs, int(at)) for runs, at in zip(parts, before, strict=False) if runs is not None]
    if len(held) < len(parts):
        return None
    return Runs(
        [table for runs, _ in held for table in runs.parts],
        [base + at for runs, at in held for base in runs.bases],
    )


def key(settings: dict[str, Any]) -> str:
    """Return a short name for the settings and sources of a store."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def is_complete(path: Path) -> bool:
    """Return whether a store exists and is complete."""
    return os.path.isfile(path / STORE)
