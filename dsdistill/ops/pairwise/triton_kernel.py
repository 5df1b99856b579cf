"""Compute pairwise alignment by tiles of both relation matrices: loss, and the coefficients of the gradient.

R of a tile: (rows i, columns j). The formulas are those of `chunked.py`:
  cosine, dot  Δ = R_S − R_T, loss Σ w_i w_j Δ², coefficient w_i w_j Δ_ij / ‖x_j‖ (dot: without the norm)
  distance     d of both models over their means μ, ℓ' = clamp(Δ), loss Σ w_i w_j ℓ' (Δ − ℓ'/2),
               coefficient (w_i w_j ℓ'_ij / μ_S − A / (μ_S² P)) / d_S,ij
Only a block of rows of coefficients is stored. A matrix product turns it into the gradient.
"""

import triton
import triton.language as tl

from dsdistill.ops.triton_common import narrow

# Squared distances below this share of ‖x‖² + ‖y‖² are computed from the differences x − y.
CLOSE = tl.constexpr(1 / 64)


@triton.jit
def gram(
    x,
    rows,
    columns,
    stride,
    N,
    D: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the products of rows and columns of one sequence, (BR, BC)."""
    total = tl.zeros([BR, BC], tl.float32)
    features = tl.arange(0, BK)
    left = x + rows.to(tl.int64)[:, None] * stride + features[None, :]
    right = x + columns.to(tl.int64)[:, None] * stride + features[None, :]
    for start in range(0, D, BK):
        inside = (features < D - start)[None, :]
        a = tl.load(left + start, mask=(rows < N)[:, None] & inside, other=0.0)
        b = tl.load(right + start, mask=(columns < N)[:, None] & inside, other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return total


@triton.jit
def distances(
    x,  # centred, float32
    squares,
    first,  # of the rows
    rows,
    columns,
    exists,
    stride,
    N,
    D: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return (BR, BC) distances, 0 where no pair exists: from ‖x‖² + ‖y‖² − 2xy, or from x − y where that cancels.

    The products use TF32 in three parts, which is nearly float32. Differences run on plain cores, so they are computed
    only for rows in which a pair is close. If two texts share no token, no row needs them.
    """
    size = tl.load(squares + rows, mask=rows < N, other=0.0)[:, None]
    size += tl.load(squares + columns, mask=columns < N, other=0.0)[None, :]
    square = size - 2.0 * gram(x, rows, columns, stride, N, D, BR, BC, BK, UPCAST, "tf32x3")
    close = (square < size * CLOSE) & exists
    pending = tl.max(close.to(tl.int32), 1)
    features = tl.arange(0, BK)
    right = x + columns.to(tl.int64)[:, None] * stride + features[None, :]
    if tl.max(pending) > 0:
        for place in range(0, BR):
            row = first + place
            own = rows == row
            if tl.max(tl.where(own, pending, 0)) > 0:
                left = x + row.to(tl.int64) * stride + features
                exact = tl.zeros([BC], tl.float32)
                for start in range(0, D, BK):
                    inside = features < D - start
                    a = tl.load(left + start, mask=inside, other=0.0)
                    b = tl.load(right + start, mask=(columns < N)[:, None] & inside[None, :], other=0.0)
                    difference = a[None, :] - b
                    exact += tl.sum(difference * difference, 1)
                square = tl.where(own[:, None] & close, exact[None, :], square)
    return tl.where(exists, tl.sqrt(tl.maximum(square, 0.0)), 0.0)


@triton.jit
def relation_kernel(
    student,  # (B, N, D_S), and the teacher's (B, N, D_T); masked tokens are 0. For distance: centred, in float32
    teacher,
    valid,  # (B, N) int8, only with MASKED
    weights,  # (B, N) float32, 0 where masked
    sizes_s,  # (B, N) float32: 1/‖x‖ for cosine, ‖x‖² for distance
    sizes_t,
    means,  # (B, 3) float32 of distance: 1/μ_S, 1/μ_T, A / (μ_S² P)
    partial,  # (B, blocks of rows, blocks of columns, 4) float32
    coefficients,  # (B, rows of the panel, N)
    s_b,
    s_n,
    t_b,
    t_n,
    N,
    first_row,  # of the panel
    panel_rows,
    DS: tl.constexpr,
    DT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    RELATION: tl.constexpr,  # 0 cosine, 1 dot, 2 distance
    STAGE: tl.constexpr,  # 0: sums for the means (distance), 1: loss, 2: coefficients, 3: both
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row_blocks, column_blocks = tl.cdiv(panel_rows, BR), tl.cdiv(N, BC)
    program = tl.program_id(0)
    column_block = program % column_blocks
    row_block = program // column_blocks % row_blocks
    b = (program // (column_blocks * row_blocks)).to(tl.int64)
    local = row_block * BR + tl.arange(0, BR)
    first = first_row + row_block * BR
    rows = first_row + local
    rows_inside = (local < panel_rows) & (rows < N)
    columns = column_block * BC + tl.arange(0, BC)
    columns_inside = columns < N
    student += b * s_b
    teacher += b * t_b
    sizes_s += b * N
    sizes_t += b * N
    weights += b * N
    exists = rows_inside[:, None] & columns_inside[None, :]
    if RELATION == 2:  # a token's distance to itself is 0 and is not a pair
        exists = exists & (rows[:, None] != columns[None, :])
    if MASKED:
        row_valid = tl.load(valid + b * N + rows, mask=rows_inside, other=0)
        column_valid = tl.load(valid + b * N + columns, mask=columns_inside, other=0)
        exists = exists & (row_valid > 0)[:, None] & (column_valid > 0)[None, :]
    pair_weights = tl.load(weights + rows, mask=rows_inside, other=0.0)[:, None]
    pair_weights *= tl.load(weights + columns, mask=columns_inside, other=0.0)[None, :]
    partial += (b * row_blocks * column_blocks + row_block * column_blocks + column_block) * 4

    if RELATION == 2:
        d_t = distances(teacher, sizes_t, first, rows, columns, exists, t_n, N, DT, BR, BC, BK, UPCAST)
        d_s = distances(student, sizes_s, first, rows, columns, exists, s_n, N, DS, BR, BC, BK, UPCAST)
        if STAGE == 0:
            tl.store(partial, tl.sum(d_s))
            tl.store(partial + 1, tl.sum(d_t))
            tl.store(partial + 2, tl.sum((d_s > 0).to(tl.float32)))
            tl.store(partial + 3, tl.sum((d_t > 0).to(tl.float32)))
        else:
            inverse_s = tl.load(means + b * 3)
            difference = d_s * inverse_s - d_t * tl.load(means + b * 3 + 1)
            slope = tl.minimum(tl.maximum(difference, -1.0), 1.0)
            # Smooth-L1 with β = 1 is ℓ' (Δ − ℓ'/2) for the clamped slope ℓ'.
            if STAGE == 1:
                tl.store(partial, tl.sum(pair_weights * slope * (difference - slope / 2)))
                tl.store(partial + 1, tl.sum(pair_weights * slope * d_s))
            else:
                pull = pair_weights * slope * inverse_s - tl.load(means + b * 3 + 2)
                coefficient = tl.where(d_s > 0, pull / tl.where(d_s > 0, d_s, 1.0), 0.0)
    else:
        difference = gram(student, rows, columns, s_n, N, DS, BR, BC, BK, UPCAST, "ieee")
        other = gram(teacher, rows, columns, t_n, N, DT, BR, BC, BK, UPCAST, "ieee")
        scale = tl.full([BC], 1.0, tl.float32)
        if RELATION == 0:
            scale = tl.load(sizes_s + columns, mask=columns_inside, other=0.0)
            difference *= tl.load(sizes_s + rows, mask=rows_inside, other=0.0)[:, None] * scale[None, :]
            other *= (
                tl.load(sizes_t + rows, mask=rows_inside, other=0.0)[:, None]
                * tl.load(sizes_t + columns, mask=columns_inside, other=0.0)[None, :]
            )
        difference -= other
        weighted = pair_weights * difference
        if STAGE != 2:
            tl.store(partial, tl.sum(weighted * difference))
        coefficient = weighted * scale[None, :]
    if STAGE >= 2:
        address = coefficients + (b * panel_rows + local.to(tl.int64))[:, None] * N + columns[None, :]
        inside = rows_inside[:, None] & columns_inside[None, :]
        tl.store(address, narrow(coefficient, coefficients.dtype.element_ty, UPCAST), mask=inside)
