"""Which examples each step, rank and micro-batch sees.

The rows of a step depend on (seed, epoch, step, batch_size) alone, never on how many ranks or micro-batches
share them: another machine trains on the same batches, and a resumed run asks for step k without replaying
the k before.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import ceil

import numpy as np
import torch
from torch import Tensor

from dsdistill.config.errors import UserError
from dsdistill.data.batch import NO_LABEL, Batch
from dsdistill.data.examples import Examples
from dsdistill.data.samplers import Sampler

_CHANCE = 4  # stream of random numbers
POOL = 50  # steps whose examples are sorted by length together


def collate(examples: Examples, rows: list[int], pad_id: int, epoch: int | None = None) -> Batch:
    """The named rows as one batch, padded on the right to the longest of them; no rows: one filler row.

    epoch: which of its draws an example with a masking shows; None: that of evaluation.
    """
    if not rows:
        return _filler(examples, pad_id)
    width = int(examples.lengths[rows].max())
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    token_types = None if examples.token_types is None else torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, NO_LABEL) if examples.labels is None else examples.labels[rows]
    for i, row in enumerate(rows):
        start, end = examples.starts[row], examples.starts[row + 1]
        length = int(end - start)
        seen = tokens = examples.tokens[start:end]
        if examples.masking is not None:
            seen, chosen = map(torch.from_numpy, examples.masking.draw(tokens.numpy(), row, epoch))
            if examples.masking.predicted:
                tokens = chosen
        input_ids[i, :length] = seen
        if examples.labels is None:
            labels[i, :length] = tokens
        mask[i, :length] = True
        if token_types is not None:
            token_types[i, :length] = examples.token_types[start:end]
    if examples.prompts is not None:
        labels[torch.arange(width) < examples.prompts[rows, None]] = NO_LABEL
    ids = tuple(examples.ids[row] for row in rows)
    spans = None if examples.spans is None else examples.spans.batch(rows)
    counted = _counted(examples, labels, mask)
    return Batch(input_ids, mask, labels, token_types, ids, torch.tensor(rows), spans, counted=counted)


def _counted(examples: Examples, labels: Tensor, mask: Tensor) -> Tensor | None:
    """Return (K,) int64, the flat places of tokens to predict; None where labels belong to whole examples."""
    if examples.labels is not None:
        return None
    chosen = (labels != NO_LABEL) & mask
    if examples.masking is None or not examples.masking.predicted:
        # A causal model predicts each token from those before it, and the first has none.
        chosen[:, 0] = False
    return chosen.flatten().nonzero()[:, 0]


def _filler(examples: Examples, pad_id: int) -> Batch:
    # Two tokens wide, so that logits shifted against next-token labels are not an empty tensor.
    input_ids = torch.full((1, 2), pad_id, dtype=torch.int64)
    if examples.labels is None:
        labels = torch.full_like(input_ids, NO_LABEL)
    else:
        labels = torch.full((1,), NO_LABEL, dtype=examples.labels.dtype)
    token_types = None if examples.token_types is None else torch.zeros_like(input_ids)
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    spans = None if examples.spans is None else examples.spans.batch([])
    counted = _counted(examples, labels, mask)
    return Batch(input_ids, mask, labels, token_types, ("",), torch.tensor([-1]), spans, counted=counted)


class Loader:
    """The micro-batches of one rank, by epoch and step.

    Args:
        examples: the train set.
        batch_size: examples of a step over all ranks; the last step of an epoch may have fewer.
        micro_batch_size: most examples of one micro-batch.
        world_size, rank: number of ranks, and which of them this is.
        seed: of the order.
        pad_id: token that fills rows up on the right.
        sampler: draws an epoch's examples; None: each once.
        by_length: a step's examples are of like length, so that short texts are not padded to the longest of a step.

    Raises:
        UserError: batch_size is not a multiple of micro_batch_size × world_size.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        micro_batch_size: int,
        world_size: int,
        rank: int,
        seed: int,
        pad_id: int,
        by_length: bool = False,
        sampler: Sampler | None = None,
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
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def rows(self, epoch: int, step: int) -> np.ndarray:
        """(≤ batch_size,) int64: the examples of a step over all ranks, in no meaningful order."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch} steps")
        if epoch != self._epoch:
            chance = np.random.default_rng([self.seed, epoch])
            self._order = (
                chance.permutation(len(self.examples)) if self.sampler is None else self.sampler.order(chance)
            )
            if self.by_length:
                self._order = self._grouped(self._order, chance)
            self._epoch = epoch
        return self._order[step * self.batch_size : (step + 1) * self.batch_size]

    def _grouped(self, order: np.ndarray, chance: np.random.Generator) -> np.ndarray:
        """The order with lengths sorted inside pools of many steps, and the steps of all pools shuffled."""
        lengths, pool = self.examples.lengths.numpy(), POOL * self.batch_size
        pools = [order[start : start + pool] for start in range(0, len(order), pool)]
        order = np.concatenate([rows[np.argsort(lengths[rows], kind="stable")] for rows in pools])
        whole = len(order) // self.batch_size  # the ragged last step stays the last
        steps = order[: whole * self.batch_size].reshape(whole, self.batch_size)
        return np.concatenate([chance.permutation(steps).flatten(), order[whole * self.batch_size :]])

    def step(self, epoch: int, step: int) -> list[Batch]:
        """This rank's micro-batches of a step (both counted from 0): `accumulation` of them on every rank.

        A ragged step is spread evenly, so micro-batches differ by at most one row; an empty one is filler.
        """
        rows = self.rows(epoch, step)
        # Rows of like length share a micro-batch (less padding) and are dealt out to the ranks one by one: the
        # ranks get equally much to do and do not wait for each other.
        # Groups stay together, on whatever ranks.
        if self.sampler is None or not self.sampler.grouped:
            rows = rows[np.argsort(self.examples.lengths.numpy()[rows], kind="stable")]
        moments = np.array_split(rows, self.accumulation)
        chance = np.random.default_rng([self.seed, epoch, _CHANCE]).random(len(self.examples), np.float32)
        batches = []
        for moment in moments:
            own = moment[self.rank :: self.world_size]
            drawn = torch.from_numpy(chance[own]) if len(own) else torch.zeros(1)
            batches.append(replace(collate(self.examples, own.tolist(), self.pad_id, epoch), chance=drawn))
        return batches


def evaluation_batches(
    examples: Examples, micro_batch_size: int, world_size: int, rank: int, pad_id: int
) -> Iterator[Batch]:
    """This rank's share of one pass over the examples: each example on exactly one rank, once.

    Every rank gets the same number of batches (the last may be filler). Examples come by length, longest
    first, so that memory runs out at once or never; `restore` gives them back their order.
    """
    order = np.argsort(-examples.lengths.numpy(), kind="stable").tolist()
    batches = ceil(len(order) / (micro_batch_size * world_size))
    for i in range(batches):
        start = (i * world_size + rank) * micro_batch_size
        yield collate(examples, order[start : start + micro_batch_size], pad_id)


def restore(values: Tensor, index: Tensor) -> Tensor:
    """Values of all batches of all ranks, (n, …), in the order of the data set and without fillers.

    Args:
        values: (n, …), one for each row of the batches.
        index: (n,) int64, `Batch.index` of the same rows.
    """
    real = index >= 0
    return values[real][index[real].argsort()]
