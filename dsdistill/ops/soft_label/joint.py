"""Compute task and soft labels over a vocabulary together: checks, normalisation, weights and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsdistill.ops.common import (
    REDUCTIONS,
    accumulate_dtype,
    check_choice,
    check_index,
    check_range,
    safe_divide,
    with_stored_gradients,
    without_autocast,
)
from dsdistill.ops.soft_label import chunked, reference
from dsdistill.ops.soft_label.op import (
    SMALL_CALL,
    WIDE,
    check_formula,
    check_labels,
    check_models,
    check_softcaps,
    choose,
    places_of,
    rows_at,
)

Weight = float | Tensor


class VocabularyLosses(NamedTuple):
    """Hold the task's loss and soft labels of the same tokens: scalars in float32 (float64 if any input is)."""

    total: Tensor  # their weighted sum
    task: Tensor  # cross-entropy
    soft: Tensor  # divergence from the teacher


def vocabulary_losses(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    labels: Tensor,
    index: Tensor | None = None,
    weights: tuple[Weight, Weight] = (1.0, 1.0),
    common: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    mu: float = 0.5,
    reduction: str = "mean",
    backend: str = "auto",
) -> VocabularyLosses:
    """Return the cross-entropy of the next token and the divergence from the teacher, from one product with each head.

    The losses are those of `token_cross_entropy` and `soft_label_alignment` over the same tokens. The student's logits
    and the products of the backward pass are shared, so that both take little more than soft labels alone.

    Args:
        student_hidden: (B, N, D_s). student_head: (V_s, D_s), as nn.Linear holds its weight. student_bias: (V_s,).
        teacher_hidden: (B, N, D_t). teacher_head: (V_t, D_t). teacher_bias: (V_t,).
        labels: (B, N) int64 in [0, V_s) or `ignore_index`, aligned with the hidden states; nothing is shifted here.
        index: (K,) int64, ascending: flat places b·N + n of the tokens that count in both losses. Without it, the
            tokens count whose label is not `ignore_index`. The labels at these places must be in [0, V_s); other labels
            are not read. Nothing waits for the device to find the places. The values are not checked.
        weights: of task and soft labels in `total`: numbers, or scalar tensors on any device, taken as constants.
        common: the soft labels compare this many first entries of both heads (padding comes after them). The task uses
            all V_s. Default: all, if V_s = V_t.
        student_softcap, teacher_softcap, temperature, divergence, beta, alpha, mu: as for `soft_label_alignment`. The
            task uses the student's soft cap, too, but no temperature.
        label_smoothing: as for `token_cross_entropy`.
        reduction: "mean" over the tokens that count, or "sum".
        backend: "auto", "reference", "chunked" or "triton".

    Returns:
        total = weights[0] · task + weights[1] · soft, with gradients to the student's hidden states, head and bias
        (each only if it requires them). The forward pass finds them, with one gradient of the head in float32.
        task and soft: the two losses. They have gradients, too, so that they can be weighted later. These are computed
        only when backward asks for them, which computes the logits once more. With nothing valid all are 0.

    Raises:
        ValueError: wrong shape, dtype, device or name, a soft cap that is not positive, heads of unequal size without
            `common`, or a `common` that a head does not have.
    """
    check_models(student_hidden, student_head, student_bias, teacher_hidden, teacher_head, teacher_bias)
    check_labels(labels, student_hidden)
    check_index(index, None, student_hidden)
    common = _check_common(common, student_head.shape[0], teacher_head.shape[0])
    formula = check_formula(temperature, divergence, beta, alpha, mu)
    caps = {"student_softcap": student_softcap, "teacher_softcap": teacher_softcap}
    check_softcaps(**caps)
    check_range("label_smoothing", label_smoothing, 0, 1)
    check_choice("reduction", reduction, REDUCTIONS)

    if common != len(teacher_head):  # a slice of all would cost time, too
        teacher_head = teacher_head[:common]
        teacher_bias = None if teacher_bias is None else teacher_bias[:common]
    teacher = (teacher_hidden, teacher_head, teacher_bias)
    inputs = (student_hidden, student_head, student_bias)
    dtype = accumulate_dtype(*inputs, *teacher)
    setting: dict[str, Any] = {"ignore_index": ignore_index, "dtype": dtype}
    setting |= {"label_smoothing": float(label_smoothing), **formula, **caps}
    given = (*inputs, *teacher)
    chosen = choose("vocabulary_losses", backend, given, divergence, _total, SMALL_CALL, index)
    with without_autocast(student_hidden.device):
        if chosen == "reference":
            index, valid, number = places_of(labels != ignore_index, index)
            hidden, teacher_rows, labels = rows_at(index, student_hidden, teacher_hidden, labels)
            setting |= {"valid": valid, "count": number if reduction == "mean" else None}
            task, soft = reference.vocabulary_losses(
                hidden, *inputs[1:], teacher_rows, *teacher[1:], labels, **setting
            )
            first, second = (_weighted(loss, w) for loss, w in zip((task, soft), weights, strict=True))
            return VocabularyLosses(first + second, task, soft)
        scale = torch.stack([_scalar(weight, student_hidden.device, dtype) for weight in weights])
        setting |= {"index": index, "fused": chosen == "triton"}
        share = torch.ones((), dtype=dtype, device=student_hidden.device)  # factor from a sum to the mean
        if reduction == "mean":
            count = (labels != ignore_index).sum() if index is None else share * index.numel()
            share = safe_divide(share, count)
        found = []

        def stored(needs):
            sums, gradients = chunked.vocabulary_totals(
                needs, *inputs, *teacher, labels, scale * share, **setting
            )
            found.append(sums * share)
            return (scale * found[0]).sum(), gradients

        def later(upstream, needs, hidden, head, bias):
            # The precision is that of the forward pass, even if backward runs under autocast.
            with without_autocast(student_hidden.device):
                return chunked.vocabulary_totals(
                    needs, hidden, head, bias, *teacher, labels, upstream * share, **setting
                )[1]

        total = with_stored_gradients(stored, inputs, None, WIDE)
        if total.requires_grad:
            return VocabularyLosses(total, *_GradientsLater.apply(later, found[0], *inputs))
        return VocabularyLosses(total, *found[0].unbind())


