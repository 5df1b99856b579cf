"""Define hidden-state alignment in plain PyTorch, with the whole projected student, for any floating dtype.

With y = W h_S + b (y = h_S without projection) and token weights w (0 where masked):
  mse     Σ_t w_t ‖y − h_T‖²               TinyBERT, Jiao et al. 2020, Eq. 8
  cosine  Σ_t w_t (1 − cos(y, h_T))        DistilBERT, Sanh et al. 2019, section 3
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsdistill.ops.common import unit_vectors, zero_masked


def hidden_total(
    student: Tensor,
    teacher: Tensor,
    projection: Tensor | None,
    bias: Tensor | None,
    *,
    weights: Tensor,
    mask: Tensor | None,
    divergence: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return the sum over tokens, before any division. weights: (B, N), 0 where masked."""
    projected = zero_masked(student.to(dtype), mask)
    target = zero_masked(teacher.detach().to(dtype), mask)
    if projection is not None:
        projected = torch.nn.functional.linear(
            projected, projection.to(dtype), None if bias is None else bias.to(dtype)
        )
    if divergence == "mse":
        return (weights * (projected - target).square().sum(-1)).sum()
    cosine = (unit_vectors(projected)[0] * unit_vectors(target)[0]).sum(-1)
    return (weights * (1 - cosine)).sum()
