"""Hold examples out of a train set, so that settings are chosen on them and the dev set is used only once.

Some sets (SST-2) have the phrases of a sentence as further rows, whose labels reveal much about the sentence's label.
So a text is held out only if all texts that contain it are held out. If only some of them are held out, the text is
left out: it is neither trained on nor scored.
"""

import logging
from collections.abc import Collection

import numpy as np

from dsdistill.config.errors import UserError
from dsdistill.data.examples import Examples, TextPairs, texts_of

log = logging.getLogger("dsdistill")

HOLDOUT = "holdout"  # name of the dev set
LONGEST = 64  # texts with more tokens (special ones at the ends not counted) are not compared for containment
KEPT, HELD, BOTH = range(3)


def held_out(
    train: Examples | TextPairs, count: int, special: Collection[int] | None
) -> tuple[Examples | TextPairs, Examples | TextPairs]:
    """Return (rest, held-out examples) of a train set; no text of one part equals a text of the other.

    If `special` is given, no text of one part is contained in a text of the other either, as far as both have at most
    LONGEST tokens.

    The draw depends only on the set: it is the same for every seed, and for a teacher with the same holdout.

    Args:
        train: all examples.
        count: how many to hold out.
        special: ids of special tokens. They are removed from both ends of examples, before each text of at most LONGEST
            tokens is searched for in the others. None: no such search; only equal examples stay together.

    Raises:
        UserError: no train example would be left, or fewer than `count` can be held out.
    """
    texts = _numbered(train)
    holders, inner = (np.empty(0, np.int64),) * 2
    if special is not None:
        holders, inner = _contained(texts_of(train), texts, special)
    side = _sides(texts, holders, inner, count)
    held, kept = np.flatnonzero(side == HELD), np.flatnonzero(side == KEPT)
    if len(held) < count or not len(kept):
        raise UserError(
            "data.holdout",
            f"{count} of {len(train)} train examples",
            "fewer, so that some are left to train on",
        )
    left = len(train) - len(held) - len(kept)
    also = f"; {left:,} that share text with both parts are left out" if left else ""
    log.info("holdout: %s of %s train examples%s", f"{count:,}", f"{len(train):,}", also)
    return train.take(kept.tolist()), train.take(held.tolist())


def _numbered(train: Examples | TextPairs) -> np.ndarray:
    """Return (n,) int64: a number for each example's text, from 0 by first appearance; equal texts have the same."""
    own, each = texts_of(train), 2 if isinstance(train, TextPairs) else 1
    known: dict[tuple[bytes, ...], int] = {}
    return np.array(
        [
            known.setdefault(tuple(own.tokens(each * row + i).tobytes() for i in range(each)), len(known))
            for row in range(len(train))
        ]
    )


def _contained(
    examples: Examples, texts: np.ndarray, special: Collection[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return (m,) and (m,): for each pair found, the number of a text and that of a shorter text inside it.

    Texts of more than LONGEST tokens are left out.
    """
    rows = np.unique(texts, return_index=True)[1]  # one example of each text
    parts = [_bare(examples.tokens(row), special) for row in rows.tolist()]
    short = [0 < len(part) <= LONGEST for part in parts]
    names, parts = texts[rows[short]], [part for part, fits in zip(parts, short, strict=True) if fits]
    if not parts:
        return names, names
    sizes = np.array([len(part) for part in parts])
    ends = sizes.cumsum()
    owners = np.repeat(np.arange(len(parts)), sizes)  # each token's text
    room = ends[owners] - np.arange(ends[-1])  # tokens from each place to the end of its text
    sums = _Sums(np.concatenate(parts))
    found = []
    for length in np.unique(sizes).tolist():
        alike = np.flatnonzero(sizes == length)
        hashes = sums.of(ends[alike] - length, length)
        order = hashes.argsort()
        places = np.flatnonzero((room >= length) & (sizes[owners] > length))
        windows = sums.of(places, length)
        match = order[np.searchsorted(hashes, windows, sorter=order).clip(max=len(alike) - 1)]
        equal = hashes[match] == windows
        found.append(np.stack([names[owners[places[equal]]], names[alike[match[equal]]]]))
    holders, inner = np.concatenate(found, axis=1)
    return holders, inner


def _bare(tokens: np.ndarray, special: Collection[int]) -> np.ndarray:
    """Return tokens without special ones at both ends."""
    first, past = 0, len(tokens)
    while first < past and int(tokens[first]) in special:
        first += 1
    while past > first and int(tokens[past - 1]) in special:
        past -= 1
    return tokens[first:past]


class _Sums:
    """Compute hashes of runs of tokens, modulo 2⁶⁴, each from the difference of two prefix sums."""

    def __init__(self, tokens: np.ndarray):
        # Each id becomes an arbitrary number of 64 bits, so that regular texts do not collide more often than others.
        mixed = np.random.default_rng(0).integers(0, 2**64, int(tokens.max()) + 1, dtype=np.uint64)[tokens]
        factors = np.full(len(tokens) + 1, 0xD1342543DE82EF95, dtype=np.uint64)
        factors[0] = 1
        self.powers = np.multiply.accumulate(factors)
        self.sums = np.concatenate([[np.uint64(0)], np.add.accumulate(mixed * self.powers[:-1])])

    def of(self, places: np.ndarray, length: int) -> np.ndarray:
        """Return the hash of the `length` tokens from each place; it does not depend on the place."""
        return (self.sums[places + length] - self.sums[places]) * self.powers[len(self.powers) - 1 - places]


def _sides(texts: np.ndarray, holders: np.ndarray, inner: np.ndarray, count: int) -> np.ndarray:
    """Return (n,): for each example HELD, KEPT, or BOTH if its text lies in sentences of both parts.

    Sentences are the texts that lie in no other text. They are drawn one by one until `count` examples or more lie
    only in drawn sentences. The first `count` of these, in the order of the set, are HELD; the rest of these are BOTH.
    """
    total = int(texts.max()) + 1
    sentences = np.setdiff1d(np.arange(total), inner)
    whole = np.isin(holders, sentences)
    pairs = np.unique(np.stack([holders[whole], inner[whole]]), axis=1)
    holders, inner = np.concatenate([pairs, np.stack([sentences, sentences])], axis=1)
    order = holders.argsort(kind="stable")
    parts = dict(
        zip(
            sentences.tolist(),
            np.split(inner[order], np.searchsorted(holders[order], sentences)[1:]),
            strict=True,
        )
    )
    examples = np.bincount(texts, minlength=total)
    missing = np.bincount(
        inner, minlength=total
    )  # for each text: how many sentences with it are not drawn yet
    drawn, found = np.zeros(total, bool), 0
    for sentence in np.random.default_rng(0).permutation(sentences).tolist():
        if found >= count:
            break
        own = parts[sentence]
        missing[own] -= 1
        drawn[own] = True
        found += int(examples[own[missing[own] == 0]].sum())
    side = np.where(missing == 0, HELD, np.where(drawn, BOTH, KEPT))[texts]
    side[np.flatnonzero(side == HELD)[count:]] = BOTH
    return side