class _GradientsLater(torch.autograd.Function):
    """Return two losses unchanged, and compute their gradients in backward, when their weights are known."""

    @staticmethod
    def forward(ctx, compute: Callable, losses: Tensor, *inputs):
        ctx.compute = compute
        ctx.save_for_backward(*inputs)
        return losses[0].clone(), losses[1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        given = ctx.saved_tensors
        gradients = ctx.compute(torch.stack(upstream), ctx.needs_input_grad[2:], *given)
        return (
            None,
            None,
            *(None if g is None else g.to(x.dtype) for g, x in zip(gradients, given, strict=True)),
        )


def _total(
    student_hidden, student_head, teacher_hidden, teacher_head, divergence: str, backend: str
) -> Tensor:
    """Return the total of a small call, whose labels do not matter."""
    labels = torch.ones(student_hidden.shape[:2], dtype=torch.int64, device=student_hidden.device)
    tensors = (student_hidden, student_head, teacher_hidden, teacher_head)
    return vocabulary_losses(*tensors, labels=labels, divergence=divergence, backend=backend).total


def _weighted(loss: Tensor, weight: Weight) -> Tensor:
    if isinstance(weight, Tensor):
        weight = _scalar(weight, loss.device, loss.dtype)
    elif weight == 1:
        return loss
    return weight * loss


def _scalar(weight: Weight, device: torch.device, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, Tensor):
        return weight.detach().to(device, dtype, non_blocking=True).reshape(())
    return torch.full((), weight, dtype=dtype, device=device)


def _check_common(common: int | None, student: int, teacher: int) -> int:
    if common is None and student != teacher:
        raise ValueError(
            f"student_head, teacher_head: got vocabularies of {student} and {teacher}, expected equal ones, or in "
            "`common` how many entries both models have"
        )
    if common is None:
        return student
    if not 0 < common <= min(student, teacher):
        raise ValueError(f"common: got {common}, expected a number from 1 to {min(student, teacher)}")
    return common
