"""Find the words and phrases of the examples as runs of their tokens."""

from collections.abc import Iterator, Sequence

import numpy as np

from dsdistill.data.batch import PHRASE, WORD
from dsdistill.data.chunkers import Chunker, Span

MOST = 256  # most spans of a kind in one example

Chunks = tuple[list[Span], list[Span]]  # words and phrases of a text, by character


def found_chunks(texts: Sequence[str], find: Chunker) -> Iterator[Chunks]:
    """Yield the words and phrases of each text, by character; the chunker sees one line at a time."""
    for text in texts:
        words, phrases, at = [], [], 0
        for line in text.split("\n"):
            for into, spans in zip((words, phrases), find(line), strict=True):
                into += [(start + at, end + at) for start, end in spans]
            at += len(line) + 1
        yield words, phrases


def token_spans(offsets: np.ndarray, of: Chunks) -> np.ndarray:
    """Return (spans, 3): the run of tokens that share a character with each span, words first.

    offsets: (tokens, 2) first character and one past the last, in order; empty for tokens without characters.
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


def limited(table: np.ndarray) -> np.ndarray:
    """Return the first spans of each kind, at most MOST."""
    return np.concatenate([table[table[:, 2] == kind][:MOST] for kind in (WORD, PHRASE)])
