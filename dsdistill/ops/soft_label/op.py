"""Define the public soft-label losses: checks, normalisation, choice of backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsdistill.ops.backends import choose_backend, vocabulary_order
from dsdistill.ops.common import (
    REDUCTIONS,
    accumulate_dtype,
    check_choice,
    check_device,
    check_index,
    check_mask,
    check_range,
    check_tensor,
    readable,
    reduced,
    with_stored_gradients,
    without_autocast,
)
from dsdistill.ops.gpu import triton_lack
from dsdistill.ops.records import gpu_choice
from dsdistill.ops.soft_label import chunked, reference
from dsdistill.ops.soft_label.divergence import DIVERGENCES, FUSED, Formula

# The backends of all operators over a vocabulary that read heads.
HEAD_BACKENDS = ("chunked", "reference", "triton")
# A call of these shapes compares a backend with `chunked` if a GPU's architecture has no record.
SMALL_CALL = {
    "student_hidden": (1, 65, 40),
    "student_head": (301, 40),
    "teacher_hidden": (1, 65, 48),
    "teacher_head": (301, 48),
}
WIDE = (False, True, False)  # of the gradients at hidden states, head and bias, only the head's is large


def soft_label_alignment(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    mask: Tensor | None = None,
    index: Tensor | None = None,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    mu: float = 0.5,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Return the divergence between the models' predictions over the vocabulary, from hidden states and heads.

    p = softmax(z_T / τ) and q = softmax(z_S / τ), where z = hidden headᵀ + bias. A soft cap c replaces z by
    c tanh(z / c) (Gemma 2). Formulas and sources are in `soft_label/divergence.py`. There is no τ² factor: multiply
    by τ² to keep gradients comparable between temperatures (Hinton et al. 2015).

    Args:
        student_hidden: (B, N, D_s). student_head: (V, D_s), as nn.Linear holds its weight. student_bias: (V,).
        teacher_hidden: (B, N, D_t). teacher_head: (V, D_t). teacher_bias: (V,).
        student_softcap, teacher_softcap: c > 0 of that model's logits, applied before the division by τ; None: no cap.
        mask: (B, N) bool, True = the token counts. Default: all.
        index: (K,) int64, ascending, instead of `mask`: flat places b·N + n of the tokens that count. With it, nothing
            waits for the device to find them. The values are not checked.
        temperature: τ > 0.
        divergence: "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "akl" (all in nats), "tvd", or
            "logit_mse" (a squared logit, divided by τ²).
        beta: the teacher's share in the mixture of jsd. alpha: the teacher's share in the mixture of skew_kl, or the
            student's in that of skew_reverse_kl. mu: largest total probability of the vocabulary's head in akl. All are
            in [0, 1].
        reduction: "mean" over valid tokens, or "sum".
        backend: "auto", "reference", "chunked" or "triton" (which lacks skew_reverse_kl, akl and logit_mse).

    Returns:
        Scalar, float32 (float64 if any input is), with gradients to the student's hidden states, head and bias
        (each only if it requires them). With nothing valid it is 0, connected to the graph.

    Raises:
        ValueError: wrong shape, dtype, device or name, a soft cap that is not positive, both `mask` and `index`, or
            heads of unequal vocabulary. Heads padded to unequal sizes must be sliced to the common vocabulary: a
            padding row would receive probability.
    """
    check_models(student_hidden, student_head, student_bias, teacher_hidden, teacher_head, teacher_bias)
    batch, tokens, _ = student_hidden.shape
    if teacher_head.shape[0] != student_head.shape[0]:
        raise ValueError(
            f"student_head, teacher_head: got vocabularies of {student_head.shape[0]} and {teacher_head.shape[0]}, "
            "expected equal ones; slice both heads to the tokens that both models have"
        )
    check_mask(mask, (batch, tokens), student_hidden)
    check_index(index, mask, student_hidden)
    formula = check_formula(temperature, divergence, beta, alpha, mu)
    caps = {"student_softcap": student_softcap, "teacher_softcap": teacher_softcap}
    check_softcaps(**caps)
    check_choice("reduction", reduction, REDUCTIONS)

    tensors = (student_hidden, student_head, teacher_hidden, teacher_head, student_bias, teacher_bias)
    dtype = accumulate_dtype(*tensors)
    setting: dict[str, Any] = {"dtype": dtype, **formula, **caps}
    chosen = choose(
        "soft_label_alignment", backend, tensors, divergence, soft_label_alignment, SMALL_CALL, index
    )
    with without_autocast(student_hidden.device):
        count: Tensor | int | None = None
        if reduction == "mean" and mask is not None:
            count = mask.sum()
        elif reduction == "mean":
            count = batch * tokens if index is None else index.numel()
        if chosen == "reference":
            if mask is not None:
                index, mask, count = places_of(mask, None)
                count = None if reduction == "sum" else count
            hidden, teacher = rows_at(index, student_hidden, teacher_hidden)
            rows = reference.soft_label_rows(
                hidden, student_head, teacher, *tensors[3:], mask=mask, **setting
            )
            return reduced(rows, count)
        setting |= {"mask": mask, "index": index, "fused": chosen == "triton"}
        return with_stored_gradients(
            lambda needs: chunked.soft_label_total(needs, *tensors, **setting),
            (student_hidden, student_head, student_bias),
            count,
            WIDE,
        )


