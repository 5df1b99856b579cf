"""Hold what a step came to, until somebody reads it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsdistill.data import Batch
from dsdistill.distributed import engines


class Later:
    """Later holds values that are on their way from the device to the host; reading them waits until they are there."""

    def __init__(self, values: Tensor):
        self.host, self._there = values, None
        if values.is_cuda:  # into memory that it copies to by itself
            self.host = torch.empty_like(values, device="cpu", pin_memory=True).copy_(
                values, non_blocking=True
            )
            self._there = torch.cuda.Event()
            self._there.record()

    def read(self) -> Tensor:
        """Return the values, on the host."""
        if self._there is not None:
            self._there.synchronize()
        return self.host


@dataclass
class Made:
    """Made holds what a step came to."""

    step: int
    rate: float  # of learning
    batches: list[Batch]  # of this rank
    values: Later  # raw values of the terms, then what the ranks told each other; of all ranks
    parts: int  # raw values
    gradient: engines.StepGradient
    report: dict[str, dict] = field(default_factory=dict)  # of the terms, once it is read
