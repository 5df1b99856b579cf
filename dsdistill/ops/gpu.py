"""Share code between the GPU kernels of all operators: whether they can run here, and for which architecture."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

TYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def interpreting() -> bool:
    """Return whether Triton's interpreter runs the kernels on CPU tensors; this is fixed when Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1" and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_lack(*tensors: Tensor | None) -> str | None:
    """Return why the "triton" backend cannot take these tensors; None if it can."""
    present = [x for x in tensors if x is not None]
    device = present[0].device
    if not _has_triton():
        return "Triton is not installed"
    if device.type == "cpu" and not interpreting():
        return "it needs CUDA tensors, or TRITON_INTERPRET=1 in the environment to interpret its kernels on a CPU"
    if device.type not in ("cpu", "cuda"):
        return f"it needs CUDA tensors, these are on {device}"
    return gpu_lack(*present)


def gpu_lack(*tensors: Tensor) -> str | None:
    """Return why no GPU backend's kernels can take these tensors; None if they can."""
    device = tensors[0].device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or later"
    for x in tensors:
        if x.dtype not in TYPES:
            return f"it takes float32, bfloat16 and float16, got {x.dtype}"
    return None


class Tile(NamedTuple):
    """Hold the sizes of one program's tile, its warps, and how many loads ahead its loop runs (num_stages)."""

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass
class Launch:
    """Describe one kernel launch. `arguments` holds tensors, numbers and compile-time constants by name."""

    kernel: Any  # made by triton.jit, but mypy takes it for a function
    programs: int
    arguments: dict
    tile: Tile


_recorded: list[Launch] | None = None
_recorded_architecture = ""


@contextlib.contextmanager
def recording(for_architecture: str) -> Iterator[list[Launch]]:
    """Collect launches instead of running them (on meta tensors, for example), for compilation ahead of time."""
    global _recorded, _recorded_architecture
    _recorded, _recorded_architecture = [], for_architecture
    try:
        yield _recorded
    finally:
        _recorded = None


def launch(kernel: Any, programs: int, arguments: dict, tile: Tile) -> None:
    """Run `kernel` on the device of its tensors, which need not be the current device."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, programs, arguments, tile))
        return
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    # Triton launches on the current device, where pointers of another device are not valid.
    with contextlib.ExitStack() as around:
        if device.type == "cuda":
            around.enter_context(torch.cuda.device(device))
        if _watch is not None:
            around.enter_context(_watch(kernel, tile))
        kernel[(programs,)](**arguments, num_warps=tile.warps, num_stages=tile.stages)


_watch: Callable[[Any, Tile], contextlib.AbstractContextManager] | None = None


@contextlib.contextmanager
def watching(watch: Callable[[Any, Tile], contextlib.AbstractContextManager]) -> Iterator[None]:
    """Launch each kernel inside the context that `watch(kernel, tile)` returns."""
    global _watch
    before, _watch = _watch, watch
    try:
        yield
    finally:
        _watch = before


# Bytes of shared memory that a block may have. Consumer and inference GPUs between 8.0 and 9.0 have the least.
SHARED_LIMIT = {"sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448}


def shared_limit(device: torch.device) -> int:
    """Return the bytes of shared memory that a block may have on a GPU."""
    if _recorded is not None:
        return SHARED_LIMIT[_recorded_architecture]
    properties: Any = torch.cuda.get_device_properties(device)  # its stub lacks the name
    return properties.shared_memory_per_block_optin


def architecture(device: torch.device) -> str:
    """Return the key in the tables of tiles: "sm_80", "sm_90", or "interpreter" on a CPU.

    GPUs of 12.0 have the instructions and the shared memory of 8.9, so they use sm_80, too.
    """
    if _recorded is None and device.type != "cuda":
        return "interpreter"
    return "sm_90" if shared_limit(device) >= SHARED_LIMIT["sm_90"] else "sm_80"


def rows_contiguous(x: Tensor) -> Tensor:
    """Return `x` itself if each row's features are contiguous, as the kernels need, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def block_width(width: int) -> int:
    """Return the features of a tile: the smallest power of two ≥ `width`, at least a matrix instruction's 16."""
    return max(16, 1 << (width - 1).bit_length())


# Elements of a block of one matrix in `chunked` on a GPU. About eight such matrices exist at a time: 2²⁷ elements, or
# 512 MiB in float32. Blocks of this size give work to every multiprocessor, and launches take less time than the work.
BLOCK_ELEMENTS = 1 << 24


def block_elements(like: Tensor, on_cpu: int) -> int:
    """Return how many elements a block of one matrix has on the device of `like`."""
    return BLOCK_ELEMENTS if like.is_cuda else on_cpu


def half_operands(*tensors: Tensor) -> bool:
    """Return whether products of these run on tensor cores without a cast: one half-precision type, on a GPU."""
    dtypes = {x.dtype for x in tensors}
    return len(dtypes) == 1 and dtypes <= {torch.bfloat16, torch.float16} and tensors[0].is_cuda


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in float32, (M, K) @ (K, N) or batches of them; half-precision operands use tensor cores."""
    if not half_operands(a, b):
        return a.float() @ b.float()
    if a.dim() == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    found = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    return found.view(*a.shape[:-1], b.shape[-1])


def product_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the type to which gradients are rounded before they are multiplied with `tensors`.

    bfloat16 has the range for gradients and float16 has not, so float32 is used for all types but bfloat16.
    """
    return torch.bfloat16 if all(x.dtype == torch.bfloat16 for x in tensors) else torch.float32
