"""Choose which examples each step, rank and micro-batch sees.

The rows of a step depend only on (seed, epoch, step, batch_size), never on how many ranks or micro-batches
share them: another machine trains on the same batches, and a resumed run asks for step k without replaying
the k steps before.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from math import ceil

import numpy as np
import torch
from torch import Tensor

from dsdistill.config.errors import UserError
from dsdistill.data.batch import Batch
from dsdistill.data.collate import Set, collate, mixed
from dsdistill.data.mixture import Mixture, Schedule
from dsdistill.data.samplers import Sampler

_CHANCE, _ROWS, _MIXED = 4, 5, 6  # streams of random numbers
POOL = 50  # steps whose examples are sorted by length together


class Loader:
    """Make the micro-batches of one rank, by epoch and step.

    Args:
        examples: the train set.
        batch_size: examples of a step over all ranks; the last step of an epoch may have fewer.
        micro_batch_size: most examples of one micro-batch.
        world_size, rank: number of ranks, and the index of this one.
        seed: seed of the order.
        pad_id: token that fills rows up on the right.
        sampler: draws an epoch's examples; None: each once.
        by_length: whether a step's examples have similar lengths, so that short texts get little padding.
        chances: whether batches hold `Batch.chance`.
        mixup: if given, half of a step's examples are mixed with others of the step; their shares (see `Batch.share`)
            are drawn from Beta(mixup, mixup).

    Raises:
        UserError: batch_size is not a multiple of micro_batch_size × world_size.
    """

    def __init__(
        self,
        examples: Set,
        batch_size: int,
        micro_batch_size: int,
        world_size: int,
        rank: int,
        seed: int,
        pad_id: int,
        by_length: bool = False,
        sampler: Sampler | None = None,
        chances: bool = False,
        mixup: float | None = None,
    ):
        at_once = micro_batch_size * world_size  # rows
        if batch_size % at_once:
            raise UserError(
                "train.batch_size",
                batch_size,
                f"a multiple of {at_once} (train.micro_batch_size {micro_batch_size} × {world_size} ranks)",
            )
        self.examples, self.batch_size, self.world_size, self.rank = examples, batch_size, world_size, rank
        self.seed, self.pad_id, self.by_length, self.sampler = seed, pad_id, by_length, sampler
        self.accumulation = batch_size // at_once  # micro-batches a step on each rank
        self.steps_per_epoch = ceil(len(examples) / batch_size)
        self.chances, self.mixup = chances, mixup
        self.schedule: Schedule = ()  # of a mixture
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self._chance = np.empty(0, dtype=np.float32)

    def rows(self, epoch: int, step: int) -> np.ndarray:
        """Return (≤ batch_size,) int64: the examples of a step over all ranks, in no meaningful order."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch} steps")
        if epoch != self._epoch:
            chance = np.random.default_rng([self.seed, epoch])
            if self.sampler is not None:
                self._order = self.sampler.order(chance)
            elif isinstance(self.examples, Mixture):
                self._order = self.examples.order(self.seed, epoch, self.schedule)
            else:
                self._order = chance.permutation(len(self.examples))
            if self.by_length:
                self._order = self._grouped(self._order, chance)
            if self.chances:
                draws = np.random.default_rng([self.seed, epoch, _CHANCE])
                self._chance = draws.random(len(self.examples), np.float32)
            self._epoch = epoch
        return self._order[step * self.batch_size : (step + 1) * self.batch_size]

    def reweigh(self, step: int, weights: Sequence[float]) -> None:
        """From this step of the run on (counted from 0), draw the sources of a mixture by these weights."""
        epoch, own = divmod(step, self.steps_per_epoch)
        draw = epoch * len(self.examples) + own * self.batch_size
        self.schedule = (*self.schedule, (draw, tuple(weights)))
        self._epoch = -1  # so that `rows` makes the order again

    def _grouped(self, order: np.ndarray, chance: np.random.Generator) -> np.ndarray:
        """Return the order with lengths sorted inside pools of many steps, and the steps of all pools shuffled."""
        lengths, pool = self.examples.lengths.numpy(), POOL * self.batch_size
        pools = [order[start : start + pool] for start in range(0, len(order), pool)]
        order = np.concatenate([rows[np.argsort(lengths[rows], kind="stable")] for rows in pools])
        whole = len(order) // self.batch_size  # a last step with fewer examples stays the last
        steps = order[: whole * self.batch_size].reshape(whole, self.batch_size)
        return np.concatenate([chance.permutation(steps).flatten(), order[whole * self.batch_size :]])

    def drawn(self, epoch: int, step: int) -> tuple[Set, np.ndarray, int]:
        """Return the set of a step's examples, their numbers in it, and the epoch of the masking."""
        return self.examples, self.rows(epoch, step), epoch

    def step(self, epoch: int, step: int) -> list[Batch]:
        """Return this rank's micro-batches of a step: `accumulation` of them on every rank.

        Epochs, and the steps of an epoch, are counted from 0. A step with fewer examples is spread evenly, so that
        micro-batches differ by at most one row; an empty one is filler.
        """
        draws = np.random.default_rng([self.seed, epoch, step, _ROWS])
        examples, rows, epoch = self.drawn(epoch, step)
        draws = draws.integers(2**32, size=len(rows))
        # Rows of similar length share a micro-batch (less padding) and are dealt to the ranks in turn, so that the
        # ranks have equal work and do not wait for each other. A sampler's groups stay in one micro-batch.
        if self.sampler is None or not self.sampler.grouped:
            rows = rows[np.argsort(examples.lengths.numpy()[rows], kind="stable")]
        batches, partners = [], self._partners(epoch, step, rows)
        for places in np.array_split(np.arange(len(rows)), self.accumulation):
            mine = places[self.rank :: self.world_size]
            own = rows[mine]
            batch = collate(examples, own.tolist(), self.pad_id, epoch)
            if partners is not None and len(own):
                others, shares = (of[mine] for of in partners)
                other = collate(examples, others.tolist(), self.pad_id, epoch)
                batch = mixed(batch, other, torch.from_numpy(shares), self.pad_id)
            # The two texts of a pair are separate rows.
            drawn = (
                np.repeat(draws[mine], len(batch.input_ids) // len(own))
                if len(own)
                else np.zeros(1, np.int64)
            )
            batch = replace(batch, draw=torch.from_numpy(drawn))
            batches.append(replace(batch, chance=self._drawn(own, batch)) if self.chances else batch)
        return batches

    def _partners(self, epoch: int, step: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Return each row's partner among a step's rows, and the row's own share; None without `mixup`."""
        if self.mixup is None:
            return None
        chance = np.random.default_rng([self.seed, epoch, step, _MIXED])
        shares = chance.beta(self.mixup, self.mixup, len(rows)).astype(np.float32)
        shares[chance.permutation(len(rows))[: -(-len(rows) // 2)]] = 1
        return chance.permutation(rows), shares

    def _drawn(self, rows: np.ndarray, batch: Batch) -> Tensor:
        """Return the draws of a batch's examples; the documents of a block share the block's draw."""
        if not len(rows):
            return torch.zeros(len(batch.documents))
        draws = torch.from_numpy(self._chance[rows])
        if batch.places is None:
            return draws
        return draws[batch.places[:, 0].clamp(min=0) // batch.input_ids.shape[1]]


class Ahead:
    """Make the batches of the next step on a thread while the current step runs.

    Args:
        loader: the loader of the train set.
        end: number of steps of the run; no batch is made beyond it.
        pinned: whether batches are put into pinned memory, from which copies to a GPU can be asynchronous.
    """

    def __init__(self, loader: Loader, end: int, pinned: bool):
        self.loader, self.end, self.pinned = loader, end, pinned
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="dsdistill-loader")
        self._next: tuple[int, Future] | None = None

    def step(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches of a step of the run, counted from 0; begin with those of the next step."""
        waiting, self._next = self._next, None
        if waiting is None or waiting[0] != step:
            waiting = step, self._pool.submit(self._made, step)
        batches = waiting[1].result()
        if step + 1 < self.end:
            self._next = step + 1, self._pool.submit(self._made, step + 1)
        return batches

    def reweigh(self, step: int, weights: Sequence[float]) -> None:
        """Change the loader's weights before any batch of this step or a later one has been taken."""
        waiting, self._next = self._next, None
        if waiting is not None:
            waiting[1].result()  # the thread reads the loader
        self.loader.reweigh(step, weights)

    def _made(self, step: int) -> list[Batch]:
        batches = self.loader.step(*divmod(step, self.loader.steps_per_epoch))
        return [batch.pinned() for batch in batches] if self.pinned else batches

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def evaluation_batches(
    examples: Set, micro_batch_size: int, world_size: int, rank: int, pad_id: int
) -> Iterator[Batch]:
    """Yield this rank's share of one pass over the examples: each example is on exactly one rank, once.

    Every rank gets the same number of batches (the last may be filler). Examples are sorted by length, longest first,
    so that a lack of memory shows at the first batch; `restore` undoes the sorting.
    """
    order = np.argsort(-examples.lengths.numpy(), kind="stable").tolist()
    batches = ceil(len(order) / (micro_batch_size * world_size))
    for i in range(batches):
        start = (i * world_size + rank) * micro_batch_size
        yield collate(examples, order[start : start + micro_batch_size], pad_id)


def restore(values: Tensor, index: Tensor) -> Tensor:
    """Return the values of all batches of all ranks, (n, …), in the order of the data set and without fillers.

    Args:
        values: (n, …), one for each row of the batches.
        index: (n,) int64, `Batch.index` of the same rows.
    """
    real = index >= 0
    return values[real][index[real].argsort()]
