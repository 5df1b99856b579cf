"""Find the backends that this machine has, and choose among them."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsdistill.ops.gpu import gpu_lack, interpreting

BACKENDS = ("reference", "chunked", "cpp", "triton", "cuda")

logger = logging.getLogger("dsdistill")


class BackendError(ValueError):
    """A backend that was asked for by its name cannot run a call."""


_extension: Any = None  # the compiled module


def _has_amx() -> bool:
    """Return whether Linux reports that the processor has AMX; False on other systems."""
    try:
        return "amx_tile" in Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False


AMX = _has_amx()  # found at import: torch.compile cannot trace the reading of a file


def load_extension() -> None:
    """Import `dsdistill._C`, which registers the native operators; warn if it was not built. `ops` calls this once."""
    global _extension
    try:
        from dsdistill import _C  # type: ignore[attr-defined]  # compiled: there is no source that mypy could read
    except ImportError as error:
        logger.warning(
            "dsdistill was installed without its native operators (%s); plain PyTorch is used. "
            "Reinstall with a C++ compiler to build them.",
            error,
        )
        return
    for operator in ("attention", "pairwise", "hidden"):
        importlib.import_module(f"dsdistill.ops.{operator}.native").register()
    _extension = _C


def extension() -> Any:
    """Return the compiled module, None if it was not built."""
    return _extension


def register_gradients(name: str, *, arguments: int, differentiable: Sequence[int]) -> None:
    """Register autograd for an operator that returns its loss and the gradient at each differentiable argument."""

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*output[1:])
        ctx.dtypes = [None if inputs[i] is None else inputs[i].dtype for i in differentiable]
        ctx.mark_non_differentiable(*output[1:])

    def backward(ctx, upstream, *_):
        gradients = [None] * arguments
        for index, gradient, dtype in zip(differentiable, ctx.saved_tensors, ctx.dtypes, strict=True):
            if ctx.needs_input_grad[index] and gradient.numel():
                gradients[index] = (gradient * upstream).to(dtype)
        return tuple(gradients)

    torch.library.register_autograd(name, backward, setup_context=setup_context)


def available_backends() -> tuple[str, ...]:
    """Return the backends that can run here for at least one operator and device."""
    backends = ["reference", "chunked"]
    if extension() is not None:
        backends.append("cpp")
    if torch.cuda.is_available() and extension() is not None and extension().cuda_architectures:
        backends.append("cuda")
    if interpreting() or torch.cuda.is_available():
        backends.append("triton")
    return tuple(backends)


def native_lack(like: torch.Tensor) -> str | None:
    """Return why the "cpp" backend cannot take tensors like this one; None if it can."""
    if like.device.type != "cpu":
        return f"it needs CPU tensors, these are on {like.device}"
    if extension() is None:
        return "the native operators were not built at installation"
    return None


def cuda_lack(*tensors: torch.Tensor | None) -> str | None:
    """Return why the "cuda" backend (compiled CUDA C++) cannot take these tensors; None if it can."""
    present = [x for x in tensors if x is not None]
    if present[0].device.type != "cuda":
        return f"it needs CUDA tensors, these are on {present[0].device}"
    if extension() is None or not extension().cuda_architectures:
        return "its kernels were not built at installation, for want of nvcc or of a torch with CUDA"
    return gpu_lack(*present)


_taken: dict[str, set[str]] = {}


def backends_taken() -> dict[str, list[str]]:
    """Return what "auto" has chosen in this process so far, by operator."""
    return {operator: sorted(backends) for operator, backends in sorted(_taken.items())}


@functools.cache
def _announce(message: str) -> None:
    logger.info(message)


def choose_backend(
    operator: str, requested: str, *, preference: Sequence[str], missing: dict[str, str]
) -> str:
    """Return the backend to run.

    requested: "auto" or a backend's name.
    preference: backends that can run this call, the fastest first; "auto" takes the first.
    missing: what every other backend lacks; an explicit request for one raises BackendError with this reason.
    """
    if requested == "auto":
        if not torch.compiler.is_compiling():  # logged once for each operator and choice, whatever the shapes
            _announce(f"{operator}: backend 'auto' takes {preference[0]!r}")
            _taken.setdefault(operator, set()).add(preference[0])
        return preference[0]
    if requested not in BACKENDS:
        raise ValueError(
            f"backend: got {requested!r}, expected 'auto' or one of {', '.join(map(repr, BACKENDS))}"
        )
    if requested not in preference:
        reason = missing.get(requested, f"{operator} has no {requested} implementation")
        raise BackendError(
            f"backend {requested!r} cannot run {operator}: {reason}; can run: {', '.join(preference)}"
        )
    return requested
