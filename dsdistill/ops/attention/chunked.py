"""Compute attention alignment in plain PyTorch, a block of queries at a time.

For raw scores there is a second way, "the identity": the equation in `_score_mse_by_identity`, which avoids N×N scores.

The gradients at the student's scores S of one row are, with P = softmax(S):
  kl         dS = P_S − P_T
  mse        dS = 2 P_S ∘ (P_S − P_T − r),  r = Σ_j P_S (P_S − P_T)
  score_mse  dS = 2 (S_S − S_T)
Then dQ = scale · dS K and dK = scale · dSᵀ Q. All of this happens in the forward pass. With `rows`, each row's dS is
multiplied by its weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dsdistill.ops import gpu
from dsdistill.ops.attention.pairs import Pairs
from dsdistill.ops.attention.reference import hide_masked, mean_over_heads
from dsdistill.ops.common import accumulate_dtype, blocks

# Elements of one score block of one model on a CPU: 8 MiB in float32.
BLOCK_ELEMENTS = 1 << 21
MAX_ROWS, MIN_ROWS, GPU_MAX_ROWS = 64, 16, 512


def attention_total(
    needs: Sequence[bool],
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    *,
    pairs: Pairs,
    divergence: str,
    student_scale: float,
    teacher_scale: float,
    heads: str,
    dtype: torch.dtype,
    weights: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Return the sum of `reference.attention_total`, and its gradients at the student's query and key if needed."""
    width = max(student_query.shape[-1], teacher_query.shape[-1])
    by_identity = divergence == "score_mse" and pairs.unrestricted and pairs.queries >= 2 * width
    # Half precision is multiplied without a cast. The identity needs the cast, since it multiplies its sums again.
    half = not by_identity and all(
        gpu.half_operands(*model) for model in ((student_query, student_key), (teacher_query, teacher_key))
    )

    def prepared(x: Tensor, mask: Tensor | None) -> Tensor:
        return hide_masked(x.detach() if half else x.detach().to(dtype), mask)

    own = pairs.query_mask()
    student = prepared(student_query, own), prepared(student_key, pairs.mask)
    teacher = prepared(teacher_query, own), prepared(teacher_key, pairs.mask)
    if by_identity:
        return _score_mse_by_identity(needs, *student, *teacher, student_scale, teacher_scale, weights)
    return _by_rows(
        needs, *student, *teacher, pairs, divergence, student_scale, teacher_scale, heads, weights
    )


