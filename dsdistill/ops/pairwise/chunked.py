"""Compute pairwise alignment in plain PyTorch: a block of rows at a time, or by the identity.

The identity is the equation in `_by_identity`, which needs no N×N matrix. The relation matrices are symmetric, so a
block of rows gives its tokens' whole gradient. With Δ = R_S − R_T and rows u (x itself for dot, x/‖x‖ for cosine):
du_i = 4 Σ_j w_i w_j Δ_ij u_j.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsdistill.ops import gpu
from dsdistill.ops.common import blocks, unit_vectors, unit_vectors_backward, zero_masked

# Elements of one block of one relation matrix on a CPU: 8 MiB in float32.
BLOCK_ELEMENTS = 1 << 21
MAX_ROWS, MIN_ROWS, GPU_MAX_ROWS = 256, 16, 2048

# Squared distances below this share of ‖x‖² + ‖y‖² are computed from the differences x − y.
CLOSE = 1 / 64
# In float64 a squared distance of at most this share of ‖x‖² + ‖y‖² counts as 0: for equal vectors, rounding leaves a
# share of at most D · 2⁻⁵³.
NOTHING = 2.0**-40

# A product costs 2·N·D² in the identity and N²·D by rows, so the identity is cheaper from about N = 2.5 D on.
IDENTITY_TOKENS_PER_FEATURE = 2.5


def pairwise_total(
    needs: Sequence[bool],
    student: Tensor,
    teacher: Tensor,
    *,
    weights: Tensor,
    mask: Tensor | None,
    relation: str,
    dtype: torch.dtype,
) -> tuple[Tensor, tuple[Tensor | None]]:
    """Return the sum of `reference.pairwise_total`, and its gradient at the student if needed."""
    identity = use_identity(student.shape[1], student.shape[2], teacher.shape[2])
    if relation != "distance" and not identity and gpu.half_operands(student) and gpu.half_operands(teacher):
        halves = zero_masked(student.detach(), mask), zero_masked(teacher.detach(), mask)
        return _by_rows_in_half(needs[0], *halves, weights, relation)
    x_s = zero_masked(student.detach().to(dtype), mask)
    x_t = zero_masked(teacher.detach().to(dtype), mask)
    if relation == "distance":
        x_s, x_t = centred(x_s, mask), centred(x_t, mask)
        return _distance(needs[0], x_s, x_t, weights, mask)

    rows_s, rows_t = x_s, x_t
    inverse: Tensor | None = None
    if relation == "cosine":
        rows_s, inverse = unit_vectors(x_s)
        rows_t, _ = unit_vectors(x_t)
    by = _by_identity if identity else _by_rows
    total, gradient = by(needs[0], rows_s, rows_t, weights)
    if gradient is not None and inverse is not None:
        gradient = unit_vectors_backward(gradient, rows_s, inverse)
    return total, (gradient,)


def use_identity(tokens: int, student_width: int, teacher_width: int) -> bool:
    return tokens >= IDENTITY_TOKENS_PER_FEATURE * max(student_width, teacher_width)


def _by_identity(with_gradient: bool, rows_s: Tensor, rows_t: Tensor, weights: Tensor):
    """Use ‖U_S U_Sᵀ − U_T U_Tᵀ‖² = ‖U_SᵀU_S‖² − 2‖U_TᵀU_S‖² + ‖U_TᵀU_T‖², with rows scaled by √w.

    When the models agree, the terms of the value cancel, so it is clamped at 0. Those of the gradient do not cancel.
    """
    root = weights.sqrt()[..., None]
    u_s, u_t = rows_s * root, rows_t * root
    gram_ss, gram_ts = u_s.transpose(-1, -2) @ u_s, u_t.transpose(-1, -2) @ u_s
    own, cross = gram_ss.square().sum((1, 2)), gram_ts.square().sum((1, 2))
    teacher = (u_t.transpose(-1, -2) @ u_t).square().sum((1, 2))
    total = ((own - cross) + (teacher - cross)).clamp_min(0).sum()
    if not with_gradient:
        return total, None
    return total, (u_s @ gram_ss).sub_(u_t @ gram_ts).mul_(4 * root)


def _blocks(x: Tensor):
    """Yield (sequences, rows) slices of (B, N, …) whose relation blocks hold about BLOCK_ELEMENTS."""
    batch, tokens = x.shape[:2]
    elements, most = gpu.block_elements(x, BLOCK_ELEMENTS), GPU_MAX_ROWS if x.is_cuda else MAX_ROWS
    rows = min(tokens, max(MIN_ROWS, min(most, elements // max(1, tokens))))
    group = max(1, elements // max(1, rows * tokens))
    for first in blocks(range(0, batch, group)):
        for start in blocks(range(0, tokens, rows)):
            yield slice(first, min(first + group, batch)), slice(start, min(start + rows, tokens))


def _by_rows(with_gradient: bool, rows_s: Tensor, rows_t: Tensor, weights: Tensor):
    total = rows_s.new_zeros(())
    gradient = torch.empty_like(rows_s) if with_gradient else None
    for batch, rows in _blocks(weights):
        difference = rows_s[batch, rows] @ rows_s[batch].transpose(-1, -2)
        difference.sub_(rows_t[batch, rows] @ rows_t[batch].transpose(-1, -2))
        pair_weights = weights[batch, rows, None] * weights[batch, None, :]
        weighted = pair_weights.mul_(difference)
        total += torch.dot(weighted.flatten(), difference.flatten())
        if gradient is not None:
            gradient[batch, rows] = (weighted @ rows_s[batch]).mul_(4)
    return total, gradient


def _by_rows_in_half(with_gradient: bool, x_s: Tensor, x_t: Tensor, weights: Tensor, relation: str):
    """Return what `_by_rows` returns, but with the gradient at x_s itself. Products of inputs are divided by the norms.

    Unit vectors in half precision would add their rounding error to every cosine.
    """
    scales: list[Tensor] = []
    if relation == "cosine":
        norms = [torch.linalg.vector_norm(x, dim=-1, dtype=weights.dtype) for x in (x_s, x_t)]
        scales = [unit_vectors(norm[..., None])[1] for norm in norms]
    total = weights.new_zeros(())
    gradient = torch.empty(x_s.shape, dtype=weights.dtype, device=x_s.device) if with_gradient else None
    for batch, rows in _blocks(weights):
        grams = [gpu.product(x[batch, rows], x[batch].transpose(-1, -2)) for x in (x_s, x_t)]
        for gram, scale in zip(grams, scales, strict=False):  # none for dot
            gram.mul_(scale[batch, rows]).mul_(scale[batch].transpose(-1, -2))
        difference = grams[0].sub_(grams[1])
        weighted = weights[batch, rows, None] * weights[batch, None, :]
        weighted.mul_(difference)
        total += torch.dot(weighted.flatten(), difference.flatten())
        if gradient is None:
            continue
        if scales:
            weighted.mul_(scales[0][batch].transpose(-1, -2))
        weighted = weighted.to(gpu.product_dtype(x_s))
        gradient[batch, rows] = gpu.product(weighted, x_s[batch]).mul_(4)
    if gradient is not None and scales:
        gradient = unit_vectors_backward(gradient, x_s * scales[0], scales[0])
    return total, (gradient,)


def _distance(with_gradient: bool, x_s: Tensor, x_t: Tensor, weights: Tensor, mask: Tensor | None):
    """Return the "distance" loss (RKD-D) of centred vectors, and its gradient if asked for.

    With d the student's distances, μ their mean over the P positive ones, ℓ' the slope and A = Σ w_i w_j ℓ' d:
    ∂L/∂d_ij = w_i w_j ℓ'_ij / μ − A / (μ² P), and dx_i = 2 Σ_j ∂L/∂d_ij (x_i − x_j)/d_ij.
    """
    squares_s, squares_t = (_squares(x) for x in (x_s, x_t))
    mean_s, positive = _mean_positive(x_s, squares_s, mask)
    mean_t, _ = _mean_positive(x_t, squares_t, mask)
    total = x_s.new_zeros(())
    slope_term = torch.empty_like(x_s) if with_gradient else None
    direction_term = torch.empty_like(x_s) if with_gradient else None
    slope_sum = torch.zeros_like(mean_s)
    for batch, rows in _blocks(weights):
        distance = _distances(x_s, squares_s, mask, batch, rows)
        difference = (distance / mean_s[batch]).sub_(
            _distances(x_t, squares_t, mask, batch, rows).div_(mean_t[batch])
        )
        slope = difference.clamp(-1, 1)
        pair_weights = weights[batch, rows, None] * weights[batch, None, :]
        # Smooth-L1 with β = 1 is ℓ' (Δ − ℓ'/2) for the clamped slope ℓ'.
        total += (pair_weights * slope * difference.sub_(slope / 2)).sum()
        if slope_term is None or direction_term is None:
            continue
        slope.mul_(pair_weights)
        slope_sum[batch] += (slope * distance).sum((1, 2), keepdim=True)
        inverse = torch.where(distance > 0, 1 / distance, 0)
        for term, pull in ((slope_term, slope.mul_(inverse)), (direction_term, inverse)):
            term[batch, rows] = pull.sum(-1, keepdim=True) * x_s[batch, rows] - pull @ x_s[batch]
    if slope_term is None or direction_term is None:
        return total, (None,)
    gradient = (
        slope_term.div_(mean_s).sub_(direction_term.mul_(slope_sum / (mean_s.square() * positive))).mul_(2)
    )
    return total, (gradient,)


def centred(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return `x` minus the mean of its valid tokens; masked tokens stay 0. Distances stay the same; less cancels."""
    if mask is None:
        return x - x.mean(1, keepdim=True)
    count = mask.sum(1).clamp(min=1)[:, None, None]
    return (x - x.sum(1, keepdim=True) / count).masked_fill(~mask[..., None], 0)


