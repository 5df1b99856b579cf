"""Compute losses over a vocabulary in plain PyTorch from the logits of a block of tokens, never of the batch.

With g = ∂L/∂z of a block's student logits (before a soft cap): dh = g W, dW += gᵀ h, db += Σ g, all in the forward
pass. Several losses of the same tokens share the student's logits and these products: their g are added up, each times
its weight. Tokens that do not count are left out before the head, which is nearly all of the work; finding them waits
for the device, unless the caller says where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dsdistill.ops.common import blocks
from dsdistill.ops.soft_label.divergence import divergence_rows, logit_gradient
from dsdistill.ops.soft_label.head import Head, block_tokens, slice_tokens

Places = Tensor | slice  # of a block's tokens among all: (K,) int64, or a range
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # at student hidden, head and bias


class Loss(Protocol):
    """A Loss is one loss over the vocabulary."""

    entries: int  # of further heads, whose logits lie beside the student's

    def block(self, places: Places) -> Tensor:
        """Return what the loss needs of a block's tokens, its first axis the tokens."""

    def rows(self, z: Tensor, given: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Return the sum over some tokens of a block, and the gradient at the first of their logits z (tokens, V).

        given: the same tokens of what `block` returned; may be overwritten, z may not.
        """


class SoftLabels:
    """SoftLabels are the divergence between both models' predictions over the entries of the teacher's head."""

    def __init__(
        self,
        teacher_hidden: Tensor,
        teacher: Head,
        *,
        temperature: float,
        divergence: str,
        beta: float,
        alpha: float,
    ):
        self.entries = teacher.matrix.shape[0]
        self._hidden, self._teacher = teacher_hidden.detach().flatten(0, 1), teacher
        self._temperature, self._formula = temperature, (divergence, beta, alpha)

    def block(self, places: Places) -> Tensor:
        return self._teacher.logits(self._hidden[places])

    def rows(self, z: Tensor, given: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        log_q = (z[:, : self.entries] / self._temperature).log_softmax(-1)
        log_p = given.div_(self._temperature).log_softmax(-1)
        p = torch.exp(log_p, out=given)
        value = divergence_rows(log_p, log_q, p, *self._formula).sum()
        if not with_gradient:
            return value, None
        return value, logit_gradient(log_p, log_q, p, *self._formula).div_(self._temperature)


class Labels:
    """Labels are cross-entropy against labels, with ε of label smoothing."""

    entries = 0

    def __init__(self, labels: Tensor, label_smoothing: float):
        self._labels, self._smoothing = labels.flatten(), label_smoothing

    def block(self, places: Places) -> Tensor:
        return self._labels[places][:, None]

    def rows(self, z: Tensor, given: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        log_q = z.log_softmax(-1)
        own, spread = 1 - self._smoothing, self._smoothing / z.shape[1]  # t: of the label, and of every entry
        value = -own * log_q.gather(1, given).sum()
        if self._smoothing:
            value -= self._smoothing * log_q.mean(-1).sum()
        if not with_gradient:
            return value, None
        gradient = log_q.exp_()  # of a softmax: softmax − t
        if self._smoothing:
            gradient.sub_(spread)
        return value, gradient.scatter_add_(1, given, gradient.new_full(given.shape, -own))


def soft_label_total(
    needs: Sequence[bool],
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
    **formula,
) -> tuple[Tensor, Gradients]:
    """Return the same sum as `reference.soft_label_total`, and gradients at student hidden, head and bias if needed."""
    student = Head(student_head, student_bias, dtype, student_softcap)
    teacher = Head(teacher_head, teacher_bias, dtype, teacher_softcap)
    if index is None and mask is not None:
        index = mask.flatten().nonzero()[:, 0]
    loss = SoftLabels(teacher_hidden, teacher, **formula)
    totals, gradients = _over_blocks(needs, student_hidden, student, index, [loss], None)
    return totals[0], gradients


def cross_entropy_total(
    needs: Sequence[bool],
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
) -> tuple[Tensor, Gradients]:
    """Return the same sum as `reference.cross_entropy_total`, and gradients at hidden, head and bias if needed."""
    if index is None:
        index = (labels != ignore_index).flatten().nonzero()[:, 0]
    loss = Labels(labels, label_smoothing)
    totals, gradients = _over_blocks(needs, hidden, Head(head, bias, dtype, softcap), index, [loss], None)
    return totals[0], gradients


def vocabulary_totals(
    needs: Sequence[bool],
    student_hidden: Tensor,
    student_head: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    *,
    index: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
    student_softcap: float | None,
    teacher_softcap: float | None,
    label_smoothing: float,
    **formula,
) -> tuple[Tensor, Gradients]:
    """Return (2,) sums, of cross-entropy and of soft labels, and the gradients of weights · sums.

    weights: (2,), in `dtype`. The teacher's head has as many entries as both models have.
    """
    student = Head(student_head, student_bias, dtype, student_softcap)
    teacher = Head(teacher_head, teacher_bias, dtype, teacher_softcap)
    if index is None:
        index = (labels != ignore_index).flatten().nonzero()[:, 0]
    losses: list[Loss] = [Labels(labels, label_smoothing), SoftLabels(teacher_hidden, teacher, **formula)]
    if not student.native:
        return _over_blocks(needs, student_hidden, student, index, losses, weights)
    # g goes through half precision there, whose float16 would not hold a weight of 1 / count.
    largest = weights.abs().max()
    relative = weights / torch.where(largest > 0, largest, 1)
    totals, gradients = _over_blocks(needs, student_hidden, student, index, losses, relative)
    for gradient in gradients:
        if gradient is not None:
            gradient.mul_(largest)
    return totals, gradients


def _blocks(count: int, index: Tensor | None, size: int) -> Iterator[Places]:
    count = count if index is None else len(index)
    for start in blocks(range(0, count, size)):
        places = slice(start, min(start + size, count))
        yield places if index is None else index[places]  # ranges are read where they lie


def _over_blocks(
    needs: Sequence[bool],
    hidden: Tensor,
    head: Head,
    index: Tensor | None,
    losses: Sequence[Loss],
    weights: Tensor | None,
) -> tuple[Tensor, Gradients]:
    """Return (losses,) sums over the tokens that count, and the gradients of their sum, each times its weight.

    index: (K,) flat places of the tokens that count; None: all. weights: (losses,); None: 1.
    """
    flat, vocabulary = hidden.detach().flatten(0, 1), head.matrix.shape[0]
    totals = torch.zeros(len(losses), dtype=head.dtype, device=flat.device)
    d_hidden = torch.zeros(flat.shape, dtype=head.dtype, device=flat.device) if needs[0] else None
    d_matrix: Tensor | None = None  # made by the first block: zeros would be one more pass over (V, D)
    d_bias = torch.zeros_like(head.bias) if head.bias is not None and needs[2] else None
    size = block_tokens(head.on_gpu, vocabulary, sum(loss.entries for loss in losses))
    for places in _blocks(len(flat), index, size):
        rows = head.operand(flat[places])
        gradient = _block(head, rows, places, losses, weights, totals, any(needs))
        if gradient is None:
            continue
        if d_bias is not None:
            d_bias += gradient.sum(0)
        gradient = head.operand(gradient)
        if d_hidden is not None:
            d_hidden[places] = head.product(gradient, head.matrix)
        if needs[1] and d_matrix is None:
            d_matrix = head.product(gradient.t(), rows)
        elif d_matrix is not None:
            head.add_product(d_matrix, gradient.t(), rows)
    if needs[1] and d_matrix is None:
        d_matrix = torch.zeros(head.matrix.shape, dtype=head.dtype, device=flat.device)
    return totals, (None if d_hidden is None else d_hidden.view(hidden.shape), d_matrix, d_bias)


def _block(
    head: Head,
    rows: Tensor,
    places: Places,
    losses: Sequence[Loss],
    weights: Tensor | None,
    totals: Tensor,
    with_gradient: bool,
) -> Tensor | None:
    """Add the losses of a block to `totals`; return (tokens, V), the gradient at its logits, if asked for.

    The gradient takes the place of the logits, slice by slice.
    """
    z = head.logits(rows)
    given = [loss.block(places) for loss in losses]
    size = slice_tokens(head.on_gpu, z.shape[1])
    for start in blocks(range(0, len(z), size)):
        part = slice(start, start + size)
        whole: Tensor | None = None
        for place, loss in enumerate(losses):
            value, gradient = loss.rows(z[part], given[place][part], with_gradient)
            totals[place] += value
            if gradient is None:
                continue
            if weights is not None:
                gradient.mul_(weights[place])
            if whole is None:
                whole = gradient
            else:  # a later loss reads no more entries than the first
                whole[:, : gradient.shape[1]] += gradient
        if whole is not None:
            z[part] = head.below_cap(whole, z[part])
    return z if with_gradient else None
