"""Call the compiled operator `torch.ops.dsdistill.pairwise_alignment` (csrc/pairwise)."""

from __future__ import annotations

import torch
from torch import Tensor

from dsdistill.ops.backends import register_gradients
from dsdistill.ops.common import accumulate_dtype, storage_dtype

RELATION_CODES = {"cosine": 0, "dot": 1, "distance": 2}


def arguments(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    relation: str,
    reduction: str,
) -> tuple:
    """Return the operator's arguments except the last, which asks for the gradient."""
    if weights is not None:
        weights = weights.detach().to(torch.float64).contiguous()
    return student, teacher, mask, weights, RELATION_CODES[relation], reduction == "mean"


def register() -> None:
    """Register shapes for tracing, and autograd for callers that use the operator directly."""

    @torch.library.register_fake("dsdistill::pairwise_alignment")
    def _fake(student, teacher, mask, weights, relation, mean, gradient):
        return (
            student.new_empty((), dtype=accumulate_dtype(student, teacher)),
            student.new_empty(student.shape if gradient else 0, dtype=storage_dtype(student)),
        )

    register_gradients("dsdistill::pairwise_alignment", arguments=7, differentiable=(0,))