def _squares(x: Tensor) -> Tensor:
    """Return (B, N) squared norms in the type in which `_distances` subtracts."""
    if x.is_cuda:
        return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64).square()
    return x.square().sum(-1)


def _distances(x: Tensor, squares: Tensor, mask: Tensor | None, batch: slice, rows: slice) -> Tensor:
    """Return the distances of a block, (b, R, N), from centred x and its squared norms (B, N).

    They are computed as ‖x‖² + ‖y‖² − 2xy. For pairs where this cancels, they are computed from x − y instead. On a GPU
    finding those pairs would wait for the device, so the products are in float64 there: A100 and H100 multiply float64
    as fast as float32.
    """
    left, right = x[batch, rows], x[batch]
    size = squares[batch, rows, None] + squares[batch, None, :]
    if x.is_cuda:
        distance = torch.baddbmm(size.double(), left.double(), right.double().transpose(-1, -2), alpha=-2)
        distance = torch.where(distance > NOTHING * size, distance, 0).sqrt_().to(x.dtype)
        distance.diagonal(rows.start, 1, 2).zero_()
    else:
        distance = torch.baddbmm(size, left, right.transpose(-1, -2), alpha=-2)
        close = distance < CLOSE * size
        close.diagonal(rows.start, 1, 2).fill_(False)
        where, i, j = close.nonzero(as_tuple=True)
        if where.numel() * x.shape[2] > BLOCK_ELEMENTS:
            distance = torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")
        else:
            distance[where, i, j] = (left[where, i] - right[where, j]).square().sum(-1)
            distance.diagonal(rows.start, 1, 2).zero_()
            distance.sqrt_()
    if mask is not None:
        distance.masked_fill_(~(mask[batch, rows, None] & mask[batch, None, :]), 0)
    return distance


def _mean_positive(x: Tensor, squares: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return each sequence's mean positive distance (1 if none is) and their number (at least 1), (B, 1, 1) each."""
    total = x.new_zeros(x.shape[0], 1, 1)
    positive = torch.zeros_like(total)
    for batch, rows in _blocks(x):
        distance = _distances(x, squares, mask, batch, rows)
        total[batch] += distance.sum((1, 2), keepdim=True)
        positive[batch] += (distance > 0).sum((1, 2), keepdim=True)
    return torch.where(positive > 0, total / positive.clamp(min=1), 1), positive.clamp(min=1)
