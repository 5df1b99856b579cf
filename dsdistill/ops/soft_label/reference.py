"""Define the soft-label losses in plain PyTorch, with whole logits, for any floating dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsdistill.ops.common import reduced, safe_divide, zero_masked
from dsdistill.ops.soft_label.divergence import Formula, described, divergence_rows


def logits(
    hidden: Tensor, head: Tensor, bias: Tensor | None, dtype: torch.dtype, softcap: float | None = None
) -> Tensor:
    z = F.linear(hidden.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype))
    return z if softcap is None else softcap * (z / softcap).tanh()


def logit_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None,
    *,
    temperature: float,
    formula: Formula,
) -> Tensor:
    """Return the divergence of each row of (..., V) logits, 0 where masked."""
    teacher_logits = teacher_logits.detach()
    if temperature != 1:
        student_logits, teacher_logits = student_logits / temperature, teacher_logits / temperature
    log_q, log_p = described(student_logits, formula), described(teacher_logits, formula)
    rows = divergence_rows(log_p, log_q, log_p.exp(), formula)
    return rows if mask is None else rows.masked_fill(~mask, 0)


def soft_label_rows(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    *,
    mask: Tensor | None,
    dtype: torch.dtype,
    student_softcap: float | None,
    teacher_softcap: float | None,
    **given,
) -> Tensor:
    """Return the divergence of each token, (B, N), 0 where masked. Shapes are those of `soft_label_alignment`."""
    student_hidden, teacher_hidden = zero_masked(student_hidden, mask), zero_masked(teacher_hidden, mask)
    student_logits = logits(student_hidden, student_head, student_bias, dtype, student_softcap)
    with torch.no_grad():
        teacher_logits = logits(teacher_hidden, teacher_head, teacher_bias, dtype, teacher_softcap)
    return logit_rows(student_logits, teacher_logits, mask, **given)


def cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    *,
    valid: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
    softcap: float | None,
    label_smoothing: float,
    count: Tensor | int | None,
) -> Tensor:
    """Return Σ −Σ_v t_v log softmax(z)_v over the tokens that count, divided by count; z = hidden headᵀ + bias.

    t is ε/V everywhere, plus 1 − ε at the label. z is soft-capped if softcap is given.
    valid: (B, N) bool, the tokens that count; None: all. count: None for no division; a number if all tokens count.
    """
    z = logits(zero_masked(hidden, valid), head, bias, dtype, softcap)
    return _cross_entropy(z, labels, valid, ignore_index, label_smoothing, count)


def _cross_entropy(
    z: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    count: Tensor | int | None,
) -> Tensor:
    labels = labels if valid is None else labels.masked_fill(~valid, ignore_index)
    mean = isinstance(count, int) and count > 0  # one operation instead of two
    found = F.cross_entropy(
        z.flatten(0, -2),
        labels.flatten(),
        ignore_index=ignore_index,
        reduction="mean" if mean else "sum",
        label_smoothing=label_smoothing,
    )
    return found if mean or count is None else safe_divide(found, count)


def vocabulary_losses(
    student_hidden: Tensor,
    student_head: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor,
    *,
    valid: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
    student_softcap: float | None,
    teacher_softcap: float | None,
    count: Tensor | int | None,
    **given,
) -> tuple[Tensor, Tensor]:
    """Return `cross_entropy`, and the same tokens' divergence over the teacher's entries, divided by the same count."""
    z = logits(zero_masked(student_hidden, valid), student_head, student_bias, dtype, student_softcap)
    with torch.no_grad():
        hidden = zero_masked(teacher_hidden, valid)
        teacher_logits = logits(hidden, teacher_head, teacher_bias, dtype, teacher_softcap)
    task = _cross_entropy(z, labels, valid, ignore_index, label_smoothing, count)
    compared = z if z.shape[-1] == teacher_head.shape[0] else z[..., : teacher_head.shape[0]]
    return task, reduced(logit_rows(compared, teacher_logits, valid, **given), count)
