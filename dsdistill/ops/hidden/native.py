"""Call the compiled operator `torch.ops.dsdistill.hidden_alignment` (csrc/hidden)."""

from __future__ import annotations

import torch
from torch import Tensor

from dsdistill.ops.backends import register_gradients
from dsdistill.ops.common import accumulate_dtype, storage_dtype

MSE, COSINE = range(2)  # the same codes as in csrc/hidden/cpu.h
DIVERGENCE_CODES = {"mse": MSE, "cosine": COSINE}


def arguments(
    student, teacher, projection, bias, mask, weights: Tensor | None, divergence: str, reduction: str
) -> tuple:
    """Return the operator's arguments except the last three, which ask for gradients."""
    if weights is not None:
        weights = weights.detach().to(torch.float64).contiguous()
    return (
        student,
        teacher,
        projection,
        bias,
        mask,
        weights,
        DIVERGENCE_CODES[divergence],
        reduction == "mean",
    )


def register() -> None:
    """Register shapes for tracing, and autograd for callers that use the operator directly."""

    @torch.library.register_fake("dsdistill::hidden_alignment")
    def _fake(student, teacher, projection, bias, mask, weights, divergence, mean, *wanted):
        def gradient(x, want):
            like = student if x is None else x
            return like.new_empty(like.shape if want and x is not None else 0, dtype=storage_dtype(like))

        loss = student.new_empty((), dtype=accumulate_dtype(student, teacher, projection, bias))
        return loss, *(gradient(x, want) for x, want in zip((student, projection, bias), wanted, strict=True))

    register_gradients("dsdistill::hidden_alignment", arguments=11, differentiable=(0, 2, 3))
