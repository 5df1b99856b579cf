"""Define the public pairwise alignment: checks, normalisation, choice of backend."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsdistill.ops.attention.op import attention_alignment
from dsdistill.ops.backends import choose_backend, native_lack, pairwise_order
from dsdistill.ops.common import (
    REDUCTIONS,
    accumulate_dtype,
    check_choice,
    check_mask,
    check_rows,
    check_tensor,
    row_weights,
    safe_divide,
    unit_vectors,
    weights_of_rows,
    with_native_gradients,
    with_stored_gradients,
    without_autocast,
    zero_masked,
)
from dsdistill.ops.gpu import triton_lack
from dsdistill.ops.pairwise import chunked, native, reference, triton_panels
from dsdistill.ops.records import gpu_choice

RELATIONS = ("cosine", "dot", "distance")


def pairwise_alignment(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    relation: str = "cosine",
    rows: tuple[Tensor, Tensor | None] | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Return the distance between two models' geometries: how each relates the units of a sequence to each other.

    A unit is one vector x_i, for example of a token. The distance is Σ_ij w_i w_j (R_S − R_T)²_ij over all pairs of a
    sequence, averaged over sequences with a valid unit.
      "cosine"    R = cosine of x_i and x_j; a vector shorter than 1e-12 has cosine 0 with everything
      "dot"       R = x_i · x_j
      "distance"  R = ‖x_i − x_j‖ ÷ its mean over the sequence's positive distances, and smooth-L1 with β = 1
                  instead of the square (RKD-D, Park et al. 2019, Eq. 6–8)
    The widths may differ without a projection, because only relations are compared.

    Args:
        student: (B, N, D_s). teacher: (B, N, D_t).
        mask: (B, N) bool, True = valid. Default: all valid.
        weights: (B, N), ≥ 0, used as given, without gradient. Default: 1/n_b, where n_b is the number of valid units
            of the sequence, so that each sequence contributes a mean over its pairs.
        rows: (index, weights): only these rows i are compared, with all j, as in `attention_alignment`. "distance" does
            not allow it, because its mean needs all pairs.
        reduction: "mean" over sequences with a valid unit, or "sum" over sequences.
        backend: "auto", "reference", "chunked", "cpp" or "triton".

    Returns:
        Scalar, float32 (float64 if any input is), with gradients to `student` only. With nothing valid it is 0,
        connected to the graph. If N ≥ 2.5 max(D), cosine and dot are computed without any N×N block; the value is then
        exact relative to ‖R_S‖² + ‖R_T‖², and clamped at 0.

    Raises:
        ValueError: wrong shape, dtype, device or name, or a backend that cannot run this call.
    """
    check_tensor("student", student, {"B": None, "N": None, "D_s": None})
    batch, tokens, _ = student.shape
    check_tensor("teacher", teacher, {"B": batch, "N": tokens, "D_t": None}, like=student)
    check_mask(mask, (batch, tokens), student)
    if weights is not None:
        check_tensor("weights", weights, {"B": batch, "N": tokens}, like=student)
    check_choice("relation", relation, RELATIONS)
    check_choice("reduction", reduction, REDUCTIONS)
    dtype = accumulate_dtype(student, teacher)
    if rows is not None:
        if relation == "distance":
            raise ValueError(
                "rows: got relation 'distance', whose mean takes all pairs, expected 'cosine' or 'dot'"
            )
        check_rows(rows, (batch, tokens), student)
        rows = rows[0], weights_of_rows(*rows, mask, tokens, dtype)
    chosen = _choose(backend, student, teacher, relation, None if rows is None else rows[0].shape[1])
    with without_autocast(student.device):
        if chosen == "cpp" and rows is None:
            given = native.arguments(student, teacher, mask, weights, relation, reduction)
            return with_native_gradients(torch.ops.dsdistill.pairwise_alignment, given, (student,))
        token_weights = row_weights(mask, weights, (batch, tokens), dtype, student.device)
        if weights is None:
            token_weights = token_weights / token_weights.sum(1, keepdim=True).clamp(min=1)
        count: Tensor | int | None = None
        if reduction == "mean":
            count = batch if mask is None else mask.any(1).sum()
        if chosen == "triton":
            coefficient = torch.ones((), device=student.device)
            if count is not None:
                coefficient = safe_divide(coefficient, count)
            code = native.RELATION_CODES[relation]
            given = (student, teacher, mask, token_weights, coefficient, code)
            return with_native_gradients(triton_panels.operator, given, (student,))
        setting: dict[str, Any] = {
            "weights": token_weights,
            "mask": mask,
            "relation": relation,
            "dtype": dtype,
        }
        if rows is not None:
            by = reference.pairwise_total if chosen == "reference" else partial(_rows_total, backend=chosen)
            total = by(student, teacher, rows=rows, **setting)
            return total if count is None else safe_divide(total, count)
        if chosen == "reference":
            total = reference.pairwise_total(student, teacher, **setting)
            return total if count is None else safe_divide(total, count)
        return with_stored_gradients(
            lambda needs: chunked.pairwise_total(needs, student, teacher, **setting), (student,), count
        )


def _rows_total(
    student: Tensor,
    teacher: Tensor,
    *,
    rows: tuple[Tensor, Tensor],
    weights: Tensor,
    mask: Tensor | None,
    relation: str,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Return what `reference.pairwise_total` returns for rows, by the attention operator with one head and raw scores.

    A row's weight multiplies its sum. A column's weight multiplies squares, so the keys are multiplied by its root.
    """
    index, row_weights = rows
    x_s, x_t = zero_masked(student.to(dtype), mask), zero_masked(teacher.detach().to(dtype), mask)
    if relation == "cosine":
        x_s, x_t = unit_vectors(x_s)[0], unit_vectors(x_t)[0]
    root = weights.sqrt()[..., None]
    own = weights.gather(1, index.clamp(min=0)) * row_weights
    tensors = [x[:, None] for x in (x_s, x_s * root, x_t, x_t * root)]
    return attention_alignment(
        *tensors,
        mask=mask,
        divergence="score_mse",
        student_scale=1.0,
        teacher_scale=1.0,
        rows=(index, own),
        reduction="sum",
        backend=backend,
    )


def _choose(backend: str, student: Tensor, teacher: Tensor, relation: str, rows: int | None) -> str:
    missing = {}
    _, tokens, width = student.shape
    compared = tokens if rows is None else rows
    by_identity = relation != "distance" and chunked.use_identity(compared, width, teacher.shape[2])
    lack = native_lack(student)
    if lack:
        missing["cpp"] = lack
        preference = ["chunked", "reference"]
    else:
        widest = max(width, teacher.shape[2])
        preference = [*pairwise_order(by_identity, compared, widest, rows is not None)]
    if backend == "auto" and student.device.type == "cpu":
        return choose_backend("pairwise_alignment", backend, preference=preference, missing=missing)
    lack = triton_lack(student, teacher)
    if rows is not None:
        lack = lack or "rows have no Triton kernel"
    if lack:
        missing["triton"] = lack
    else:
        preference.append("triton")
    fast = gpu_choice(
        "pairwise_alignment",
        relation,
        student,
        tokens,
        {"triton": lack},
        pairwise_alignment,
        {"student": (1, 65, 40), "teacher": (1, 65, 48)},
    )
    if fast and backend == "auto" and not by_identity:
        preference = [fast, *preference]
    return choose_backend(
        "pairwise_alignment",
        backend,
        preference=preference,
        missing=missing,
    )
