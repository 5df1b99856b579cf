"""Soft-label losses in plain PyTorch, a block of tokens at a time: the logits of a block, never of the batch.

With g = ∂L/∂z of a block's student logits (before a soft cap): dh = g W, dW += gᵀ h, db += Σ g, all in the forward
pass. Tokens that
do not count are left out before the head, which is nearly all of the work; finding them waits for the device, unless
the caller says where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsdistill.ops.soft_label.divergence import divergence_rows, logit_gradient

# Elements of one block of logits: 32 MiB in float32, so that the products with the heads are worth their calls.
BLOCK_ELEMENTS = 1 << 23
MAX_TOKENS, MIN_TOKENS = 256, 64
# Of a slice of a block in which everything between the products is done: on a CPU its passes then stay in cache.
SLICE_ELEMENTS = 1 << 18


class Head:
    """(V, D) matrix, (V,) bias and soft cap of an output layer, ready to multiply blocks in the accumulating dtype."""

    def __init__(self, matrix: Tensor, bias: Tensor | None, dtype: torch.dtype, softcap: float | None = None):
        # Half precision on a GPU multiplies as it is, summing in float32; elsewhere the matrix is widened once.
        self.native = (
            matrix.is_cuda and matrix.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32
        )
        self.matrix = matrix.detach() if self.native else matrix.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.dtype = dtype
        self.softcap = softcap

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        if self.native:
            return torch.mm(left.to(self.matrix.dtype), right.to(self.matrix.dtype), out_dtype=self.dtype)
        return left.to(self.dtype) @ right.to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        z = self.product(hidden, self.matrix.t())
        z = z if self.bias is None else z.add_(self.bias)
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

    def below_cap(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Return the gradient at what the soft cap was put on, given that at the logits; may overwrite it.

        With y = c tanh(z / c), ∂y/∂z = 1 − (y / c)².
        """
        return gradient if self.softcap is None else gradient.mul_(1 - (logits / self.softcap).square_())


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
    temperature: float,
    divergence: str,
    beta: float,
    alpha: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The same sum as `reference.soft_label_total`; gradients at student hidden, head and bias if needed."""
    student = Head(student_head, student_bias, dtype, student_softcap)
    teacher = Head(teacher_head, teacher_bias, dtype, teacher_softcap)
    teacher_hidden = teacher_hidden.detach().flatten(0, 1)

    def block(z_s: Tensor, tokens: Tensor, with_gradient: bool):
        z_t = teacher.logits(teacher_hidden[tokens])
        total = z_s.new_zeros(())
        for mine, other in zip(z_s.split(_slice(z_s)), z_t.split(_slice(z_t)), strict=True):
            log_q = mine.div_(temperature).log_softmax(-1)
            log_p = other.div_(temperature).log_softmax(-1)
            p = log_p.exp()
            total += divergence_rows(log_p, log_q, p, divergence, beta, alpha).sum()
            if with_gradient:
                gradient = logit_gradient(log_p, log_q, p, divergence, beta, alpha)
                if student.softcap is not None:  # `mine` still holds the logits, divided by τ
                    gradient = student.below_cap(gradient, mine * temperature)
                torch.div(gradient, temperature, out=mine)
        return total, z_s

    if index is None and mask is not None:
        index = mask.flatten().nonzero()[:, 0]
    return _over_blocks(needs, student_hidden, student, index, block)


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
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The same sum as `reference.cross_entropy_total`; gradients at hidden, head and bias if needed."""
    labels, output = labels.flatten(), Head(head, bias, dtype, softcap)

    def block(z: Tensor, tokens: Tensor, with_gradient: bool):
        log_q = z.log_softmax(-1)
        gold = labels[tokens][:, None]
        own, spread = 1 - label_smoothing, label_smoothing / z.shape[1]  # t: of the label, and of every entry
        value = -own * log_q.gather(1, gold).sum()
        if label_smoothing:
            value -= label_smoothing * log_q.mean(-1).sum()
        if not with_gradient:
            return value, None
        gradient = log_q.exp_()  # of a softmax: softmax − t
        if label_smoothing:
            gradient.sub_(spread)
        return value, output.below_cap(gradient.scatter_add_(1, gold, gradient.new_full(gold.shape, -own)), z)

    if index is None:
        index = (labels != ignore_index).nonzero()[:, 0]
    return _over_blocks(needs, hidden, output, index, block)


def _slice(logits: Tensor) -> int:
    """Rows of a slice; a GPU takes the block at once."""
    return len(logits) if logits.is_cuda else max(1, SLICE_ELEMENTS // logits.shape[1])


def _over_blocks(
    needs: Sequence[bool],
    hidden: Tensor,
    head: Head,
    index: Tensor | None,
    block: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]],
):
    """Σ over blocks of counted tokens of `block(logits, token indices, with gradient)`, and the gradients.

    index: (K,) flat places of the tokens that count; None: all.
    block: may overwrite the logits; returns its sum and, where asked for, the gradient at them.
    """
    flat = hidden.detach().flatten(0, 1)
    total = torch.zeros((), dtype=head.dtype, device=flat.device)
    d_hidden = torch.zeros(flat.shape, dtype=head.dtype, device=flat.device) if needs[0] else None
    d_matrix: Tensor | None = (
        None  # made by the first block: filling it with zeros would be one more pass over (V, D)
    )
    d_bias = torch.zeros_like(head.bias) if head.bias is not None and needs[2] else None
    if index is None:
        index = torch.arange(flat.shape[0], device=flat.device)
    size = max(MIN_TOKENS, min(MAX_TOKENS, BLOCK_ELEMENTS // max(1, head.matrix.shape[0])))
    for tokens in index.split(size):
        if not tokens.numel():
            continue
        rows = flat[tokens]
        value, gradient = block(head.logits(rows), tokens, any(needs))
        total += value
        if gradient is None:
            continue
        if d_hidden is not None:
            d_hidden[tokens] = head.product(gradient, head.matrix)
        if needs[1]:
            if d_matrix is None or head.native:
                part = head.product(gradient.t(), rows)
                d_matrix = part if d_matrix is None else d_matrix.add_(part)
            else:
                d_matrix.addmm_(gradient.t(), rows.to(head.dtype))
        if d_bias is not None:
            d_bias += gradient.sum(0)
    if needs[1] and d_matrix is None:
        d_matrix = torch.zeros(head.matrix.shape, dtype=head.dtype, device=flat.device)
    return total, (None if d_hidden is None else d_hidden.view(hidden.shape), d_matrix, d_bias)
