"""Define attention alignment in plain PyTorch, with whole N×N matrices, for any floating dtype.

With A = softmax(scale · Q Kᵀ) over the keys that a query sees:
  kl         Σ_rows Σ_j A_T log(A_T / A_S)          MiniLM, Wang et al. 2020, Eq. 4
  mse        Σ_rows Σ_j (A_S − A_T)²
  score_mse  Σ_rows Σ_j (S_S − S_T)², S = scale · Q Kᵀ before the softmax    TinyBERT, Jiao et al. 2020, Eq. 7
With `rows`, each row's sum is multiplied by its weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsdistill.ops.attention.pairs import Pairs


def scores(query: Tensor, key: Tensor, scale: float, pairs: Pairs) -> Tensor:
    """Return (B, H, R, N) raw scores. Masked tokens become zero vectors, so that NaN in padding is never read."""
    query, key = hide_masked(query, pairs.query_mask()), hide_masked(key, pairs.mask)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return query @ key.transpose(-1, -2) * scale


def hide_masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x (B, H, N, D) with the vectors of masked tokens set to 0. mask: (B, N) bool, True = valid."""
    return x if mask is None else x.masked_fill(~mask[:, None, :, None], 0)


def log_attention(raw: Tensor, exists: Tensor | None) -> Tensor:
    """Return the log softmax over the existing keys; a row that has none is all 0."""
    if exists is None:
        return raw.log_softmax(-1)
    raw = raw.masked_fill(~exists, -torch.inf).masked_fill(~exists.any(-1, keepdim=True), 0)
    # A −∞ from the softmax must not enter a subtraction or a product, whose gradients would be NaN.
    return raw.log_softmax(-1).masked_fill(~exists, 0)


def mean_over_heads(log_probability: Tensor, groups: int = 1) -> Tensor:
    """Return the log of the probability averaged over the heads of each of equal groups, (B, groups, N, N)."""
    grouped = log_probability.unflatten(1, (groups, -1))
    return (grouped - math.log(grouped.shape[2])).logsumexp(2)


def attention_total(
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
) -> Tensor:
    """Return the sum over sequences, heads, queries and keys, undivided. Shapes are those of `attention_alignment`.

    If `pairs` has rows, the queries are those of the rows, (B, H, R, D), and weights are (B, R), 0 where a row is −1.
    """
    teacher_query, teacher_key = teacher_query.detach(), teacher_key.detach()
    raw_student = scores(student_query.to(dtype), student_key.to(dtype), student_scale, pairs)
    raw_teacher = scores(teacher_query.to(dtype), teacher_key.to(dtype), teacher_scale, pairs)
    queries, keys = slice(0, pairs.queries), slice(0, pairs.tokens)
    exists = pairs.block(queries, keys, slice(None), student_query.device)

    def total(entries: Tensor) -> Tensor:
        entries = entries if exists is None else entries.masked_fill(~exists, 0)
        return entries.sum() if weights is None else (entries.sum(-1) * weights[:, None]).sum()

    if divergence == "score_mse":
        difference = raw_student - raw_teacher
        return total((difference if exists is None else difference.masked_fill(~exists, 0)).square())

    log_student, log_teacher = log_attention(raw_student, exists), log_attention(raw_teacher, exists)
    if heads == "mean":
        log_student, log_teacher = mean_over_heads(log_student), mean_over_heads(log_teacher)
    elif heads == "group":
        log_teacher = mean_over_heads(log_teacher, log_student.shape[1])
    if divergence == "kl":
        return total(log_teacher.exp() * (log_teacher - log_student))
    return total((log_student.exp() - log_teacher.exp()).square())
