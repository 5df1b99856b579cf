"""List the calls whose kernels are compiled ahead of time: every operator, dtype, width and plan, on meta tensors.

Attention kernels are compiled with all conditions on pairs of a query and a key (mask, segments, causal order, window),
which need the most registers; in bfloat16 also without conditions. Attention in float32 is left out, because `auto`
never uses it. Losses over a vocabulary read logits in float32, whatever the models' dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from dsdistill.ops.attention import triton_schedule as attention
from dsdistill.ops.attention.native import DIVERGENCE_CODES
from dsdistill.ops.hidden import native as hidden_native
from dsdistill.ops.hidden import rows as hidden
from dsdistill.ops.pairwise import triton_panels as pairwise
from dsdistill.ops.pairwise.native import RELATION_CODES
from dsdistill.ops.soft_label import fused
from dsdistill.ops.soft_label.divergence import FUSED, Formula
from dsdistill.ops.soft_label.head import Head
from dsdistill.ops.soft_label.losses import Labels, SoftLabels

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTHS = (16, 64, 128, 256)  # of heads


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention_call(
    dtype: torch.dtype,
    width: int,
    divergence: str,
    plan: str,
    tokens: int,
    conditions: bool,
    mean_heads: bool = False,
    lse: bool = False,
    gradient: bool = True,
    chosen: int = 0,
) -> None:
    """Launch the kernels of a call. chosen: number of rows compared in each sequence; 0: all."""
    query = _empty(2, 4, chosen or tokens, width, dtype=dtype)
    key = _empty(2, 4 if plan == "row, own keys" else 2, tokens, width, dtype=dtype)
    mask = _empty(2, tokens, dtype=torch.bool) if conditions else None
    rows = _empty(2, 4, tokens) if lse else None
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(plan == "row, deterministic")
    try:
        attention.run(
            query,
            key,
            query,
            key,
            mask,
            None,
            _empty(2, chosen, dtype=torch.int64) if chosen else None,
            _empty(2, chosen) if chosen else None,
            rows,
            rows,
            _empty(),
            DIVERGENCE_CODES[divergence],
            0.125,
            0.125,
            conditions,
            100 if conditions else -1,
            mean_heads,
            plan.split(",")[0],
            gradient,
            gradient,
        )
    finally:
        torch.use_deterministic_algorithms(deterministic)


def attention_calls(widths: Sequence[int]) -> Iterator[tuple[str, Callable[[], None]]]:
    for name in ("bf16", "fp16"):
        dtype = DTYPES[name]
        for width in widths:
            for divergence in ("kl", "mse", "score_mse"):
                for conditions in (True, False) if name == "bf16" else (True,):
                    label = f"{name} D{width} {divergence}{' all conditions' if conditions else ''}"
                    given = functools.partial(attention_call, dtype, width, divergence, conditions=conditions)
                    for plan in ("merged", "sweeps"):
                        yield f"{label} {plan}", functools.partial(given, plan=plan, tokens=1024)
                    for tokens in (64, 128, 256, 512) if conditions else ():
                        plans = ("row", "row, deterministic") if tokens > 64 else ()
                        for plan in plans + (("row, own keys",) if tokens <= 128 else ()):
                            yield (
                                f"{label} N{tokens} {plan}",
                                functools.partial(given, plan=plan, tokens=tokens),
                            )
            for divergence in ("kl", "mse") if name == "bf16" and width in (64, 128) else ():
                call = functools.partial(attention_call, dtype, width, divergence, tokens=1024, chosen=256)
                for plan in ("merged", "sweeps"):
                    given = functools.partial(call, plan=plan, conditions=True)
                    yield f"{name} D{width} {divergence} chosen rows {plan}", given
            lse = functools.partial(
                attention_call, dtype, width, "kl", tokens=1024, conditions=True, lse=True
            )
            for plan in ("merged", "sweeps"):
                yield f"{name} D{width} kl LSEs given {plan}", functools.partial(lse, plan=plan)
            yield f"{name} D{width} kl LSEs given, loss", functools.partial(lse, plan="auto", gradient=False)
            for divergence in ("kl", "mse"):
                yield (
                    f"{name} D{width} {divergence} mean of heads",
                    functools.partial(attention_call, dtype, width, divergence, "auto", 1024, True, True),
                )


def vocabulary_calls() -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield one kernel for each divergence and gradient dtype, with all options, and some with fewer."""
    for name, gradient in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("loss", None)):
        for divergence in FUSED:
            for options in (True, False) if divergence in ("forward_kl", "jsd") else (True,):
                call = functools.partial(vocabulary_call, gradient, divergence, options, True)
                yield f"vocabulary {name} {divergence}{' all options' if options else ''}", call
        for options in (True, False):
            call = functools.partial(vocabulary_call, gradient, None, options, True)
            yield f"vocabulary {name} task{' all options' if options else ''}", call
        call = functools.partial(vocabulary_call, gradient, "forward_kl", False, False)
        yield f"vocabulary {name} forward_kl without task", call


def vocabulary_call(
    gradient: torch.dtype | None, divergence: str | None, options: bool, with_task: bool
) -> None:
    """Launch the kernel with soft labels, with the task, or both; options: biases, soft caps and label smoothing."""
    tokens, entries = 256, 151936
    z = _empty(tokens, entries)
    bias, cap = (_empty(entries), 30.0) if options else (None, None)
    head = Head(_empty(entries, 64), bias, torch.float32, cap, fused=True)
    labels = _empty(1, tokens, dtype=torch.int64)
    task = Labels(labels, 0.1 if options else 0.0) if with_task else None
    soft = None
    if divergence:
        formula = Formula(divergence, beta=0.5, alpha=0.1, mu=0.5)
        soft = SoftLabels(_empty(1, tokens, 64), head, temperature=2.0, formula=formula)
    given = {"labels": labels.flatten() if with_task else z, "teacher": z}
    out = None if gradient is None else _empty(tokens, entries, dtype=gradient)
    fused.run(head, z, given, task, soft, _empty(2), out)


def other_calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for name, dtype in DTYPES.items():
        states, mask = _empty(2, 1024, 768, dtype=dtype), _empty(2, 1024, dtype=torch.bool)
        for relation, code in RELATION_CODES.items():
            for gradient in (False, True):
                arguments = (states, states, mask, _empty(2, 1024), _empty(), code, gradient)
                label = f"{name} {relation}{' gradient' if gradient else ''}"
                yield label, functools.partial(pairwise.run, *arguments)
        for divergence, code in hidden_native.DIVERGENCE_CODES.items():
            for width in (768, 8192):
                y = _empty(1024, width, dtype=torch.float32 if width == 768 else dtype)
                target, weights = _empty(1024, width, dtype=dtype), _empty(1024)
                arguments = (y, target, _empty(width), weights, _empty(), code, dtype)
                label = f"{name} hidden {divergence} D{width}"
                yield label, functools.partial(hidden.triton_rows, *arguments)
    yield from vocabulary_calls()


def all_calls(widths: Sequence[int] = WIDTHS) -> Iterator[tuple[str, Callable[[], None]]]:
    yield from attention_calls(widths)
    yield from other_calls()
