"""Define the public attention alignment: checks, normalisation, choice of backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsdistill.ops.attention import chunked, native, reference, triton_schedule
from dsdistill.ops.attention.pairs import Pairs
from dsdistill.ops.backends import attention_order, choose_backend, native_lack
from dsdistill.ops.common import (
    REDUCTIONS,
    accumulate_dtype,
    check_choice,
    check_device,
    check_mask,
    check_rows,
    check_tensor,
    safe_divide,
    weights_of_rows,
    with_native_gradients,
    with_stored_gradients,
    without_autocast,
)
from dsdistill.ops.records import gpu_choice

DIVERGENCES = ("kl", "mse", "score_mse")
HEADS = ("match", "mean", "group")


def attention_alignment(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    divergence: str = "kl",
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    heads: str = "match",
    window: int | None = None,
    segments: Tensor | None = None,
    rows: tuple[Tensor, Tensor | None] | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Return the distance between the student's and the teacher's attention, without building either matrix whole.

    With A = softmax(scale · Q Kᵀ) of one head over the keys that a query sees:
      "kl"         Σ_j A_T log(A_T / A_S), in nats; mean over valid rows × heads (MiniLM, Wang et al. 2020, Eq. 4)
      "mse"        (A_S − A_T)²; mean over existing entries × heads
      "score_mse"  (S_S − S_T)² of the scores before the softmax; mean over existing entries × heads
                   (TinyBERT, Jiao et al. 2020, Eq. 7, over valid entries only)

    Args:
        student_query, teacher_query: (B, H, N, D); D may differ between the models.
        student_key, teacher_key: (B, H_kv, N, D), where H_kv divides H. Key head k serves the H/H_kv query heads from
            k·H/H_kv on, as `repeat_interleave` would assign them. H_kv may differ between the models.
        mask: (B, N) bool, True = valid. A masked token is neither a row nor a column. Default: all valid.
        causal: a query sees keys at its own and earlier positions only.
        student_scale, teacher_scale: factor of the scores; default 1/√D of that model.
        heads: which heads are compared. Only "match" allows "score_mse".
            "match" compares head by head (equal H). "mean" compares the probabilities averaged over heads: H may
            differ, and the divisors above lack the factor H. "group" compares student head g with the teacher's
            probabilities averaged over its heads g·r … g·r + r − 1, where r = H_T / H_S must be a whole number. Its
            divisors count the student's heads, and only "reference" and "chunked" can run it.
        window: a query sees keys at distance < window tokens, in both models.
        segments: (B, N) integers; attention stays within equal numbers (packed sequences).
        rows: (index, weights): only these queries are compared, in any order; a repeated position counts again.
            index: (B, R) int64 positions; −1 names no query. weights: (B, R) ≥ 0, factors of the rows' sums and
            gradients. If weights is None, each is n_b/R_b, the sequence's valid tokens divided by its valid rows, so
            that loss and gradient of uniformly drawn rows are unbiased. Keys and divisors are still those of all
            tokens. A position beyond N raises only on a CPU: a check on a GPU would wait for the device.
        reduction: "mean" divides as above; "sum" does not divide.
        backend: "auto", "reference", "chunked", "cpp" or "triton".

    Returns:
        Scalar, float32 (float64 if any input is). Gradients flow to the student's query and key only.
        With nothing valid it is 0, connected to the graph.

    Raises:
        ValueError: wrong shape, dtype, device or name, or a backend that cannot run this call.
    """
    check_tensor("student_query", student_query, {"B": None, "H": None, "N": None, "D": None})
    batch, head_count, tokens, width = student_query.shape
    check_tensor(
        "student_key", student_key, {"B": batch, "H_kv": None, "N": tokens, "D": width}, like=student_query
    )
    teacher_heads = head_count if heads == "match" else None
    check_tensor(
        "teacher_query",
        teacher_query,
        {"B": batch, "H": teacher_heads, "N": tokens, "D": None},
        like=student_query,
    )
    check_tensor(
        "teacher_key",
        teacher_key,
        {"B": batch, "H_kv": None, "N": tokens, "D": teacher_query.shape[3]},
        like=student_query,
    )
    for name, query, key in (
        ("student", student_query, student_key),
        ("teacher", teacher_query, teacher_key),
    ):
        if query.shape[1] % max(1, key.shape[1]):
            raise ValueError(f"{name}_key: got H_kv={key.shape[1]}, expected a divisor of H={query.shape[1]}")
    check_choice("divergence", divergence, DIVERGENCES)
    check_choice("heads", heads, HEADS)
    teacher_count = teacher_query.shape[1]
    if heads == "group" and (teacher_count < head_count or teacher_count % max(1, head_count)):
        raise ValueError(
            f"teacher_query: got H={teacher_count}, expected a multiple of the student's H={head_count} "
            "for heads='group'"
        )
    check_choice("reduction", reduction, REDUCTIONS)
    if heads != "match" and divergence == "score_mse":
        raise ValueError(
            f"heads={heads!r} averages probabilities; divergence 'score_mse' has none, expected 'kl' or 'mse'"
        )
    check_mask(mask, (batch, tokens), student_query)
    if window is not None and window < 1:
        raise ValueError(f"window: got {window}, expected at least 1 token")
    if segments is not None:
        if tuple(segments.shape) != (batch, tokens) or segments.is_floating_point() or segments.is_complex():
            raise ValueError(
                f"segments: got {tuple(segments.shape)} {segments.dtype}, expected ({batch}, {tokens}) integers"
            )
        check_device("segments", segments, student_query)

    dtype = accumulate_dtype(student_query, student_key, teacher_query, teacher_key)
    tensors = (student_query, student_key, teacher_query, teacher_key)
    pairs, weights = Pairs(tokens, mask, causal, window, segments), None
    if rows is not None:
        check_rows(rows, (batch, tokens), student_query)
        pairs = replace(pairs, rows=rows[0])
        weights = weights_of_rows(*rows, mask, tokens, dtype)
    scales = (
        width**-0.5 if student_scale is None else float(student_scale),
        teacher_query.shape[3] ** -0.5 if teacher_scale is None else float(teacher_scale),
    )
    setting: dict[str, Any] = {
        "pairs": pairs,
        "divergence": divergence,
        "student_scale": scales[0],
        "teacher_scale": scales[1],
        "heads": heads,
        "dtype": dtype,
        "weights": weights,
    }
    chosen = _choose(backend, tensors, setting)
    with without_autocast(student_query.device):
        if chosen == "cpp":
            given = native.arguments(tensors, pairs, weights, divergence, *scales, reduction)
            return with_native_gradients(torch.ops.dsdistill.attention_alignment, given, tensors[:2])
        count = None
        if reduction == "mean":
            count = _count(pairs, batch, head_count, divergence, heads, student_query.device)
        if rows is not None:
            own = _at(rows[0], student_query), _at(rows[0], teacher_query.detach())
            tensors = (own[0], student_key, own[1], teacher_key)
        if chosen == "triton":
            coefficient = torch.ones((), device=student_query.device)
            if count is not None:
                coefficient = safe_divide(coefficient, count)
            given = triton_schedule.arguments(
                tensors, pairs, weights, divergence, *scales, heads, coefficient
            )
            return with_native_gradients(torch.ops.dsdistill.attention_alignment_triton, given, tensors[:2])
        if chosen == "reference":
            total = reference.attention_total(*tensors, **setting)
            return total if count is None else safe_divide(total, count)
        return with_stored_gradients(
            lambda needs: chunked.attention_total(needs, *tensors, **setting), tensors[:2], count
        )


