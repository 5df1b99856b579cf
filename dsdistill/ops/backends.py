"""Find the backends that this machine has, and choose among them.

The identity: the equation by which `chunked` computes a sum over N×N pairs from D×D matrices.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsdistill.ops.gpu import gpu_lack, interpreting

BACKENDS = ("reference", "chunked", "cpp", "triton", "cuda")

logger = logging.getLogger("dsdistill")


class BackendError(ValueError):
    """Signal that a backend that was requested by its name cannot run a call."""


_extension: Any = None  # the compiled module


def _has_amx() -> bool:
    """Return whether Linux reports that the processor has AMX; False on other systems."""
    try:
        return "amx_tile" in Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False


AMX = _has_amx()  # found at import: torch.compile cannot trace the reading of a file


@dataclass(frozen=True)
class Thresholds:
    """Sizes at which "auto" changes its backend on one kind of processor, as `dsdistill bench auto` measures them.

    identity_scores, identity_scores_bfloat16: (tokens, power, least): raw scores of attention use the identity
        if N ≥ tokens · D^power and N ≥ least. The second is for calls whose tensors are all bfloat16.
    identity_relations: (tokens, more): cosine and dot use the identity if N ≥ 2.5 D and N ≥ tokens · D + more.
    native_rows: the largest D up to which the native kernel takes pairwise alignment of chosen rows.
    small_projection: with a projection of at most so many elements, the native kernel takes hidden states.
    few_tokens, few_projection: with fewer tokens than few_tokens and a projection of more elements than few_projection
        (and than small_projection), `reference` takes them: so few tokens need no blocks.
    products: whether `chunked` takes few_tokens and more, because PyTorch's products are faster than the native
        kernel's.
    eager_logits: tokens × entries up to which `reference` takes losses over a vocabulary: no more than in one block.
    """

    identity_scores: tuple[float, float, int]
    identity_scores_bfloat16: tuple[float, float, int]
    identity_relations: tuple[float, int]
    native_rows: int
    small_projection: int
    few_tokens: int
    few_projection: int
    products: bool
    eager_logits: int


# "avx512" is also used for kinds of processor that nobody has measured.
THRESHOLDS = {
    "avx512": Thresholds(
        identity_scores=(6, 1, 0),
        identity_scores_bfloat16=(6, 1, 0),
        identity_relations=(0, 0),
        native_rows=0,
        small_projection=1 << 16,
        few_tokens=128,
        few_projection=0,
        products=False,
        eager_logits=1 << 22,
    ),
    "amx": Thresholds(
        identity_scores=(4, 1, 300),
        identity_scores_bfloat16=(195, 0.5, 0),
        identity_relations=(1.8, 280),
        native_rows=512,
        small_projection=1 << 17,
        few_tokens=256,
        few_projection=1 << 19,
        products=True,
        eager_logits=1 << 22,
    ),
}
CPU = THRESHOLDS["amx" if AMX else "avx512"]


def attention_order(raw: bool, queries: int, width: int, bfloat16: bool) -> tuple[str, ...]:
    """Return the backends for attention on a CPU, the fastest first.

    raw: raw scores of all pairs are compared. bfloat16: all four tensors have this type.
    """
    tokens, power, least = CPU.identity_scores_bfloat16 if bfloat16 else CPU.identity_scores
    if raw and queries >= max(least, tokens * width**power):
        return ("chunked", "cpp", "reference")
    return ("cpp", "chunked", "reference")


def pairwise_order(identity: bool, compared: int, width: int, rows: bool) -> tuple[str, ...]:
    """Return the backends for pairwise alignment on a CPU, the fastest first.

    identity: whether N ≥ 2.5 D. compared: number of rows compared. width: D of the wider model. rows: whether only
    chosen rows are compared.
    """
    tokens, more = CPU.identity_relations
    # For all rows the native kernel computes half of the pairs, for chosen rows every pair.
    if (identity and compared >= tokens * width + more) or (rows and width > CPU.native_rows):
        return ("chunked", "cpp", "reference")
    return ("cpp", "chunked", "reference")


def hidden_order(tokens: int, projection: int) -> tuple[str, ...]:
    """Return the backends of hidden states, the fastest first. projection: number of its elements, 0: there is none."""
    if projection > CPU.small_projection:
        if tokens < CPU.few_tokens and projection > CPU.few_projection:
            # Packing the projection would cost more than the fused pass saves.
            return ("reference", "cpp", "chunked")
        if tokens >= CPU.few_tokens and CPU.products:
            return ("chunked", "cpp", "reference")
    return ("cpp", "chunked", "reference")


def vocabulary_order(logits: int) -> tuple[str, ...]:
    """Return the backends for losses over a vocabulary on a CPU, the fastest first.

    logits: tokens × entries of the student.
    """
    return ("reference", "chunked") if logits <= CPU.eager_logits else ("chunked", "reference")


def load_extension() -> None:
    """Import `dsdistill._C`, which registers the native operators; warn if it was not built. `ops` calls this once."""
    global _extension
    try:
        from dsdistill import _C  # type: ignore[attr-defined]  # compiled, so mypy has no source to read
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


def taken_in(call: Callable[[], object]) -> str:
    """Return what "auto" chooses in a call of one operator; `backends_taken` does not see it."""
    global _taken
    before, _taken = _taken, {}
    try:
        call()
        return next(iter(next(iter(_taken.values()))))
    finally:
        _taken = before


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
        if not torch.compiler.is_compiling():  # logged once for each operator and choice, for all shapes
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
