"""Call the compiled operator `torch.ops.dsdistill.attention_alignment` (csrc/attention)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsdistill.ops.backends import register_gradients
from dsdistill.ops.common import accumulate_dtype, storage_dtype

KL, MSE, SCORE_MSE = range(3)  # the same codes as in csrc/attention/cpu.h
DIVERGENCE_CODES = {"kl": KL, "mse": MSE, "score_mse": SCORE_MSE}


def arguments(
    tensors: Sequence[Tensor], pairs, weights, divergence, student_scale, teacher_scale, reduction
) -> tuple:
    """Return the operator's arguments except the last two, which ask for gradients."""
    segments = None if pairs.segments is None else pairs.segments.to(torch.int64).contiguous()
    return (
        *tensors,
        pairs.mask,
        segments,
        None if pairs.rows is None else pairs.rows.contiguous(),
        None if weights is None else weights.to(torch.float64).contiguous(),
        DIVERGENCE_CODES[divergence],
        student_scale,
        teacher_scale,
        pairs.causal,
        -1 if pairs.window is None else pairs.window,
        reduction == "mean",
    )


def register() -> None:
    """Register shapes for tracing, and autograd for callers that use the operator directly."""

    @torch.library.register_fake("dsdistill::attention_alignment")
    def _fake(student_query, student_key, teacher_query, teacher_key, *rest):
        query_gradient, key_gradient = rest[-2:]
        tensors = (student_query, student_key, teacher_query, teacher_key)
        return (
            student_query.new_empty((), dtype=accumulate_dtype(*tensors)),
            student_query.new_empty(
                student_query.shape if query_gradient else 0, dtype=storage_dtype(student_query)
            ),
            student_key.new_empty(student_key.shape if key_gradient else 0, dtype=storage_dtype(student_key)),
        )

    register_gradients("dsdistill::attention_alignment", arguments=16, differentiable=(0, 1))
