"""What the Triton kernels of attention alignment share: tiles of queries and keys, scores, which pairs exist.

Scores of kl and mse are in units of log 2 (scale · log₂e is folded into the factor), so that a probability is one
exp2. R: rows (queries) of a tile, C: columns (keys). Addresses are int64 before any stride is multiplied.
"""

import triton
import triton.language as tl

from dsdistill.ops.attention import native
from dsdistill.ops.triton_common import narrow, rounded_to_tf32

KL = tl.constexpr(native.KL)
MSE = tl.constexpr(native.MSE)
SCORE_MSE = tl.constexpr(native.SCORE_MSE)
LN2 = tl.constexpr(0.6931471805599453)
# Where a running maximum starts. Finite: its difference to itself is 0, not NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def load_tile(ptr, rows, inside, stride, D: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr):
    """(R, BD) rows of a matrix; 0 where not `inside` and beyond D.

    UPCAST: to float32, for the interpreter, whose products of bfloat16 tiles are wrong.
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
def store_tile(ptr, rows, inside, stride, x, D: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr):
    columns = tl.arange(0, BD)
    wanted = inside[:, None]
    if D != BD:
        wanted = wanted & (columns < D)[None, :]
    address = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(address, narrow(x, ptr.dtype.element_ty, UPCAST), mask=wanted)


@triton.jit
def add_tile(ptr, rows, inside, stride, x, D: tl.constexpr, BD: tl.constexpr):
    """Adds atomically: the order, and so the last bits, change from run to run."""
    columns = tl.arange(0, BD)
    wanted = inside[:, None]
    if D != BD:
        wanted = wanted & (columns < D)[None, :]
    tl.atomic_add(ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], x, mask=wanted, sem="relaxed")


@triton.jit
def load_labels(ptr, positions, N, MASKED: tl.constexpr, LABELLED: tl.constexpr):
    """Labels of tokens and whether they are valid. Without labels: the positions themselves, never compared."""
    inside = positions < N
    labels = positions
    if LABELLED:
        labels = tl.load(ptr + positions, mask=inside, other=MASKED)
        inside = labels != MASKED
    return labels, inside


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
    """Which pairs of a tile exist. Either side may be given as (·, 1) and the other as (1, ·)."""
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
    """accumulator + d_scores @ x, float32. TYPE: element type of `x` in memory.

    bfloat16: d_scores rounded to it. float16 cannot hold small products of probabilities: TF32 does, to which they are
    rounded, and it holds every float16 exactly. float32: full precision.
    """
    if tl.float16 == TYPE:
        return tl.dot(rounded_to_tf32(d_scores), x.to(tl.float32), accumulator, input_precision="tf32")
    return tl.dot(narrow(d_scores, TYPE, UPCAST), x, accumulator, input_precision="ieee")


@triton.jit
def keys_of(start, stop, N, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BC: tl.constexpr):
    """First (a multiple of BC) and last key that the queries start … stop − 1 can see."""
    first, last = 0, N
    if CAUSAL:
        last = tl.minimum(stop, N)
    if WINDOWED:
        first = tl.maximum(start - window + 1, 0) // BC * BC
        last = tl.minimum(last, stop + window - 1)
    return first, last


@triton.jit
def queries_of(start, stop, N, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BR: tl.constexpr):
    """First (a multiple of BR) and last query that can see the keys start … stop − 1."""
    first, last = 0, N
    if WINDOWED:
        first = tl.maximum(start - window + 1, 0) // BR * BR
        last = tl.minimum(N, stop + window - 1)
    if CAUSAL:
        first = start // BR * BR
    return first, last


@triton.jit
def loss_and_slope(s, t, m_s, m_t, log_s, log_t, r, present, DIVERGENCE: tl.constexpr):
    """Loss and gradient of each entry at the student's scores S, for kl and mse in nats:

    kl         P_T (log P_T − log P_S),  P_S − P_T
    mse        (P_S − P_T)²,             2 P_S (P_S − P_T − r), r = Σ_j P_S (P_S − P_T)
    score_mse  (S_S − S_T)²,             2 (S_S − S_T)
    m: the row's largest score, log: log₂ Σ exp2(score − m); r as above; all broadcast along the rows. (m + log would
    be the LSE, whose rounding mse feels where attention is peaked.) Entries that do not exist give 0.
    """
    if DIVERGENCE == SCORE_MSE:
        difference = tl.where(present, s - t, 0.0)
        return difference * difference, 2.0 * difference
    log_s, log_t = (s - m_s) - log_s, (t - m_t) - log_t
    p_s = tl.where(present, tl.exp2(log_s), 0.0)
    p_t = tl.where(present, tl.exp2(log_t), 0.0)
    if DIVERGENCE == KL:
        return tl.where(present, p_t * (log_t - log_s) * LN2, 0.0), p_s - p_t
    difference = p_s - p_t
    return difference * difference, 2.0 * p_s * (difference - r)
