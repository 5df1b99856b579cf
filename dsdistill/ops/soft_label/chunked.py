"""Soft-label losses in plain PyTorch, a block of tokens at a time: the logits of a block, never of the batch.

With g = ∂L/∂z of a block's student logits: dh = g W, dW += gᵀ h, db += Σ g, all in the forward pass. Tokens that
do not count are left out before the head, which is nearly all of the work; finding them waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsdistill.ops.soft_label.divergence import divergence_rows, logit_gradient

# Elements of one block of logits: 16 MiB in float32.
BLOCK_ELEMENTS = 1 << 22
MAX_TOKENS, MIN_TOKENS = 256, 64


class Head:
    """(V, D) matrix and (V,) bias of an output layer, ready to multiply blocks in the accumulating dtype."""

    def __init__(self, matrix: Tensor, bias: Tensor | None, dtype: torch.dtype):
        # Half precision on a GPU multiplies as it is, summing in float32; elsewhere the matrix is widened once.
        self.native = (
            matrix.is_cuda and matrix.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32
        )
        self.matrix = matrix.detach() if self.native else matrix.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.dtype = dtype

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        if self.native:
            return torch.mm(left.to(self.matrix.dtype), right.to(self.matrix.dtype), out_dtype=self.dtype)
        return left.to(self.dtype) @ right.to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        z = self.product(hidden, self.matrix.t())
        return z if self.bias is None else z.add_(self.bias)


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
    dtype: torch.dtype,
    temperature: float,
    divergence: str,
    beta: float,
    alpha: float,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The same sum as `reference.soft_label_total`; gradients at student hidden, head and bias if needed."""
    student, teacher = Head(student_head, student_bias, dtype), Head(teacher_head, teacher_bias, dtype)
    teacher_hidden = teacher_hidden.detach().flatten(0, 1)

    def block(z_s: Tensor, tokens: Tensor, with_gradient: bool):
        log_q = z_s.div_(temperature).log_softmax(-1)
        log_p = teacher.logits(teacher_hidden[tokens]).div_(temperature).log_softmax(-1)
        p = log_p.exp()
        value = divergence_rows(log_p, log_q, p, divergence, beta, alpha).sum()
        if not with_gradient:
            return value, None
        return value, logit_gradient(log_p, log_q, p, divergence, beta, alpha).div_(temperature)

    return _over_blocks(needs, student_hidden, student, None if mask is None else mask.flatten(), block)


def cross_entropy_total(
    needs: Sequence[bool],
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    *,
    ignore_index: int,
    dtype: torch.dtype,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The same sum as `reference.cross_entropy_total`; gradients at hidden, head and bias if needed."""
    labels = labels.flatten()

    def block(z: Tensor, tokens: Tensor, with_gradient: bool):
        log_q = z.log_softmax(-1)
        gold = labels[tokens][:, None]
        value = -log_q.gather(1, gold).sum()
        if not with_gradient:
            return value, None
        gradient = log_q.exp_()
        return value, gradient.scatter_add_(1, gold, gradient.new_full(gold.shape, -1))

    return _over_blocks(needs, hidden, Head(head, bias, dtype), labels != ignore_index, block)


def _over_blocks(
    needs: Sequence[bool],
    hidden: Tensor,
    head: Head,
    counted: Tensor | None,
    block: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]],
):
    """Σ over blocks of counted tokens of `block(logits, token indices, with gradient)`, and the gradients."""
    flat = hidden.detach().flatten(0, 1)
    total = torch.zeros((), dtype=head.dtype, device=flat.device)
    d_hidden = torch.zeros(flat.shape, dtype=head.dtype, device=flat.device) if needs[0] else None
    d_matrix = torch.zeros(head.matrix.shape, dtype=head.dtype, device=flat.device) if needs[1] else None
    d_bias = torch.zeros_like(head.bias) if needs[2] else None
    indices = torch.arange(flat.shape[0], device=flat.device) if counted is None else counted.nonzero()[:, 0]
    size = max(MIN_TOKENS, min(MAX_TOKENS, BLOCK_ELEMENTS // max(1, head.matrix.shape[0])))
    for tokens in indices.split(size):
        if not tokens.numel():
            continue
        rows = flat[tokens]
        value, gradient = block(head.logits(rows), tokens, any(needs))
        total += value
        if needs[0]:
            d_hidden[tokens] = head.product(gradient, head.matrix)
        if needs[1]:
            if head.native:
                d_matrix += head.product(gradient.t(), rows)
            else:
                d_matrix.addmm_(gradient.t(), rows.to(head.dtype))
        if needs[2]:
            d_bias += gradient.sum(0)
    return total, (None if d_hidden is None else d_hidden.view(hidden.shape), d_matrix, d_bias)
