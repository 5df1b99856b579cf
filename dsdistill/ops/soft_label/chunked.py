"""Compute losses over a vocabulary in plain PyTorch, from the logits of one block of tokens at a time.

With g = ∂L/∂z of a block's student logits (before a soft cap): dh = g W, dW += gᵀ h, db += Σ g, all in the forward
pass. Several losses of the same tokens share the student's logits and these products: their g are multiplied by their
weights and added up. Tokens that do not count are left out before the product with the head, because this product is
nearly all of the work. Finding these tokens waits for the device, unless the caller passes `index`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dsdistill.ops.common import blocks
from dsdistill.ops.soft_label.fused import aligned_rows, fused_block
from dsdistill.ops.soft_label.head import Head, block_tokens, panel_tokens, slice_tokens
from dsdistill.ops.soft_label.losses import Labels, Loss, Places, SoftLabels

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # at hidden states, head and bias


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
    fused: bool = False,
    **given,
) -> tuple[Tensor, Gradients]:
    """Return the same sum as `reference.soft_label_total`, and gradients at student hidden, head and bias if needed."""
    student = Head(student_head, student_bias, dtype, student_softcap, fused)
    teacher = Head(teacher_head, teacher_bias, dtype, teacher_softcap, fused)
    if index is None and mask is not None:
        index = mask.flatten().nonzero()[:, 0]
    loss = SoftLabels(teacher_hidden, teacher, **given)
    totals, gradients = _over_blocks(needs, student_hidden, student, index, [loss], None, fused)
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
    fused: bool = False,
) -> tuple[Tensor, Gradients]:
    """Return the same sum as `reference.cross_entropy_total`, and gradients at hidden, head and bias if needed."""
    if index is None:
        index = (labels != ignore_index).flatten().nonzero()[:, 0]
    loss = Labels(labels, label_smoothing)
    own = Head(head, bias, dtype, softcap, fused)
    totals, gradients = _over_blocks(needs, hidden, own, index, [loss], None, fused)
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
    fused: bool = False,
    **given,
) -> tuple[Tensor, Gradients]:
    """Return the sums of cross-entropy and of soft labels, (2,), and the gradients of weights · sums.

    weights: (2,), in `dtype`. The teacher's head has only the entries that both models have.
    """
    student = Head(student_head, student_bias, dtype, student_softcap, fused)
    teacher = Head(teacher_head, teacher_bias, dtype, teacher_softcap, fused)
    if index is None:
        index = (labels != ignore_index).flatten().nonzero()[:, 0]
    losses: list[Loss] = [Labels(labels, label_smoothing), SoftLabels(teacher_hidden, teacher, **given)]
    return _over_blocks(needs, student_hidden, student, index, losses, weights, fused)


def _blocks(count: int, index: Tensor | None, size: int) -> Iterator[Places]:
    count = count if index is None else len(index)
    for start in blocks(range(0, count, size)):
        places = slice(start, min(start + size, count))
        yield places if index is None else index[places]  # a range is read without a copy


def _within(places: Places, part: slice) -> Places:
    if isinstance(places, slice):
        return slice(places.start + part.start, min(places.start + part.stop, places.stop))
    return places[part]


def _over_blocks(
    needs: Sequence[bool],
    hidden: Tensor,
    head: Head,
    index: Tensor | None,
    losses: Sequence[Loss],
    weights: Tensor | None,
    fused: bool,
) -> tuple[Tensor, Gradients]:
    """Return each loss's sum over the tokens that count, (losses,), and the gradients of weights · sums.

    index: (K,) flat places of the tokens that count; None: all. weights: (losses,); None: 1. fused: use the GPU kernel.
    """
    flat, vocabulary = hidden.detach().flatten(0, 1), head.matrix.shape[0]
    totals = torch.zeros(len(losses), dtype=head.dtype, device=flat.device)
    d_hidden = torch.zeros(flat.shape, dtype=head.dtype, device=flat.device) if needs[0] else None
    d_matrix: Tensor | None = None  # made by the first block: zeros would be one more pass over (V, D)
    d_bias = torch.zeros_like(head.bias) if head.bias is not None and needs[2] else None
    given = losses, weights, totals, any(needs)
    size = panel = block_tokens(head.on_gpu, vocabulary, sum(loss.entries for loss in losses))
    if fused and any(needs) and head.gradient_dtype != head.dtype:
        panel = panel_tokens(size, vocabulary)
    for places in _blocks(len(flat), index, panel):
        rows = head.operand(flat[places])
        gradient: Tensor | None = None  # frees the previous panel's gradient first
        if panel > size:
            gradient = aligned_rows(len(rows), vocabulary, head.gradient_dtype, flat.device)
            for start in blocks(range(0, len(rows), size)):
                part = slice(start, min(start + size, len(rows)))
                fused_block(head, rows[part], _within(places, part), *given, gradient[part])
        elif fused:
            gradient = fused_block(head, rows, places, *given, None)
        else:
            gradient = _block(head, rows, places, *given)
        if gradient is None:
            continue
        gradient = gradient.to(head.gradient_dtype)
        if d_bias is not None:
            d_bias += gradient.sum(0, dtype=head.dtype)
        if d_hidden is not None:
            d_hidden[places] = head.at_hidden(gradient)
        if needs[1]:
            d_matrix = head.add_at_matrix(d_matrix, gradient, rows)
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
    """Add the losses of a block to `totals`; return the gradient at its logits, (tokens, V), if asked for.

    The gradient overwrites the logits, slice by slice.
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