def token_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    index: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Return the cross-entropy of the next token, in nats, from the hidden states before the output layer.

    Args:
        hidden: (B, N, D). head: (V, D), as nn.Linear holds its weight. bias: (V,).
        labels: (B, N) int64 in [0, V) or `ignore_index`, aligned with `hidden`: labels[b, n] is what
            hidden[b, n] should predict. Nothing is shifted here.
        softcap: c > 0: the logits z are replaced by c tanh(z / c) (Gemma 2). None: they are used as they are.
        index: (K,) int64, ascending: flat places b·N + n of the tokens that count. Without it, the tokens count whose
            label is not `ignore_index`. The labels at these places must be in [0, V); other labels are not read.
            Nothing waits for the device to find the places. The values are not checked.
        label_smoothing: ε in [0, 1]: the target is 1 − ε at the label, plus ε/V at every entry (Szegedy et al. 2016,
            section 7), as in torch's cross_entropy.
        reduction: "mean" over the tokens that count, or "sum".
        backend: "auto", "reference", "chunked" or "triton".

    Returns:
        Scalar, float32 (float64 if any input is), with gradients to hidden, head and bias (each only if it
        requires them). With every label ignored it is 0, connected to the graph.

    Raises:
        ValueError: wrong shape, dtype, device or name, or a soft cap that is not positive.
    """
    check_tensor("hidden", hidden, {"B": None, "N": None, "D": None})
    check_tensor("head", head, {"V": None, "D": hidden.shape[2]}, like=hidden)
    if bias is not None:
        check_tensor("bias", bias, {"V": head.shape[0]}, like=hidden)
    check_labels(labels, hidden)
    check_index(index, None, hidden)
    check_softcaps(softcap=softcap)
    check_range("label_smoothing", label_smoothing, 0, 1)
    check_choice("reduction", reduction, REDUCTIONS)
    dtype = accumulate_dtype(hidden, head, bias)
    small = {name: shape for name, shape in SMALL_CALL.items() if name.startswith("student")}
    chosen = choose(
        "token_cross_entropy", backend, (hidden, head, bias), "task", _task_of_logits, small, index
    )
    with without_autocast(hidden.device):
        count: Tensor | int | None = None
        setting: dict[str, Any] = {"ignore_index": ignore_index, "dtype": dtype}
        setting |= {"softcap": softcap, "label_smoothing": float(label_smoothing)}
        if chosen == "reference":
            index, valid, number = places_of(labels != ignore_index, index)
            hidden, labels = rows_at(index, hidden, labels)
            count = number if reduction == "mean" else None
            return reference.cross_entropy(hidden, head, labels, bias, valid=valid, count=count, **setting)
        setting["index"] = index
        if reduction == "mean" and index is not None:
            count = index.numel()
        elif reduction == "mean":
            count = (labels != ignore_index).sum()
        return with_stored_gradients(
            lambda needs: chunked.cross_entropy_total(
                needs, hidden, head, labels, bias, **setting, fused=chosen == "triton"
            ),
            (hidden, head, bias),
            count,
            WIDE,
        )


def logit_alignment(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    mu: float = 0.5,
    reduction: str = "mean",
) -> Tensor:
    """Return a divergence of `soft_label_alignment` between logits that already exist, such as a classifier's.

    Args:
        student_logits, teacher_logits: (..., C). mask: (...) bool, True = the row counts.
        All others are as for `soft_label_alignment`; "mean" divides by the number of valid rows.

    Returns:
        Scalar, float32 (float64 if any input is), with gradients to `student_logits`. With nothing valid it is 0.

    Raises:
        ValueError: wrong shape, dtype, device or name.
    """
    if student_logits.dim() < 1:
        raise ValueError("student_logits: got a scalar, expected (..., C)")
    shape = {f"axis {i}": size for i, size in enumerate(student_logits.shape)}
    check_tensor("student_logits", student_logits, shape)
    check_tensor("teacher_logits", teacher_logits, shape, like=student_logits)
    check_mask(mask, tuple(student_logits.shape[:-1]), student_logits)
    formula = check_formula(temperature, divergence, beta, alpha, mu)
    check_choice("reduction", reduction, REDUCTIONS)
    dtype = accumulate_dtype(student_logits, teacher_logits)
    with without_autocast(student_logits.device):
        if mask is not None:
            student_logits = student_logits.masked_fill(~mask[..., None], 0)
            teacher_logits = teacher_logits.masked_fill(~mask[..., None], 0)
        rows = reference.logit_rows(student_logits.to(dtype), teacher_logits.to(dtype), mask, **formula)
        count: Tensor | int | None = None
        if reduction == "mean":
            count = rows.numel() if mask is None else mask.sum()
        return reduced(rows, count)


def check_models(
    student_hidden: Tensor,
    student_head: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    teacher_bias: Tensor | None,
) -> None:
    check_tensor("student_hidden", student_hidden, {"B": None, "N": None, "D_s": None})
    batch, tokens, width = student_hidden.shape
    check_tensor(
        "teacher_hidden", teacher_hidden, {"B": batch, "N": tokens, "D_t": None}, like=student_hidden
    )
    check_tensor("student_head", student_head, {"V": None, "D_s": width}, like=student_hidden)
    check_tensor(
        "teacher_head", teacher_head, {"V": None, "D_t": teacher_hidden.shape[2]}, like=student_hidden
    )
    for name, bias, head in (
        ("student_bias", student_bias, student_head),
        ("teacher_bias", teacher_bias, teacher_head),
    ):
        if bias is not None:
            check_tensor(name, bias, {"V": head.shape[0]}, like=student_hidden)


def check_labels(labels: Tensor, hidden: Tensor) -> None:
    shape = tuple(hidden.shape[:2])
    if tuple(labels.shape) != shape or labels.dtype != torch.int64:
        raise ValueError(f"labels: got {tuple(labels.shape)} {labels.dtype}, expected {shape} int64")
    check_device("labels", labels, hidden)


def rows_at(index: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """Return the rows of tensors (B, N, …) at the flat places (K,), as (1, K, …); without places, the tensors."""
    return [x if index is None else x.flatten(0, 1).index_select(0, index)[None] for x in tensors]


def places_of(valid: Tensor, index: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | int]:
    """Return the places of the tokens that count, or a mask of them, and how many; no places and no mask if all count.

    valid: (B, N) bool, not read if `index` already gives places. It is returned as the mask if its values cannot be
    read without waiting.
    """
    if index is not None:
        return index, None, index.numel()
    if not readable(valid):
        return None, valid, valid.sum()
    if bool(valid.all()):
        return None, None, valid.numel()
    index = valid.flatten().nonzero()[:, 0]
    return index, None, index.numel()


def check_formula(temperature: float, divergence: str, beta: float, alpha: float, mu: float) -> dict:
    """Check a divergence's settings; return the backends' arguments for it, `temperature` and `formula`."""
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected a number above 0")
    check_choice("divergence", divergence, DIVERGENCES)
    check_range("beta", beta, 0, 1)
    check_range("alpha", alpha, 0, 1)
    check_range("mu", mu, 0, 1)
    formula = Formula(divergence, float(beta), float(alpha), float(mu))
    return {"temperature": float(temperature), "formula": formula}


def check_softcaps(**caps: float | None) -> None:
    for name, cap in caps.items():
        if cap is not None and not 0 < cap < math.inf:
            raise ValueError(f"{name}: got {cap}, expected a number above 0, or None")


def choose(
    operator: str,
    backend: str,
    tensors: Sequence[Tensor | None],
    variant: str,
    function: Callable[..., Tensor],
    small: dict[str, tuple[int, ...]],
    index: Tensor | None,
) -> str:
    """Return the backend of an operator over a vocabulary. tensors: the student's hidden states and head come first.

    index: the tokens that count; None: all. variant, function, small: as for `gpu_choice`.
    """
    missing = {}
    if backend in ("cpp", "cuda"):
        missing[backend] = f"losses over a vocabulary have only {', '.join(map(repr, HEAD_BACKENDS))}"
    like = tensors[0]
    head = tensors[1]
    assert like is not None and head is not None  # the student is always given
    tokens = like.shape[0] * like.shape[1]
    preference = ["chunked", "reference"]
    if like.device.type == "cpu":
        counted = tokens if index is None else index.numel()
        preference = [*vocabulary_order(counted * head.shape[0])]
    if backend == "auto" and like.device.type == "cpu":
        return choose_backend(operator, backend, preference=preference, missing=missing)
    lack = triton_lack(*tensors)
    if not lack and variant not in (*FUSED, "task"):
        lack = f"the kernel has no divergence {variant}"
    if lack:
        missing["triton"] = lack
    else:
        preference.append("triton")
    fast = gpu_choice(operator, variant, like, tokens, {"triton": lack}, function, small)
    if fast and backend == "auto":
        preference = [fast, *preference]
    return choose_backend(operator, backend, preference=preference, missing=missing)


def _task_of_logits(student_hidden: Tensor, student_head: Tensor, divergence: str, backend: str) -> Tensor:
    """Return the cross-entropy of a small call, whose labels do not matter. divergence: the variant; it is not read."""
    labels = torch.ones(student_hidden.shape[:2], dtype=torch.int64, device=student_hidden.device)
    return token_cross_entropy(student_hidden, student_head, labels, backend=backend)
