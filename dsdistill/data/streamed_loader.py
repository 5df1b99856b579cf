"""Choose which examples of a streamed set each step sees, and join parts if a step needs several."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import torch

from dsdistill.data.examples import Examples, Packed
from dsdistill.data.loader import Loader
from dsdistill.data.store import joined
from dsdistill.data.streamed import Streamed

BEHIND = 2  # most steps by which one rank may be behind another: each step ends for all ranks together


class StreamedLoader(Loader):
    """Make the micro-batches of one rank from a streamed set.

    The set is gone through part by part, each in an order that depends only on seed and part. Steps take their examples
    one after the other, so a step may begin in one part and end in the next. What a step sees depends on the seed, its
    number, and how many examples the earlier parts have.
    """

    examples: Streamed

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._ends: list[int] = []  # examples of all parts up to each
        self._orders: dict[int, np.ndarray] = {}

    def drawn(self, epoch: int, step: int) -> tuple[Examples | Packed, np.ndarray, int]:
        """Return the joined parts of a step, which of their examples the step sees, and the first part's number."""
        places = list(self._places(step * self.batch_size, (step + 1) * self.batch_size))
        first = next(self._places(max(0, step - BEHIND) * self.batch_size, (step + 1) * self.batch_size))[0]
        self.examples.need(first, places[-1][0])
        parts = [self.examples.part(part) for part, *_ in places]
        before = np.cumsum([0, *map(len, parts)])
        rows = [
            self._shuffled(part)[low:high] + at for (part, low, high), at in zip(places, before, strict=False)
        ]
        return as_one(parts), np.concatenate(rows), places[0][0]

    def _places(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield parts with a range of each: the examples from start to end, counted over all parts end to end."""
        while start < end:
            while not self._ends or self._ends[-1] <= start:
                count = self.examples.count(len(self._ends))
                self._ends.append(count + (self._ends[-1] if self._ends else 0))
            part = bisect_right(self._ends, start)
            before = self._ends[part - 1] if part else 0
            stop = min(end, self._ends[part])
            yield part, start - before, stop - before
            start = stop

    def _shuffled(self, part: int) -> np.ndarray:
        if part not in self._orders:
            self._orders = {known: order for known, order in self._orders.items() if abs(known - part) <= 1}
            count = self.examples.count(part)
            self._orders[part] = np.random.default_rng([self.seed, part]).permutation(count)
        return self._orders[part]


def as_one(parts: Sequence[Examples | Packed]) -> Examples | Packed:
    """Join sets of the same form, whose examples have no separate labels, one after the other."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Packed):
        within = [part.parts for part in parts]
        first = np.cumsum([0, *map(len, within)])
        counts = [np.diff(part.bounds) for part in parts]
        order = [part.order + at for part, at in zip(parts, first, strict=False)]
        bounds = np.concatenate([[0], np.concatenate(counts).cumsum()])
        return Packed(as_one(within), np.concatenate(order), bounds)
    first = np.cumsum([0, *(len(part.documents.tokens) for part in parts)])
    names = (
        None if parts[0].given_ids is None else list(chain.from_iterable(part.given_ids for part in parts))
    )
    return replace(
        parts[0],
        documents=joined([part.documents for part in parts]),
        starts=torch.cat([part.starts + int(at) for part, at in zip(parts, first, strict=False)]),
        lengths=torch.cat([part.lengths for part in parts]),
        given_ids=names,
    )
