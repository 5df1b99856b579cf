"""Define pairwise alignment in plain PyTorch, with whole N×N relation matrices, for any floating dtype.

Per sequence, with relation matrices R_S and R_T and token weights w (0 where masked):
  cosine, dot   Σ_ij w_i w_j (R_S − R_T)²_ij
  distance      Σ_ij w_i w_j ℓ((R_S − R_T)_ij), R = ‖x_i − x_j‖ ÷ its mean over positive entries,
                ℓ = smooth-L1 with β = 1                       RKD-D, Park et al. 2019, Eq. 6–8
With `rows`, i runs only over these rows, each multiplied by its weight, and j over all tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsdistill.ops.common import unit_vectors, zero_masked


def distances(x_BND: Tensor, mask: Tensor | None) -> Tensor:
    """Return (B, N, N) Euclidean distances by subtraction, divided by the mean of their sequence's positive ones."""
    distance = torch.cdist(x_BND, x_BND, compute_mode="donot_use_mm_for_euclid_dist")
    if mask is not None:
        distance = distance.masked_fill(~(mask[:, :, None] & mask[:, None, :]), 0)
    positive = (distance > 0).sum((1, 2), keepdim=True)
    total = distance.sum((1, 2), keepdim=True)
    mean = torch.where(positive > 0, total / positive.clamp(min=1), 1)
    return distance / mean


def relations(x_BND: Tensor, mask: Tensor | None, relation: str) -> Tensor:
    """Return the relation matrix of one model, (B, N, N)."""
    x_BND = zero_masked(x_BND, mask)
    if relation == "distance":
        return distances(x_BND, mask)
    if relation == "cosine":
        x_BND, _ = unit_vectors(x_BND)
    return x_BND @ x_BND.transpose(-1, -2)


def pairwise_total(
    student: Tensor,
    teacher: Tensor,
    *,
    weights: Tensor,
    mask: Tensor | None,
    relation: str,
    dtype: torch.dtype,
    rows: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the sum over sequences, before any division. weights: (B, N), 0 where masked.

    rows: (B, R) positions and (B, R) weights, 0 where a position is −1 or masked; not for "distance".
    """
    relation_s = relations(student.to(dtype), mask, relation)
    relation_t = relations(teacher.detach().to(dtype), mask, relation)
    pair_weights = weights[:, :, None] * weights[:, None, :]
    if relation == "distance":
        return (pair_weights * F.smooth_l1_loss(relation_s, relation_t, reduction="none")).sum()
    totals = (pair_weights * (relation_s - relation_t).square()).sum(2)
    return totals.sum() if rows is None else (totals.gather(1, rows[0].clamp(min=0)) * rows[1]).sum()