def _by_rows(needs, q_s, k_s, q_t, k_t, pairs, divergence, scale_s, scale_t, heads, weights):
    batch, head_count, query_count, _ = q_s.shape
    tokens = pairs.tokens
    widest = max(head_count, q_t.shape[1])
    elements, most = gpu.block_elements(q_s, BLOCK_ELEMENTS), GPU_MAX_ROWS if q_s.is_cuda else MAX_ROWS
    rows = min(query_count, max(MIN_ROWS, min(most, elements // max(1, widest * tokens))))
    group = max(1, elements // max(1, widest * rows * tokens))
    dtype = accumulate_dtype(q_s, q_t)
    rounded = gpu.product_dtype(k_s, q_s) if q_s.dtype != dtype else dtype  # the type of dS in its products

    total = torch.zeros((), dtype=dtype, device=q_s.device)
    d_query = torch.zeros(q_s.shape, dtype=dtype, device=q_s.device) if needs[0] else None
    d_key = torch.zeros(k_s.shape, dtype=dtype, device=q_s.device) if needs[1] else None
    for first in blocks(range(0, batch, group)):
        sequences = slice(first, min(first + group, batch))
        for start in blocks(range(0, query_count, rows)):
            stop = min(start + rows, query_count)
            queries, keys = slice(start, stop), slice(*pairs.keys(start, stop))
            exists = pairs.block(queries, keys, sequences, q_s.device)
            raw_s = _scores(q_s[sequences, :, queries], k_s[sequences, :, keys], scale_s)
            raw_t = _scores(q_t[sequences, :, queries], k_t[sequences, :, keys], scale_t)
            values, d_scores = _divergence(raw_s, raw_t, exists, divergence, heads, any(needs))
            if weights is not None:
                of_rows = weights[sequences, None, queries]
                values = values * of_rows
                d_scores = None if d_scores is None else d_scores.mul_(of_rows[..., None])
            total += values.sum()
            if d_scores is None:
                continue
            d_scores = _grouped(d_scores.mul_(scale_s).to(rounded), k_s.shape[1])
            if d_query is not None:
                d_block = _product(d_scores, k_s[sequences, :, keys])
                d_query[sequences, :, queries] = d_block.view(d_query[sequences, :, queries].shape)
            if d_key is not None:
                own = _grouped(q_s[sequences, :, queries], k_s.shape[1])
                d_key[sequences, :, keys] += _product(d_scores.transpose(-1, -2), own)
    return total, (d_query, d_key)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """Reshape (b, H, R, *) to (b, H_kv, H/H_kv · R, *): the query heads that share a key head become its rows."""
    return x.reshape(x.shape[0], kv_heads, -1, x.shape[-1])


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return the raw scores of one block, (b, H, R, K)."""
    shape = (*query.shape[:3], key.shape[2])
    return _product(_grouped(query, key.shape[1]), key.transpose(-1, -2)).view(shape).mul_(scale)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return the product in the accumulating dtype."""
    return left @ right if left.dtype == right.dtype == torch.float64 else gpu.product(left, right)


def _log_softmax(raw: Tensor, exists: Tensor | None) -> Tensor:
    """Return the log softmax over existing keys; 0 where a pair does not exist."""
    if exists is None:
        return raw.log_softmax(-1)
    raw = raw.masked_fill_(~exists, -torch.inf).masked_fill_(~exists.any(-1, keepdim=True), 0)
    return raw.log_softmax(-1).masked_fill_(~exists, 0)


def _divergence(raw_s, raw_t, exists, divergence, heads, with_gradient):
    """Return the values of one block's rows, and the gradient at the student's raw scores (None if not asked for)."""
    if divergence == "score_mse":
        difference = raw_s.sub_(raw_t)
        if exists is not None:
            difference.masked_fill_(~exists, 0)
        values = difference.square().sum(-1)
        return values, difference.mul_(2) if with_gradient else None

    log_s, log_t = _log_softmax(raw_s, exists), _log_softmax(raw_t, exists)
    if heads == "mean":
        return _mean_head_divergence(log_s, log_t, exists, divergence, with_gradient)
    if heads == "group":
        log_t = mean_over_heads(log_t, log_s.shape[1])
    p_s, p_t = log_s.exp(), log_t.exp()
    if exists is not None:
        p_s.masked_fill_(~exists, 0)
        p_t.masked_fill_(~exists, 0)
    if divergence == "kl":
        values = log_t.sub_(log_s).mul_(p_t).sum(-1)
        return values, p_s.sub_(p_t) if with_gradient else None
    difference = p_t.neg_().add_(p_s)
    values = difference.square().sum(-1)
    if not with_gradient:
        return values, None
    mean = (difference * p_s).sum(-1, keepdim=True)
    return values, difference.sub_(mean).mul_(p_s).mul_(2)


def _mean_head_divergence(log_s, log_t, exists, divergence, with_gradient):
    """Return the divergence of the head-averaged probabilities, and its gradient at the student's raw scores.

    With P̄ = (1/H) Σ_h P_h and g = ∂L/∂P̄_S: dS_h = P_h ∘ (g − Σ_j P_h g) / H. For kl, g P_h / H = −P̄_T ρ_h with
    ρ_h = P_h / (H P̄_S), which lies in [0, 1] even where both are tiny.
    """
    head_count = log_s.shape[1]
    log_mean_s, log_mean_t = mean_over_heads(log_s), mean_over_heads(log_t)
    mean_s, mean_t = log_mean_s.exp(), log_mean_t.exp()
    if exists is not None:
        mean_s.masked_fill_(~exists, 0)
        mean_t.masked_fill_(~exists, 0)
    entries = mean_t * (log_mean_t - log_mean_s) if divergence == "kl" else (mean_s - mean_t).square()
    values = entries.sum(-1)
    if not with_gradient:
        return values, None
    p_s = log_s.exp()
    if exists is not None:
        p_s.masked_fill_(~exists, 0)
    if divergence == "kl":
        pulled = (log_s - log_mean_s - math.log(head_count)).exp() * -mean_t
    else:
        pulled = p_s * (2 / head_count) * (mean_s - mean_t)
    return values, pulled - p_s * pulled.sum(-1, keepdim=True)


def _score_mse_by_identity(needs, q_s, k_s, q_t, k_t, scale_s, scale_t, weights):
    """Use ‖Q_S K_Sᵀ − Q_T K_Tᵀ‖² = ⟨QSᵀQS, KSᵀKS⟩ − 2⟨QTᵀQS, KTᵀKS⟩ + ⟨QTᵀQT, KTᵀKT⟩: O(N D²), not O(N² D).

    Masked tokens are zero vectors, so they add nothing. When the models agree, the terms of the value cancel, so it is
    clamped at 0. The gradients are differences of N×D matrices and do not suffer from this.
    """
    heads, kv_heads = q_s.shape[1], k_s.shape[1]
    root = 1 if weights is None else weights.sqrt()[:, None, :, None]
    q_s, q_t = q_s * (scale_s * root), q_t * (scale_t * root)
    k_s = k_s.repeat_interleave(heads // kv_heads, dim=1)
    k_t = k_t.repeat_interleave(heads // k_t.shape[1], dim=1)

    key_ss, key_ts = k_s.transpose(-1, -2) @ k_s, k_t.transpose(-1, -2) @ k_s
    query_ss, query_ts = q_s.transpose(-1, -2) @ q_s, q_t.transpose(-1, -2) @ q_s
    own = (query_ss * key_ss).sum((-1, -2))
    cross = (query_ts * key_ts).sum((-1, -2))
    teacher = ((q_t.transpose(-1, -2) @ q_t) * (k_t.transpose(-1, -2) @ k_t)).sum((-1, -2))
    total = ((own - cross) + (teacher - cross)).clamp_min(0).sum()

    d_query = d_key = None
    if needs[0]:
        d_query = (q_s @ key_ss).sub_(q_t @ key_ts).mul_(2 * scale_s * root)
    if needs[1]:
        d_key = (k_s @ query_ss).sub_(k_t @ query_ts).mul_(2)
        d_key = d_key.unflatten(1, (kv_heads, -1)).sum(2)
    return total, (d_query, d_key)
