"""Draw examples from several sources by their weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dsdistill.data.examples import Examples, Packed, TextPairs

GOLDEN = (5**0.5 - 1) / 2
Schedule = Sequence[tuple[int, Sequence[float]]]  # (draw, weights): the weights hold from this draw on


@dataclass(frozen=True)
class Mixture:
    """Join sources; examples are numbered from the first source to the last."""

    parts: tuple[Examples | Packed | TextPairs, ...]
    names: tuple[str, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @cached_property
    def bounds(self) -> np.ndarray:
        """Return (parts + 1,) int64: the first example of each source, and one past the last."""
        return np.cumsum([0, *map(len, self.parts)])

    @cached_property
    def lengths(self) -> Tensor:
        """Return (n,) int64: the tokens of each example."""
        return torch.cat([part.lengths for part in self.parts])

    @property
    def labels(self) -> Tensor | None:
        """Return the labels of all examples; None if tokens are labels."""
        held = [part.labels for part in self.parts if part.labels is not None]
        return torch.cat(held) if held else None

    def source(self, row: int) -> int:
        """Return which source an example is from."""
        return int(np.searchsorted(self.bounds, row, side="right")) - 1

    def order(self, seed: int, epoch: int, schedule: Schedule = ()) -> np.ndarray:
        """Return (n,) int64, the examples of an epoch, where n is the number of examples of all sources.

        In every run of draws each source has its share, up to one or two examples. Each pass through a source has a new
        order, and a pass that one epoch does not complete goes on in the next. The draw depends only on the arguments.

        schedule: (draw, weights) pairs, sorted by draw. Draws are counted from the first one of epoch 0; from a pair's
            draw on, the sources have its weights.
        """
        count = len(self)
        before = np.zeros(len(self.parts), np.int64)
        for earlier in range(epoch):
            before += np.bincount(self._sources(earlier * count, count, schedule), minlength=len(self.parts))
        owners = self._sources(epoch * count, count, schedule)
        order = np.empty(count, np.int64)
        for source, part in enumerate(self.parts):
            own = owners == source
            start = int(before[source])
            drawn = _stream(len(part), start, start + int(own.sum()), [seed, source])
            order[own] = self.bounds[source] + drawn
        return order

    def _sources(self, start: int, count: int, schedule: Schedule) -> np.ndarray:
        """Return (count,) the sources of these draws; a golden-ratio sequence spreads each source evenly."""
        points = (np.arange(start, start + count) * GOLDEN + 0.5) % 1
        owners = np.empty(count, np.int64)
        for first, weights in ((0, self.weights), *schedule):
            part = slice(min(max(0, first - start), count), None)
            shares = np.cumsum(weights) / sum(weights)
            owners[part] = np.searchsorted(shares, points[part], side="right").clip(max=len(self.parts) - 1)
        return owners

    def unmasked(self) -> "Mixture":
        """Return the examples with nothing hidden from the models."""
        return replace(self, parts=tuple(part.unmasked() for part in self.parts))

    def take(self, rows) -> "Mixture":
        """Return some of the examples, sorted by source, and within a source in the order given."""
        owners = np.searchsorted(self.bounds, np.asarray(rows), side="right") - 1
        chosen = [np.asarray(rows)[owners == i] - self.bounds[i] for i in range(len(self.parts))]
        kept = [i for i, of in enumerate(chosen) if len(of)]
        return Mixture(
            tuple(self.parts[i].take(chosen[i].tolist()) for i in kept),
            tuple(self.names[i] for i in kept),
            tuple(self.weights[i] for i in kept),
        )


def _stream(count: int, start: int, end: int, seed: list[int]) -> np.ndarray:
    """Return entries start to end of an endless sequence: all `count` examples shuffled, then shuffled anew, …."""
    found = []
    for turn in range(start // count, -(-end // count)):
        order = np.random.default_rng([*seed, turn]).permutation(count)
        found.append(order[max(0, start - turn * count) : end - turn * count])
    return np.concatenate(found) if found else np.empty(0, np.int64)
