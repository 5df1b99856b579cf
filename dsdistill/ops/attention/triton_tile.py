"""Share code between the Triton kernels of attention alignment: tiles of queries and keys, scores, which pairs exist.

A tile in which every pair exists is WHOLE: it tests no conditions, and loads nothing that only conditions need.

Scores of kl and mse are in units of log 2 (the scale includes the factor log₂e), so that a probability is one exp2.
R: rows (queries) of a tile, C: columns (keys). Addresses are int64 before any stride is multiplied.
"""

import triton
import triton.language as tl

from dsdistill.ops.attention import native
from dsdistill.ops.triton_common import narrow, rounded_to_tf32

KL = tl.constexpr(native.KL)
MSE = tl.constexpr(native.MSE)
SCORE_MSE = tl.constexpr(native.SCORE_MSE)
LN2 = tl.constexpr(0.6931471805599453)
# The start of a running maximum. It is finite so that its difference to itself is 0, not NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def load_tile(ptr, rows, inside, stride, D: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr):
    """Load rows of a matrix, (R, BD); 0 where not `inside` and beyond D.

    UPCAST: convert to float32, for the interpreter, whose products of bfloat16 tiles are wrong.
    """
    columns = tl.arange(0, BD)
    wanted = inside[:, None]
    if D != BD:
        wanted = wanted & (columns < D)[None, :]
    x = tl.load(ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=wanted, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def load_block(
    ptr,
    start,
    inside,
    stride,
    R: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Load rows of a matrix from `start` on, (R, BD); 0 where not `inside` and beyond D. WHOLE: all rows are inside.

    `start` moves the pointer, so that a loop adds to addresses instead of computing them anew; R · stride < 2³¹.
    """
    columns = tl.arange(0, BD)
    address = ptr + tl.cast(start, tl.int64) * stride
    address += tl.arange(0, R)[:, None] * stride + columns[None, :]
    if WHOLE and D == BD:
        x = tl.load(address)
    elif WHOLE:
        x = tl.load(address, mask=(columns < D)[None, :], other=0.0)
    elif D == BD:
        x = tl.load(address, mask=inside[:, None], other=0.0)
    else:
        x = tl.load(address, mask=inside[:, None] & (columns < D)[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def store_tile(ptr, rows, inside, stride, x, D: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr):
    columns = tl.arange(0, BD)
    wanted = inside[:, None]
    if D != BD:
        wanted = wanted & (columns < D)[None, :]
    address = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(address, narrow(x, ptr.dtype.element_ty, UPCAST), mask=wanted)


@triton.jit
def add_tile(ptr, rows, inside, stride, x, D: tl.constexpr, BD: tl.constexpr):
    """Add atomically: the order, and therefore the last bits, change from run to run."""
    columns = tl.arange(0, BD)
    wanted = inside[:, None]
    if D != BD:
        wanted = wanted & (columns < D)[None, :]
    tl.atomic_add(ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], x, mask=wanted, sem="relaxed")


@triton.jit
def load_labels(ptr, positions, N, MASKED: tl.constexpr, LABELLED: tl.constexpr):
    """Load the tokens' labels, and whether they are valid. Without labels, return the positions, never compared."""
    inside = positions < N
    labels = positions
    if LABELLED:
        labels = tl.load(ptr + positions, mask=inside, other=MASKED)
        inside = labels != MASKED
    return labels, inside


@triton.jit
def load_places(places, weights, at, R, N, CHOSEN: tl.constexpr):
    """Load the positions of queries number `at`, N where there is none, and their weights. Not CHOSEN: `at`, and 1."""
    rows, counted = at, 1.0
    if CHOSEN:
        rows = tl.load(places + at, mask=at < R, other=N)
        counted = tl.load(weights + at, mask=at < R, other=0.0)
    return rows, counted


@triton.jit
def exists(
    rows,
    columns,
    row_labels,
    column_labels,
    rows_inside,
    columns_inside,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    LABELLED: tl.constexpr,
):
    """Return which pairs of a tile exist. One side is given as (·, 1) and the other as (1, ·), in either order."""
    present = rows_inside & columns_inside
    if CAUSAL:
        present = present & (rows >= columns)
    if WINDOWED:
        present = present & (rows - columns < window) & (columns - rows < window)
    if LABELLED:
        present = present & (row_labels == column_labels)
    return present


@triton.jit
def gradient_product(d_scores, x, TYPE: tl.constexpr, UPCAST: tl.constexpr, accumulator):
    """Return accumulator + d_scores @ x, float32. TYPE: element type of `x` in memory.

    For bfloat16, d_scores is rounded to it. float16 cannot hold small products of probabilities, so d_scores is rounded
    to TF32, which holds them and every float16 exactly. For float32 the product has full precision.
    """
    if tl.float16 == TYPE:
        return tl.dot(rounded_to_tf32(d_scores), x.to(tl.float32), accumulator, input_precision="tf32")
    return tl.dot(narrow(d_scores, TYPE, UPCAST), x, accumulator, input_precision="ieee")


@triton.jit
def keys_of(start, stop, N, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BC: tl.constexpr):
    """Return the first (a multiple of BC) and last key that the queries start … stop − 1 can see."""
    first, last = 0, N
    if CAUSAL:
        last = tl.minimum(stop, N)
    if WINDOWED:
        first = tl.maximum(start - window + 1, 0) // BC * BC
        last = tl.minimum(last, stop + window - 1)
    return first, last


@triton.jit
def queries_of(start, stop, N, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BR: tl.constexpr):
    """Return the first (a multiple of BR) and last query that can see the keys start … stop − 1."""
    first, last = 0, N
    if WINDOWED:
        first = tl.maximum(start - window + 1, 0) // BR * BR
        last = tl.minimum(N, stop + window - 1)
    if CAUSAL:
        first = start // BR * BR
    return first, last


@triton.jit
def spans(
    starts,
    ends,
    start,
    N,
    window,
    R: tl.constexpr,
    B: tl.constexpr,
    QUERIES: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    LABELLED: tl.constexpr,
):
    """Return what a program that owns positions start … start + R − 1 walks in tiles of B: first, inner, outer, last.

    From first (a multiple of B) to last lie all positions that form a pair with any owned position. From inner to outer
    (multiples of B) lie those that form a pair with every owned position, so that their tiles need no conditions.
    starts, ends: (N,), the sequence's part of what `triton_schedule.reach` returns. QUERIES: the program owns queries
    and walks keys; otherwise it owns keys and walks queries.
    """
    stop = start + R
    inner, outer = 0, N // B * B
    if QUERIES:
        first, last = keys_of(start, stop, N, window, CAUSAL, WINDOWED, B)
    else:
        first, last = queries_of(start, stop, N, window, CAUSAL, WINDOWED, B)
    if WINDOWED:
        inner = tl.cdiv(tl.maximum(stop - window, 0), B) * B
        outer = tl.minimum(outer, (start + window) // B * B)
    if CAUSAL and QUERIES:
        outer = tl.minimum(outer, (start + 1) // B * B)
    if CAUSAL and not QUERIES:
        inner = tl.maximum(inner, tl.cdiv(stop - 1, B) * B)
    whole = stop <= N
    if LABELLED:
        owned = start + tl.arange(0, R)
        begins = tl.load(starts + owned, mask=owned < N, other=N)  # masked tokens begin at N and end at 0
        finishes = tl.load(ends + owned, mask=owned < N, other=0)
        broken = begins < 0
        begins = tl.where(broken, -1 - begins, begins)
        lowest, highest = tl.min(begins, 0), tl.max(finishes, 0)
        first = tl.maximum(first, lowest // B * B)
        last = tl.minimum(last, highest)
        # All owned positions belong to one unbroken run of tokens with one label.
        whole = whole & (lowest == tl.max(begins, 0)) & (highest == tl.min(finishes, 0))
        whole = whole & (tl.max(broken.to(tl.int32), 0) == 0)
        inner = tl.maximum(inner, tl.cdiv(lowest, B) * B)
        outer = tl.minimum(outer, highest // B * B)
    some = whole & (inner < outer)
    inner = tl.where(some, inner, first)
    outer = tl.where(some, outer, first)
    return first, inner, outer, last


@triton.jit
def chosen_spans(
    rows, N, window, BC: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, LABELLED: tl.constexpr
):
    """Return what `spans` returns, for queries at any positions (N: no query). With conditions no tile is whole."""
    stop = tl.max(tl.where(rows < N, rows, -1), 0) + 1
    first, last = keys_of(tl.min(rows, 0), stop, N, window, CAUSAL, WINDOWED, BC)
    outer = first
    if not CAUSAL and not WINDOWED and not LABELLED:
        outer = N // BC * BC
    return first, first, outer, last


@triton.jit
def edges(part: tl.constexpr, first, inner, outer, last):
    """Return the range of a part of a walk: 0, the tiles before the whole ones; 1, the whole ones; 2, those after."""
    if part == 0:
        return first, inner
    if part == 1:
        return inner, outer
    return outer, last


@triton.jit
def loss_and_slope(
    s, t, m_s, m_t, log_s, log_t, r, present, DIVERGENCE: tl.constexpr, WHOLE: tl.constexpr = False
):
    """Return each entry's loss and its gradient at the student's scores S, for kl and mse in nats:

    kl         P_T (log P_T − log P_S),  P_S − P_T
    mse        (P_S − P_T)²,             2 P_S (P_S − P_T − r), r = Σ_j P_S (P_S − P_T)
    score_mse  (S_S − S_T)²,             2 (S_S − S_T)
    m: the row's largest score. log: log₂ Σ exp2(score − m). m + log is the LSE. kl gets this sum as m alone; mse gets
    both, because the rounding of the sum shows where attention is peaked. r: as above. All broadcast along the rows.
    Entries that do not exist give 0; WHOLE: all exist.
    """
    if DIVERGENCE == SCORE_MSE:
        difference = s - t
        if not WHOLE:
            difference = tl.where(present, difference, 0.0)
        return difference * difference, 2.0 * difference
    s, t = s - m_s, t - m_t
    if DIVERGENCE == MSE:
        s, t = s - log_s, t - log_t
    p_s, p_t = tl.exp2(s), tl.exp2(t)
    if not WHOLE:
        p_s, p_t = tl.where(present, p_s, 0.0), tl.where(present, p_t, 0.0)
    difference = p_s - p_t
    if DIVERGENCE == MSE:
        return difference * difference, 2.0 * p_s * (difference - r)
    loss = p_t * (t - s)
    if not WHOLE:
        loss = tl.where(present, loss, 0.0)
    return loss * LN2, difference
