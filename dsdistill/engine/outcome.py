"""Hold the results of a step until they are read."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsdistill.data import Batch
from dsdistill.distributed import engines


class Later:
    """Later holds values that are being copied from the device to the host; read() waits for them."""

    def __init__(self, values: Tensor):
        self.host, self._there = values, None
        if values.is_cuda:  # into pinned memory, which the GPU copies to while the host goes on
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
    """Made holds the results of a step."""

    step: int
    rate: float  # the learning rate
    batches: list[Batch]  # those of this rank
    values: Later  # sums over all ranks: raw values of the terms, then the ranks' messages to each other
    parts: int  # number of raw values
    gradient: engines.StepGradient
    report: dict[str, dict] = field(default_factory=dict)  # of the terms, once `values` is read
