"""Which backends this machine has, and the choice among them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch

BACKENDS = ("reference", "chunked", "cpp", "triton", "cuda")

logger = logging.getLogger("dsdistill")


@functools.cache
def extension():
    """The compiled module `dsdistill._C`, whose import registers the native operators; None if absent."""
    try:
        from dsdistill import _C
    except ImportError as error:
        logger.warning(
            "dsdistill was installed without its native operators (%s); plain PyTorch is used. "
            "Reinstall with a C++ compiler to build them.",
            error,
        )
        return None
    return _C


def available_backends() -> tuple[str, ...]:
    """Backends that can run here for at least one operator and device."""
    native = ("cpp",) if extension() is not None else ()
    return ("reference", "chunked", *native)


@functools.cache
def _announce(message: str) -> None:
    logger.info(message)


def choose_backend(
    operator: str, requested: str, *, preference: Sequence[str], missing: dict[str, str], detail: str
) -> str:
    """The backend to run.

    requested: "auto" or a backend's name.
    preference: backends that can run this call, the fastest first; "auto" takes the first.
    missing: for every other backend, what it lacks; an explicit request for one raises ValueError with it.
    detail: device and dtype, for the log line that "auto" writes once for each choice.
    """
    if requested == "auto":
        if not torch.compiler.is_compiling():
            _announce(f"{operator}: backend 'auto' takes {preference[0]!r} for {detail}")
        return preference[0]
    if requested not in BACKENDS:
        raise ValueError(
            f"backend: got {requested!r}, expected 'auto' or one of {', '.join(map(repr, BACKENDS))}"
        )
    if requested not in preference:
        reason = missing.get(requested, f"{operator} has no {requested} implementation")
        raise ValueError(
            f"backend {requested!r} cannot run {operator}: {reason}; can run: {', '.join(preference)}"
        )
    return requested
