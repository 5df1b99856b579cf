"""Fill rows with whole documents: choose which ones share a row, and make batches of such rows.

A row holds its documents one after the other; positions restart in each, and the filler at the end is a segment of its
own. Models that keep documents apart by their positions then compute the same as for a document in a separate row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dsdistill.data.batch import NO_LABEL, Batch


@dataclass(frozen=True)
class Document:
    """Hold a document of n ≥ 1 tokens, as a model is to read it.

    labels: (n,) integers, NO_LABEL where nothing is to be predicted; None: the tokens themselves. spans: (k, 3) first
    token, one past the last, kind, counted in the document; None if no term reads them. index: its place in the
    data set.
    """

    tokens: np.ndarray  # (n,) integers
    labels: np.ndarray | None = None
    spans: np.ndarray | None = None
    id: str = ""
    index: int = -1


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which documents share a block, by best fit decreasing; the same lengths give the same blocks.

    Documents come longest first, and each goes into the block that it leaves with the least free room (Johnson 1974).
    Blocks are listed by their free room, so that n documents take O(n log n + d · capacity / 64), where d is the number
    of different lengths and rooms.

    Args:
        lengths: (n,) integers from 1 to capacity, in tokens.
        capacity: of a block, in tokens.

    Returns:
        order (n,) int64, the documents block by block, and starts (blocks + 1,) int64: block b has the documents
        order[starts[b]:starts[b + 1]]. Inside a block documents keep the order of the set, and blocks come in the
        order of their first documents.

    Raises:
        ValueError: a length is below 1 or above the capacity.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(
            f"lengths: got {lengths.min()} to {lengths.max()}, expected 1 to {capacity} tokens, the capacity"
        )
    falling = np.argsort(-lengths, kind="stable")
    blocks = np.empty_like(lengths)
    blocks[falling] = _assigned(lengths[falling], capacity)
    # Blocks are numbered as they were opened; now they are renumbered by their first documents.
    first = np.full(int(blocks.max(initial=-1)) + 1, len(lengths))
    np.minimum.at(first, blocks, np.arange(len(lengths)))
    rank = np.empty_like(first)
    rank[np.argsort(first)] = np.arange(len(first))
    blocks = rank[blocks]
    counts = np.bincount(blocks, minlength=len(first))
    return np.argsort(blocks, kind="stable"), np.concatenate([[0], counts.cumsum()])


def _assigned(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return (n,) the block of each document; lengths must be descending.

    Documents of one length are assigned together: the best-fitting block stays the best until its room is below the
    length, because its remaining room is smaller than any other room that is large enough.
    """
    blocks = np.empty_like(lengths)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # blocks by their free room
    rooms, opened = 0, 0  # bit r of `rooms` is set where some block has room r
    bounds = np.flatnonzero(np.diff(lengths)) + 1
    for start, stop in zip([0, *bounds.tolist()], [*bounds.tolist(), len(lengths)], strict=True):
        if start == stop:  # there are no documents
            break
        length = int(lengths[start])
        while start < stop:
            fitting = rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            each = room // length  # documents that a block of this room takes
            wanted = -(-(stop - start) // each)
            if fitting:
                taken = with_room[room][-wanted:]
                del with_room[room][-wanted:]
                if not with_room[room]:
                    rooms ^= 1 << room
            else:
                taken = list(range(opened, opened + wanted))
                opened += wanted
            count = min(stop - start, each * len(taken))
            blocks[start : start + count] = np.repeat(taken, each)[:count]
            start += count
            last = room - (count - each * (len(taken) - 1)) * length  # room of the last, which may get fewer
            for left, some in ((room - each * length, taken[:-1]), (last, taken[-1:])):
                if some and left:
                    with_room[left] += some
                    rooms |= 1 << left
    return blocks


def packed_batch(blocks: Sequence[Sequence[Document]], pad_id: int, *, spans: bool = False) -> Batch:
    """Return the batch whose rows are these blocks, as wide as the longest of them, at least two tokens.

    Args:
        blocks: the documents of each row, in order; no blocks: one filler row.
        pad_id: token that fills rows up at their end.
        spans: whether the batch has spans, taken from the documents that have some.

    Returns:
        A Batch on the CPU without `chance`. Its ids, index and places have one entry for each document, row by row.
    """
    blocks = blocks or [()]
    width = max(2, *(sum(len(document.tokens) for document in block) for block in blocks))
    shape = (len(blocks), width)
    ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, NO_LABEL, np.int64)
    segments, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    begun, tables = [], [np.empty((0, 4), np.int64)]
    for row, block in enumerate(blocks):
        at = 0
        for number, document in enumerate(block):
            begun.append(row * width + at)
            own = slice(at, at + len(document.tokens))
            ids[row, own] = document.tokens
            labels[row, own] = document.tokens if document.labels is None else document.labels
            segments[row, own], positions[row, own] = number, np.arange(len(document.tokens))
            if document.spans is not None:
                table = document.spans + np.array([at, at, 0])
                tables.append(np.insert(table, 0, row, axis=1))
            at = own.stop
        segments[row, at:], positions[row, at:] = len(block), np.arange(width - at)
    held = [document for block in blocks for document in block]
    places = _places(begun, [len(document.tokens) for document in held])
    valid = np.zeros(shape, bool)
    valid.flat[places[places >= 0]] = True
    counted = np.flatnonzero((labels != NO_LABEL) & (positions > 0))
    return Batch(
        input_ids=torch.from_numpy(ids),
        mask=torch.from_numpy(valid),
        labels=torch.from_numpy(labels),
        ids=tuple(document.id for document in held) or ("",),
        index=torch.tensor([document.index for document in held] or [-1]),
        spans=torch.from_numpy(np.concatenate(tables)) if spans else None,
        counted=torch.from_numpy(counted),
        position_ids=torch.from_numpy(positions),
        segments=torch.from_numpy(segments),
        places=torch.from_numpy(places),
    )


def _places(begun: list[int], lengths: list[int]) -> np.ndarray:
    """Return Batch.places, (S, L) int64, of documents that begin at these flat places; if none, −1 as (1, 1)."""
    starts, counts = np.array(begun or [0], np.int64)[:, None], np.array(lengths or [0])[:, None]
    within = np.arange(max(1, int(counts.max())))
    return np.where(within < counts, starts + within, -1)