def _at(index: Tensor, query: Tensor) -> Tensor:
    """Return the queries (B, H, N, D) at the positions (B, R), as (B, H, R, D); for −1, return the first query."""
    places = index.clamp(min=0)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    return query.gather(2, places)


def _choose(backend: str, tensors: tuple[Tensor, ...], setting: dict) -> str:
    missing = {}
    heads, pairs = setting["heads"], setting["pairs"]
    lack = native_lack(tensors[0])
    if heads != "match":
        lack = lack or f"heads={heads!r} has no native kernel"
    if lack:
        missing["cpp"] = lack
        preference = ["chunked", "reference"]
    else:
        raw = setting["divergence"] == "score_mse" and pairs.unrestricted
        half = all(x.dtype == torch.bfloat16 for x in tensors)
        width = max(tensors[0].shape[3], tensors[2].shape[3])
        preference = [*attention_order(raw, pairs.queries, width, half)]
    if backend == "auto" and tensors[0].device.type == "cpu":
        return choose_backend("attention_alignment", backend, preference=preference, missing=missing)
    lack = "heads='group' has no Triton kernel" if heads == "group" else triton_schedule.lack(tensors)
    if pairs.rows is not None and heads == "mean":
        lack = lack or "rows have no Triton kernel with heads='mean'"
    if lack:
        missing["triton"] = lack
    else:
        preference.append("triton")
    variant = setting["divergence"] if heads == "match" else f"{setting['divergence']} {heads}"
    small: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("student_query", "student_key", "teacher_query", "teacher_key"), (1, 2, 65, 16)
    )
    fast = gpu_choice(
        "attention_alignment",
        variant,
        tensors[0],
        pairs.tokens,
        {"triton": lack or triton_schedule.left_to_chunked(tensors)},
        attention_alignment,
        small,
    )
    if fast and backend == "auto":
        preference = [fast, *preference]
    return choose_backend(
        "attention_alignment",
        backend,
        preference=preference,
        missing=missing,
    )


def _count(
    pairs: Pairs, batch: int, heads: int, divergence: str, how: str, device: torch.device
) -> Tensor | int:
    """Return the divisor of "mean": the valid rows (kl) or existing entries, times the number of heads compared."""
    count: Tensor | int
    if divergence != "kl":
        count = pairs.count(batch, device)
    elif pairs.mask is None:
        count = batch * pairs.tokens
    else:
        count = pairs.mask.sum()
    return count if how == "mean" else count * heads


def relation_heads(x: Tensor, heads: int) -> Tensor:
    """Concatenate the heads and split them anew, so that models of different head counts can be compared (MiniLMv2).

    Args:
        x: (B, H, N, D) queries, keys or values.
        heads: number of relation heads; must divide H·D.

    Returns:
        (B, heads, N, H·D/heads), a view where the layout allows it.

    Raises:
        ValueError: `x` is not four-dimensional, or `heads` does not divide H·D.
    Source: MiniLMv2, Wang et al. 2021, section 3.1.
    """
    check_tensor("x", x, {"B": None, "H": None, "N": None, "D": None})
    joined = x.shape[1] * x.shape[3]
    if heads < 1 or joined % heads:
        raise ValueError(
            f"heads: got {heads}, expected a divisor of H·D = {x.shape[1]}·{x.shape[3]} = {joined}"
        )
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], heads, joined // heads).transpose(1, 2)
