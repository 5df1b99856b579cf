"""Keep freed memory for the next step, on CPUs."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def keep_freed_memory() -> None:
    """Stop glibc from giving every large block back to the system as soon as it is freed.

    By default each large tensor costs fresh pages, faulted in one by one, at every step: on a laptop that
    more than halves the speed of training. Does nothing elsewhere, or where the user tuned malloc already.
    """
    if any(
        name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
    ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
