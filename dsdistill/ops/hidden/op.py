"""Define the public hidden-state alignment: checks, normalisation, choice of backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsdistill.ops.backends import choose_backend, cuda_lack, hidden_order, native_lack
from dsdistill.ops.common import (
    REDUCTIONS,
    accumulate_dtype,
    check_choice,
    check_mask,
    check_tensor,
    row_weights,
    safe_divide,
    with_native_gradients,
    with_stored_gradients,
    without_autocast,
)
from dsdistill.ops.gpu import triton_lack
from dsdistill.ops.hidden import chunked, native, reference, rows
from dsdistill.ops.records import gpu_choice

DIVERGENCES = ("mse", "cosine")


def hidden_alignment(
    student: Tensor,
    teacher: Tensor,
    *,
    projection: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    divergence: str = "mse",
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Return the distance between hidden states. The student's are projected to the teacher's width: y = W h_S + b.

      "mse"     Σ_t w_t ‖y − h_T‖², divided by D_t · Σ w (TinyBERT, Jiao et al. 2020, Eq. 8)
      "cosine"  Σ_t w_t (1 − cos(y, h_T)), divided by Σ w (DistilBERT, Sanh et al. 2019); a vector shorter than
                1e-12 has cosine 0

    Args:
        student: (B, N, D_s). teacher: (B, N, D_t).
        projection: (D_t, D_s), as nn.Linear holds its weight. Without it D_s must equal D_t.
        bias: (D_t,), only with a projection.
        mask: (B, N) bool, True = valid. Default: all valid.
        weights: (B, N), ≥ 0, used as given, without gradient. Default: 1 for each token.
        reduction: "mean" divides as above, by sums over valid tokens; "sum" does not divide.
        backend: "auto", "reference", "chunked", "cpp", "cuda" or "triton".

    Returns:
        Scalar, float32 (float64 if any input is), with gradients to `student`, `projection` and `bias`. With
        nothing valid it is 0, connected to the graph.

    Raises:
        ValueError: wrong shape, dtype, device or name, or a backend that cannot run this call.
    """
    check_tensor("student", student, {"B": None, "N": None, "D_s": None})
    batch, tokens, width = student.shape
    check_tensor("teacher", teacher, {"B": batch, "N": tokens, "D_t": None}, like=student)
    teacher_width = teacher.shape[2]
    if projection is not None:
        check_tensor("projection", projection, {"D_t": teacher_width, "D_s": width}, like=student)
    elif width != teacher_width:
        raise ValueError(
            f"projection: got None, expected (D_t={teacher_width}, D_s={width}) for unequal widths"
        )
    if bias is not None:
        if projection is None:
            raise ValueError("bias: got one without a projection, expected both or neither")
        check_tensor("bias", bias, {"D_t": teacher_width}, like=student)
    check_mask(mask, (batch, tokens), student)
    if weights is not None:
        check_tensor("weights", weights, {"B": batch, "N": tokens}, like=student)
    check_choice("divergence", divergence, DIVERGENCES)
    check_choice("reduction", reduction, REDUCTIONS)
    dtype = accumulate_dtype(student, teacher, projection, bias)
    chosen = _choose(backend, divergence, student, teacher, projection, bias)
    inputs = (student, projection, bias)
    with without_autocast(student.device):
        if chosen == "cpp":
            given = native.arguments(student, teacher, projection, bias, mask, weights, divergence, reduction)
            return with_native_gradients(torch.ops.dsdistill.hidden_alignment, given, inputs)
        token_weights = row_weights(mask, weights, (batch, tokens), dtype, student.device)
        setting: dict[str, Any] = {
            "weights": token_weights,
            "mask": mask,
            "divergence": divergence,
            "dtype": dtype,
        }
        count: Tensor | int | None = None
        if reduction == "mean":
            count = batch * tokens if mask is None and weights is None else token_weights.sum()
            count = count * (teacher_width if divergence == "mse" else 1)
        if chosen in rows.ROWS:
            coefficient = torch.ones((), device=student.device)
            if count is not None:
                coefficient = safe_divide(coefficient, count)
            given = (student, teacher, projection, bias, mask, token_weights, coefficient)
            given += (native.DIVERGENCE_CODES[divergence], chosen)
            return with_native_gradients(torch.ops.dsdistill.hidden_alignment_rows, given, inputs)
        if chosen == "reference":
            total = reference.hidden_total(student, teacher, projection, bias, **setting)
            return total if count is None else safe_divide(total, count)
        return with_stored_gradients(
            lambda needs: chunked.hidden_total(needs, student, teacher, projection, bias, **setting),
            inputs,
            count,
        )


def _choose(
    backend: str,
    divergence: str,
    student: Tensor,
    teacher: Tensor,
    projection: Tensor | None,
    bias: Tensor | None,
) -> str:
    missing = {}
    tensors = (student, teacher, projection, bias)
    tokens = student.shape[0] * student.shape[1]
    lack = native_lack(student)
    if lack:
        missing["cpp"] = lack
        preference = ["chunked", "reference"]
    else:
        size = 0 if projection is None else projection.shape[0] * projection.shape[1]
        preference = [*hidden_order(tokens, size)]
    if backend == "auto" and student.device.type == "cpu":
        return choose_backend("hidden_alignment", backend, preference=preference, missing=missing)
    lacks = {"cuda": cuda_lack(*tensors), "triton": triton_lack(*tensors)}
    for name, lack in lacks.items():
        if lack:
            missing[name] = lack
        else:
            preference.append(name)
    small: dict[str, tuple[int, ...]] = {
        "student": (1, 65, 40),
        "teacher": (1, 65, 40 if projection is None else 48),
    }
    if projection is not None:
        small["projection"] = (48, 40)
    variant = divergence if projection is None else f"{divergence} projected"
    fast = gpu_choice("hidden_alignment", variant, student, tokens, lacks, hidden_alignment, small)
    if fast and backend == "auto":
        preference = [fast, *preference]
    return choose_backend(
        "hidden_alignment",
        backend,
        preference=preference,
        missing=missing,
    )
