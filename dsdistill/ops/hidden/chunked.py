"""Compute hidden-state alignment in plain PyTorch, a block of tokens at a time, with gradients in the same pass.

With g = ∂L/∂y of the projected student y = W h + b: dh = g W, dW = Σ_t g hᵀ, db = Σ_t g.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsdistill.ops import gpu
from dsdistill.ops.common import blocks, inverse_norms

# Elements of one block of the projected student on a CPU: 4 MiB in float32. Smaller blocks make its products slower.
BLOCK_ELEMENTS = 1 << 20
MIN_TOKENS = 512  # smaller blocks would read and write the projection's gradient too often


def hidden_total(
    needs: Sequence[bool],
    student: Tensor,
    teacher: Tensor,
    projection: Tensor | None,
    bias: Tensor | None,
    *,
    weights: Tensor,
    mask: Tensor | None,
    divergence: str,
    dtype: torch.dtype,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Return the sum of `reference.hidden_total`, and its gradients at student, projection and bias if needed."""
    x = student.detach().flatten(0, 1)
    target = teacher.detach().flatten(0, 1)
    weights = weights.flatten()
    masked = None if mask is None else ~mask.flatten()[:, None]
    matrix = None if projection is None else projection.detach()
    half = matrix is not None and gpu.half_operands(x, matrix)
    if matrix is not None and not half:
        matrix = matrix.to(dtype)
    offset = None if bias is None else bias.detach().to(dtype)

    total = weights.new_zeros(())
    d_student = torch.empty(x.shape, dtype=dtype, device=x.device) if needs[0] else None
    d_projection = None
    d_bias = torch.zeros_like(offset) if offset is not None and needs[2] else None
    step = max(MIN_TOKENS, gpu.block_elements(x, BLOCK_ELEMENTS) // max(1, target.shape[1]))
    for start in blocks(range(0, x.shape[0], step)):
        rows = slice(start, start + step)
        hidden, wanted = x[rows] if half else x[rows].to(dtype), target[rows].to(dtype)
        if masked is not None:
            hidden, wanted = hidden.masked_fill(masked[rows], 0), wanted.masked_fill(masked[rows], 0)
        # A block of its own, in which its gradient is computed.
        projected = hidden.clone() if matrix is None else _projected(hidden, matrix, offset, half)
        value, gradient = _divergence(projected, wanted, weights[rows], divergence, any(needs))
        total += value
        if d_bias is not None:
            d_bias += gradient.sum(0)
        if matrix is not None and gradient is not None:
            gradient = gradient.to(gpu.product_dtype(matrix) if half else dtype)
        if d_student is not None and matrix is not None and not half:
            torch.mm(gradient, matrix, out=d_student[rows])
        elif d_student is not None:
            d_student[rows] = gradient if matrix is None else gpu.product(gradient, matrix)
        if matrix is not None and needs[1]:
            if half:
                part = gpu.product(gradient.t(), hidden)
                d_projection = part if d_projection is None else d_projection.add_(part)
            elif d_projection is None:
                d_projection = gradient.t() @ hidden
            else:
                d_projection.addmm_(gradient.t(), hidden)
    if matrix is not None and needs[1] and d_projection is None:  # there were no tokens
        d_projection = torch.zeros(matrix.shape, dtype=dtype, device=x.device)
    return total, (None if d_student is None else d_student.view(student.shape), d_projection, d_bias)


def _projected(hidden: Tensor, matrix: Tensor, offset: Tensor | None, half: bool) -> Tensor:
    if not half:
        return torch.nn.functional.linear(hidden, matrix, offset)
    y = gpu.product(hidden, matrix.t())
    return y if offset is None else y.add_(offset)


def _divergence(projected: Tensor, wanted: Tensor, weights: Tensor, divergence: str, with_gradient: bool):
    """Return the sum over a block of tokens, and its gradient at `projected`, in the memory of `projected`.

    weights: (tokens,). The gradient is None if it is not asked for.
    """
    if divergence == "mse":
        difference = projected.sub_(wanted)
        value = torch.dot(weights, torch.linalg.vecdot(difference, difference))
        return value, difference.mul_((2 * weights)[:, None]) if with_gradient else None
    lengths = inverse_norms(projected)
    others = inverse_norms(wanted)
    unit = projected.mul_(lengths[:, None])
    cosine = torch.linalg.vecdot(unit, wanted) * others
    value = torch.dot(weights, 1 - cosine)
    if not with_gradient:
        return value, None
    # With units u of y and v of t, the gradient at y is w (cos u − v) / ‖y‖.
    factor = weights * lengths
    return value, unit.mul_((factor * cosine)[:, None]).addcmul_(wanted, (factor * others)[:, None], value=-1)
