"""Measure the task's loss separately for each source of a mixture, in addition to the loss that is trained."""

from dataclasses import replace

import torch
from torch import Tensor

from dsdistill.alignment.terms.base import Pair
from dsdistill.alignment.terms.task import TaskTerm
from dsdistill.config.terms import Task
from dsdistill.data.batch import Batch
from dsdistill.models.trace import Trace


class SourceLosses:
    """Add up the task's loss and its divisor for each source, over the batches of a step."""

    def __init__(self, pair: Pair, sources: int):
        self._term = TaskTerm(Task(), pair)
        self.sums = torch.zeros(sources, 2, dtype=torch.float64)  # losses and divisors

    @torch.no_grad()
    def add(self, student: Trace, batch: Batch) -> None:
        """Add a batch of examples whose sources are known."""
        assert batch.source is not None  # a mixture's loader sets it
        by_token = _by_token(batch)
        for source in range(len(self.sums)):
            own = by_token == source
            counted = batch.counted
            if counted is not None:
                counted = counted[own.expand_as(batch.mask).flatten()[counted]]
            part = replace(batch, mask=batch.mask & own, counted=counted)
            self.sums[source, 0] += self._term.sums(student, None, part)[0].double().cpu()
            self.sums[source, 1] += self._term.counts(part, {})[0].cpu()


def _by_token(batch: Batch) -> Tensor:
    """Return the source of each token, (B, 1) or packed (B, N), int64; -1 at the filler of packed rows."""
    assert batch.source is not None
    if batch.places is None:
        return batch.source[:, None]
    return torch.cat([batch.source, batch.source.new_full((1,), -1)])[batch.owners].view_as(batch.input_ids)
