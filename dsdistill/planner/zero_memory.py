"""Record in a ledger what DeepSpeed ZeRO keeps of the student on a rank, and when; DeepSpeed itself does not run.

This follows deepspeed 0.19 (runtime/zero/stage_1_and_2.py, stage3.py). With S trainable parameters of e bytes on w
ranks:

  weights           S·e; at stage 3 S·e/w and, until the step, all of them gathered (with the default limits nothing is
                    released in a model of less than 1e9 parameters); the buffers that receive them live until all
                    weights of the same fetch have been used, which is the end of the forward pass
  master weights    4·S/w in float32, also if the weights are float32 themselves
  moments           8·S/w for Adam, 4·S/w for momentum SGD and AdaGrad
  gradients         at stage 2 the whole gradients of all parameters that this rank's share touches; at stage 1 S·e
                    until the last micro-batch, then as at stage 2; at stage 3 S·e/w
  bucket            gradients are copied there to be reduced, and again, flat, to be sent: on a GPU reduce_bucket_size
                    elements, or S if that is less; on a CPU only what is written there
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from dsdistill.planner.ledger import Ledger

WEIGHTS, GATHERED, GRADIENTS = "student, weights", "student, gathered weights", "student, gradients"
MASTER, MOMENTS = "optimizer, master weights", "optimizer, moments"
BUCKETS, STEP = "DeepSpeed, buckets", "DeepSpeed, flat copies in the step"

STATES = {"adamw": 2, "adam": 2, "sgd": 1, "adagrad": 1}  # float32 values a parameter
TEMPORARY = {
    "adamw": 0,
    "adam": 0,
    "sgd": 1,
    "adagrad": 3,
}  # more of them during the optimizer's step: fused optimizers need none


@dataclass(frozen=True)
class Settings:
    """Settings holds what determines the memory of the student's engine."""

    stage: int
    world_size: int
    width: int  # bytes of a weight
    optimizer: str
    bucket: int  # reduce_bucket_size, elements
    buffers: int  # number of buckets: 2 if communication overlaps with backward
    live: int  # most gathered elements at stage 3
    prefetch: int  # most elements that are prefetched together
    offloaded: bool  # optimizer and its state in host memory
    accumulates: bool  # over more than one micro-batch
    lazy: bool  # on CPUs: a buffer takes memory only where it is written

    @property
    def copies(self) -> int:
        """Return the copies of weights while they are gathered: the flat buffer and, on CPUs, gloo's own."""
        return 0 if self.world_size == 1 else 1 + self.lazy


