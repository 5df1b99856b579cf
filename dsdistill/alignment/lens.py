"""Compare how predictions change from one layer to the next, without the logits of all tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsdistill.ops.common import NORM_FLOOR, accumulate_dtype, blocks, with_stored_gradients, without_autocast
from dsdistill.ops.soft_label.head import Head, block_tokens


def change_alignment(
    student: tuple[Tensor, Tensor],
    student_head: Tensor,
    teacher: tuple[Tensor, Tensor],
    teacher_head: Tensor,
    *,
    mask: Tensor | None = None,
    index: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> Tensor:
    """Return Σ over tokens of 1 − cos(Δ_S, Δ_T), which compares how the two models change their predictions.

    Δ = log softmax(W h_upper) − log softmax(W h_lower), over the vocabulary. With a soft cap c, c tanh(W h / c)
    replaces W h.

    student, teacher: lower and upper states, (B, N, D) each, as a head reads them. Heads (V, D); biases (V,).
    The tokens that count are given in one of two ways: mask (B, N) bool, True = the token counts, or index (K,) int64,
    ascending, their flat places b·N + n. A change shorter than 1e-12 has cosine 0.

    Returns a float32 scalar (float64 if a state is) with gradients to the student's states; heads are constants.
    """
    dtype = accumulate_dtype(*student, *teacher)
    heads = [
        Head(student_head, student_bias, dtype, student_softcap),
        Head(teacher_head, teacher_bias, dtype, teacher_softcap),
    ]
    device = student[0].device
    if index is None:
        assert mask is not None  # mask or index is given
        index = mask.flatten().nonzero()[:, 0]
    # Each token needs the logits of two layers of each model here, and their log softmaxes.
    size = block_tokens(heads[0].on_gpu, student_head.shape[0], 7 * student_head.shape[0])

    def compute(needs: Sequence[bool]):
        rows = [[state.detach().flatten(0, 1) for state in states] for states in (student, teacher)]
        total = torch.zeros((), dtype=dtype, device=device)
        gradients = (
            [torch.zeros(own.shape, dtype=dtype, device=own.device) for own in rows[0]]
            if any(needs)
            else None
        )
        for start in blocks(range(0, len(index), size)):
            tokens = index[start : start + size]
            logits = [heads[0].logits(state[tokens]) for state in rows[0]]
            lower, upper = (z.log_softmax(-1) for z in logits)
            other = _change(*(heads[1].logits(state[tokens]).log_softmax(-1) for state in rows[1]))
            change, inverse, cosine = _compare(upper - lower, other)
            total += (1 - cosine).sum()
            if gradients is not None:
                # ∂(1 − cos)/∂Δ_S = (cos · û_S − û_T) / ‖Δ_S‖; each log softmax turns g into g − softmax · Σ g.
                slope = (cosine * change).sub_(other).mul_(inverse)
                sums = slope.sum(-1, keepdim=True)
                at_logits = lower.exp_().mul_(sums).sub_(slope), slope.sub_(upper.exp_().mul_(sums))
                for own, gradient, z in zip(gradients, at_logits, logits, strict=True):
                    own[tokens] = heads[0].at_hidden(heads[0].below_cap(gradient, z))
        stored = (
            [None] * 2
            if gradients is None
            else [g.view_as(s) for g, s in zip(gradients, student, strict=True)]
        )
        return total, stored

    with without_autocast(device):
        return with_stored_gradients(compute, student, None)


def _change(lower: Tensor, upper: Tensor) -> Tensor:
    """Return unit vectors along upper − lower, 0 if there is no change."""
    return _unit(upper - lower)[0]


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = torch.where(norm > NORM_FLOOR, 1 / norm.clamp_min(NORM_FLOOR), 0)
    return x * inverse, inverse


def _compare(change: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the student's unit vectors, inverse norms and cosines with the teacher's unit vectors."""
    unit, inverse = _unit(change)
    return unit, inverse, (unit * other).sum(-1, keepdim=True)
