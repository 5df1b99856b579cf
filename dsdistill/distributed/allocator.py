"""Decide where freed host memory goes: back to the system while models load; later, on CPUs, to the next step."""

import contextlib
import ctypes
import os
from collections.abc import Iterator

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LARGE = 2**31 - 1
# Blocks of at least this size come from the system one by one, and go back as soon as they are freed.
_LOADING = 2**20


@contextlib.contextmanager
def loading(device: torch.device) -> Iterator[None]:
    """Give large blocks back to the system as soon as they are freed, while a model is loaded inside.

    Loading frees as much memory as it keeps: it reads whole tensors, of which a rank keeps a part. By default glibc
    would not give that memory back, since it adapts to the first large block that is freed. At the end all free memory
    goes back; on a CPU, training steps then keep the memory that they free.
    """
    library = _tunable()
    if library is None:
        yield
        return
    library.mallopt(_M_MMAP_THRESHOLD, _LOADING)
    library.mallopt(_M_TRIM_THRESHOLD, _LOADING)
    try:
        yield
    finally:
        library.malloc_trim(0)
        if device.type == "cpu":
            keep_freed_memory()


def keep_freed_memory() -> None:
    """Stop glibc from giving every large block back to the system as soon as it is freed; call it after loading.

    By default each large tensor needs fresh pages, faulted in one by one, at every step: on a laptop that
    more than halves the speed of training.
    """
    library = _tunable()
    if library is not None:
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_M_TRIM_THRESHOLD, _LARGE)


def _tunable() -> ctypes.CDLL | None:
    """Return the C library if it is glibc; None if it is another, or if the user has tuned malloc."""
    if any(
        name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
    ):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
