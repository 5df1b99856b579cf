"""Define the soft-label losses in plain PyTorch, with whole logits, for any floating dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsdistill.ops.common import index_mask, zero_masked
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
    log_q = described(student_logits / temperature, formula)
    log_p = described(teacher_logits.detach() / temperature, formula)
    rows = divergence_rows(log_p, log_q, log_p.exp(), formula)
    return rows if mask is None else rows.masked_fill(~mask, 0)


def soft_label_total(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    *,
    mask: Tensor | None,
    index: Tensor | None,
    dtype: torch.dtype,
    student_softcap: float | None,
    teacher_softcap: float | None,
    **given,
) -> Tensor:
    """Return the sum over valid tokens, undivided. Shapes as `soft_label_alignment`; given as `logit_rows`."""
    if index is not None:
        mask = index_mask(index, student_hidden.shape[:2])
    student_hidden, teacher_hidden = zero_masked(student_hidden, mask), zero_masked(teacher_hidden, mask)
    student_logits = logits(student_hidden, student_head, student_bias, dtype, student_softcap)
    with torch.no_grad():
        teacher_logits = logits(teacher_hidden, teacher_head, teacher_bias, dtype, teacher_softcap)
    return logit_rows(student_logits, teacher_logits, mask, **given).sum()


def cross_entropy_total(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    *,
    index: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
    softcap: float | None,
    label_smoothing: float,
) -> Tensor:
    """Return Σ −Σ_v t_v log softmax(z)_v over the tokens that count; z = hidden headᵀ + bias, soft-capped if asked for.

    t is ε/V everywhere, plus 1 − ε at the label.
    """
    if index is not None:
        labels = labels.masked_fill(~index_mask(index, labels.shape), ignore_index)
    hidden = zero_masked(hidden, labels != ignore_index)
    return F.cross_entropy(
        logits(hidden, head, bias, dtype, softcap).flatten(0, -2),
        labels.flatten(),
        ignore_index=ignore_index,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def vocabulary_totals(
    student_hidden: Tensor,
    student_head: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor,
    *,
    index: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
    student_softcap: float | None,
    teacher_softcap: float | None,
    **given,
) -> Tensor:
    """Return (2,): `cross_entropy_total`, and `soft_label_total` of the same tokens over the teacher's entries."""
    common = teacher_head.shape[0]
    task = cross_entropy_total(
        student_hidden,
        student_head,
        labels,
        student_bias,
        index=index,
        ignore_index=ignore_index,
        dtype=dtype,
        softcap=student_softcap,
        label_smoothing=label_smoothing,
    )
    soft = soft_label_total(
        student_hidden,
        student_head[:common],
        teacher_hidden,
        teacher_head,
        None if student_bias is None else student_bias[:common],
        teacher_bias,
        mask=None if index is not None else labels != ignore_index,
        index=index,
        dtype=dtype,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        **given,
    )
    return torch.stack([task, soft])