class StudentZero:
    """A StudentZero follows the student's parameters through a step.

    groups: trainable parameters by optimizer group, in order. frozen: number of elements that do not train.
    """

    def __init__(
        self, ledger: Ledger, settings: Settings, groups: Sequence[Sequence[nn.Parameter]], frozen: int
    ):
        self.ledger, self.settings = ledger, settings
        self.groups = [[parameter.numel() for parameter in group] for group in groups]
        self.total = sum(map(sum, self.groups))
        self.bucket = min(settings.bucket, self.total)
        self.largest = max(size for group in self.groups for size in group)
        world, width = settings.world_size, settings.width
        self.sharded = settings.stage == 3
        self.share = self.total / world  # elements of a rank
        ledger.add(WEIGHTS, width * (self.total + frozen) / (world if self.sharded else 1))
        self.whole = width * min(self.total + frozen, settings.live) if self.sharded else 0
        fetched = min(self.total + frozen, settings.prefetch)
        self.arriving = width * fetched * settings.copies if self.sharded else 0
        if not settings.offloaded:
            ledger.add(MASTER, 4 * self.share)
            ledger.add(MOMENTS, 4 * STATES[settings.optimizer] * self.share)
        self.mine = width * (
            self.share if self.sharded else max(self._touched())
        )  # gradients this rank keeps
        self._filled = self._held = 0  # elements in the bucket, and elements that it has memory for
        self._keeps = False  # whether a reduced gradient of this backward pass is kept
        if self.sharded:  # gradients and bucket stay from step to step
            ledger.add(GRADIENTS, 0 if settings.offloaded else self.mine)
            self._allocate()
        if settings.accumulates:  # gradients of earlier micro-batches
            mine = 0 if settings.offloaded else self.mine
            ledger.add(GRADIENTS, {1: width * self.total, 2: mine, 3: 0}[settings.stage])

    def _touched(self) -> list[int]:
        """Return, by rank, the elements of all parameters that the rank's shares of the groups touch."""
        world = self.settings.world_size
        touched = [0] * world
        for group in self.groups:
            share, start = math.ceil(sum(group) / world), 0
            for size in group:
                for rank in range(start // share, min(world - 1, (start + size - 1) // share) + 1):
                    touched[rank] += size
                start += size
        return touched

    def gather(self) -> None:
        """Add gathered weights and their buffers, before the forward pass."""
        self.ledger.add(GATHERED, self.whole + self.arriving)

    def arrived(self) -> None:
        """Remove the buffers of gathered weights, after the forward pass."""
        self.ledger.add(GATHERED, -self.arriving)

    def follow(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count for each gradient what DeepSpeed's hooks do with it."""
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._take)

    def _take(self, parameter: nn.Parameter) -> None:
        self._allocate()
        if self.settings.stage == 1:
            if not self.settings.accumulates:
                self.ledger.give([parameter.grad], GRADIENTS)
                return
        else:
            self._copy(parameter.numel())
        parameter.grad = None

    def _copy(self, size: int) -> None:
        """Copy one gradient into the bucket."""
        if self._filled + size > self.bucket and self._filled:
            self._reduce()
        if size <= self.bucket:
            self._hold(self._filled + size)
        self._filled += size

    def _allocate(self) -> None:
        """Allocate the bucket, before the first gradient."""
        if not self.settings.lazy:
            self._hold(self.settings.buffers * self.bucket)

    def _hold(self, elements: int) -> None:
        """Grow the bucket's memory to at least so many elements."""
        if elements > self._held:
            self.ledger.add(BUCKETS, self.settings.width * (elements - self._held))
            self._held = elements

    def _reduce(self) -> None:
        """Send the bucket, from a flat copy, and keep this rank's part."""
        flat = self.settings.width * self._filled
        if self.sharded:
            flat *= max(1, self.settings.copies)
        self.ledger.add(BUCKETS, flat)
        self.ledger.add(BUCKETS, -flat)
        self._filled = 0
        if not self.sharded and not self.settings.offloaded and not self._keeps:
            self._keeps = True
            self.ledger.add(GRADIENTS, self.mine)

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """Finish a step's last backward pass: reduce what is left."""
        if self.settings.stage == 1:
            for parameter in parameters:
                size = parameter.numel()
                self._copy(size)
                if self.settings.accumulates:
                    self.ledger.add(GRADIENTS, -self.settings.width * size)
                parameter.grad = None
        self._reduce()
        if not self.sharded:
            self.ledger.add(BUCKETS, -self.settings.width * self._held)
            self._held = 0
            if self.settings.stage == 2 and self.settings.accumulates and self._keeps:
                self.ledger.add(GRADIENTS, -self.mine)  # summed into those of earlier micro-batches

    def step(self) -> None:
        """Step the optimizer, one group at a time, on a flat float32 copy of its gradients."""
        self.ledger.add(GATHERED, -self.whole)  # DeepSpeed shards them again before it steps
        if self.settings.offloaded:
            return
        shares = [sum(group) / self.settings.world_size for group in self.groups]
        self._passing(
            8 * min(self.largest, max(shares))
        )  # norms are taken in float64, parameter by parameter
        for share in shares:
            flat = self.settings.width * share
            single = 0 if self.settings.width == 4 else 4 * share
            self._passing(flat + single)
            self._passing((single or flat) + 4 * TEMPORARY[self.settings.optimizer] * share)

    def _passing(self, size: float) -> None:
        self.ledger.add(STEP, size)
        self.ledger.add(STEP, -int(size))
