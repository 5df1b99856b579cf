"""Align hidden states row by row in Triton: each token's loss and gradient in one pass, as in csrc/hidden/cuda.cu.

With x = y + b of one token and its target t:
  mse     w Σ (x − t)²,       g = 2 w (x − t)
  cosine  w (1 − cos(x, t)),  g = −w (t̂ − cos · x̂) / ‖x‖; a vector shorter than 1e-12 has cosine 0
"""

import triton
import triton.language as tl

from dsdistill.ops.triton_common import narrow


@triton.jit
def rows_kernel(
    y,  # (T, D), rows y_n apart
    target,  # (T, D), rows t_n apart
    bias,  # (D), only with BIASED
    weights,  # (T) float32; a token of weight 0 is never read
    factor,  # scalar float32 by which the gradient is multiplied before it is rounded
    values,  # (T) float32
    gradient,  # (T, D) contiguous, only with WITH_GRADIENT
    y_n,
    t_n,
    T,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    COSINE: tl.constexpr,
    BIASED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    weight = tl.load(weights + tokens, mask=tokens < T, other=0.0)
    scale = weight * tl.load(factor)
    features = tl.arange(0, BD)
    wide = tokens.to(tl.int64)[:, None]
    y += wide * y_n + features[None, :]
    target += wide * t_n + features[None, :]
    gradient += wide * D + features[None, :]
    seen = (weight != 0)[:, None]
    squares = tl.zeros([BT], tl.float32)
    squares_y = tl.zeros([BT], tl.float32)
    squares_t = tl.zeros([BT], tl.float32)
    for start in range(0, D, BD):
        x, t, inside = load_pair(y, target, bias, features, start, seen, D, BIASED)
        if COSINE:
            squares += tl.sum(x * t, 1)
            squares_y += tl.sum(x * x, 1)
            squares_t += tl.sum(t * t, 1)
        else:
            difference = x - t
            squares += tl.sum(difference * difference, 1)
            if WITH_GRADIENT:
                out = narrow(2.0 * scale[:, None] * difference, gradient.dtype.element_ty, UPCAST)
                tl.store(gradient + start, out, mask=inside & (tokens < T)[:, None])
    if COSINE:
        norm_y, norm_t = tl.sqrt(squares_y), tl.sqrt(squares_t)
        inverse_y = tl.where(norm_y > 1e-12, 1.0 / tl.maximum(norm_y, 1e-30), 0.0)
        inverse_t = tl.where(norm_t > 1e-12, 1.0 / tl.maximum(norm_t, 1e-30), 0.0)
        cosine = squares * inverse_y * inverse_t
        squares = 1.0 - cosine
        if WITH_GRADIENT:
            along = (scale * cosine * inverse_y * inverse_y)[:, None]
            towards = (scale * inverse_y * inverse_t)[:, None]
            for start in range(0, D, BD):  # the rows are read again, from the cache
                x, t, inside = load_pair(y, target, bias, features, start, seen, D, BIASED)
                out = narrow(along * x - towards * t, gradient.dtype.element_ty, UPCAST)
                tl.store(gradient + start, out, mask=inside & (tokens < T)[:, None])
    tl.store(values + tokens, tl.where(weight != 0, weight * squares, 0.0), mask=tokens < T)


@triton.jit
def load_pair(y, target, bias, features, start, seen, D: tl.constexpr, BIASED: tl.constexpr):
    """Load y + b and the target, (BT, BD), 0 where not seen; and return which features lie inside, (1, BD)."""
    inside = (features < D - start)[None, :]
    x = tl.load(y + start, mask=inside & seen, other=0.0).to(tl.float32)
    t = tl.load(target + start, mask=inside & seen, other=0.0).to(tl.float32)
    if BIASED:
        x += tl.load(bias + start + features, mask=features < D - start, other=0.0).to(tl.float32)[None, :]
    return x, t, inside
