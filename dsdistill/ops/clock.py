"""Measure time: by CUDA events where work runs on a GPU, by the host's clock elsewhere.

All code that times GPU work uses this module, so that it also runs on a CPU.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dsdistill.ops.gpu import Tile, watching


def synchronize(device: str | torch.device) -> None:
    """Wait until the device has finished its work; return at once on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def mark(device: str | torch.device) -> Any:
    """Return a point in the device's time, for `between`, without waiting."""
    if torch.device(device).type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter()


def between(begin: Any, end: Any) -> float:
    """Return the seconds between two marks; the device must have reached both (`synchronize`)."""
    if isinstance(begin, float):
        return end - begin
    return begin.elapsed_time(end) / 1e3


def seconds_of(call: Callable[[], object], device: str | torch.device) -> float:
    """Return the seconds of one call, by the device's clock."""
    synchronize(device)
    begin = mark(device)
    call()
    end = mark(device)
    synchronize(device)
    return between(begin, end)


def host_seconds_of(call: Callable[[], object], device: str | torch.device) -> float:
    """Return the seconds until one call returns, perhaps before its work is done: the processor's time for it."""
    synchronize(device)
    begin = time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    synchronize(device)
    return seconds


@contextlib.contextmanager
def kernel_laps(device: str | torch.device) -> Iterator[Callable[[], list[tuple[str, Tile, float]]]]:
    """Time each Triton kernel launched within. The yielded function returns (name, tile, seconds) of each."""
    marks: list[tuple[str, Tile, Any, Any]] = []

    @contextlib.contextmanager
    def watch(kernel: Any, tile: Tile) -> Iterator[None]:
        begin = mark(device)
        yield
        marks.append((kernel.fn.__name__.removesuffix("_kernel"), tile, begin, mark(device)))

    def laps() -> list[tuple[str, Tile, float]]:
        synchronize(device)
        return [(name, tile, between(begin, end)) for name, tile, begin, end in marks]

    with watching(watch):
        yield laps
