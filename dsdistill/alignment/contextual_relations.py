"""Compare how words relate within a layer, and layers within a word (CKD, Park et al. 2021), in blocks of words.

Pairs are compared by cosines: a softmax turns the cosines of a unit with the others into probabilities, and the loss is
the KL of the two models' probabilities. A triple is compared by the angle at its vertex: the loss is the squared
difference of the two models' cosines of this angle. Sums are float32 (float64 if the states are) and have gradients to
the student, which are found in the same pass.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dsdistill.alignment.units import wide
from dsdistill.ops.common import blocks, unit_vectors, with_stored_gradients

BLOCK_ELEMENTS = 1 << 20  # of the vectors or matrices of one block, of which a few exist at a time
_NEVER = -1e30  # a score that softmax turns into 0; it is finite, so that differences of scores are finite


def word_pairs(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return Σ over words i of KL(p_i ‖ q_i), p_i = softmax over the sequence's other words j of cos(t_i, t_j).

    q is the same for the student. student (B, N, D_s), teacher (B, N, D_t), mask (B, N) bool, True = valid.
    """
    other = unit_vectors(_valid(teacher.detach(), mask))[0]
    batch, tokens = mask.shape
    places = torch.arange(tokens, device=mask.device)

    def loss(rows: slice, units: Tensor) -> Tensor:
        left_out = ~mask[:, None] | (places[rows, None] == places)
        scores = ((x[:, rows] @ x.transpose(1, 2)).masked_fill(left_out, _NEVER) for x in (other, units))
        return _divergence(left_out, mask[:, rows], *scores)

    # Every block of rows reads all words, so gradients of the whole sequence are added up.
    size = max(1, BLOCK_ELEMENTS // max(1, batch * tokens))
    return _over_blocks(tokens, size, [unit_vectors(_valid(student, mask))[0]], loss)


def word_triples(student: Tensor, teacher: Tensor, mask: Tensor, window: int) -> Tensor:
    """Return Σ over words i, and over words j and k in the window of i, of the squared difference of cos∠(j, i, k).

    window: odd number of words in a window, with i in the middle. Words beyond the sequence do not count. If j or k is
    i, the cosine is 0 in both models. All other arguments are as for `word_pairs`.
    """
    half = window // 2
    seen = F.pad(mask, (half, half)).unfold(1, window, 1)
    states = [F.pad(_valid(x, mask), (0, 0, half, half)) for x in (student, teacher.detach())]
    batch, tokens = mask.shape

    def loss(rows: slice, mine: Tensor) -> Tensor:
        part = slice(rows.start, rows.stop + 2 * half)
        angles = [
            _cosines(
                x[:, part].unfold(1, window, 1).transpose(2, 3) - x[:, part][:, half : -half or None, None]
            )
            for x in (mine, states[1])
        ]
        counted = seen[:, rows, :, None] & seen[:, rows, None] & mask[:, rows, None, None]
        return (angles[0] - angles[1]).masked_fill(~counted, 0).square().sum()

    width = max(student.shape[-1], teacher.shape[-1])
    size = max(1, BLOCK_ELEMENTS // max(1, batch * window * max(width, window)))
    return _over_blocks(tokens, size, [states[0]], loss)


def layer_pairs(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Return Σ over words of Σ over layers l of KL(p_l ‖ q_l), p_l = softmax over the other layers m of cos(t_l, t_m).

    student, teacher: equally many layers, (B, N, D_s) and (B, N, D_t) each. mask: as for `word_pairs`.
    """
    own = torch.eye(len(student), dtype=torch.bool, device=mask.device)

    def loss(mine: Tensor, other: Tensor, counted: Tensor) -> Tensor:
        units = (unit_vectors(x)[0] for x in (other, mine))
        scores = ((x @ x.transpose(1, 2)).masked_fill(own, _NEVER) for x in units)
        return _divergence(own, counted[:, None].expand(-1, len(own)), *scores)

    return _by_word(student, teacher, mask, loss)


def layer_triples(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Return Σ over words and layers j, i, k of the squared difference of cos∠(j, i, k). Arguments as `layer_pairs`."""

    def loss(mine: Tensor, other: Tensor, counted: Tensor) -> Tensor:
        total = mine.new_zeros(())
        for vertex in range(len(student)):
            angles = [_cosines(x - x[:, vertex : vertex + 1]) for x in (mine, other)]
            total = total + (angles[0] - angles[1]).masked_fill(~counted[:, None, None], 0).square().sum()
        return total

    return _by_word(student, teacher, mask, loss)


def _by_word(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Tensor,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Return the sum of `loss` over blocks of words: (n, L, D_s), (n, L, D_t), and which of them count, (n,) bool."""
    mine, other = ([_valid(x, mask).flatten(0, 1) for x in of] for of in (student, teacher))
    counted = mask.flatten()

    def part(rows: slice, *layers: Tensor) -> Tensor:
        stacked = [torch.stack([x[rows] for x in of], 1) for of in (layers, other)]
        return loss(stacked[0], stacked[1], counted[rows])

    size = max(1, BLOCK_ELEMENTS // (len(mine) * max(mine[0].shape[1], other[0].shape[1])))
    return _over_blocks(len(counted), size, mine, part)


def _over_blocks(count: int, size: int, inputs: Sequence[Tensor], loss: Callable[..., Tensor]) -> Tensor:
    """Return Σ over blocks of `loss(rows, *inputs)`. The graph of only one block exists at a time."""

    def compute(needs: Sequence[bool]):
        leaves = [x.detach().requires_grad_(any(needs)) for x in inputs]
        total = leaves[0].new_zeros(())
        for start in blocks(range(0, count, size)):
            with torch.set_grad_enabled(any(needs)):
                value = loss(slice(start, min(start + size, count)), *leaves)
                if any(needs):
                    value.backward()  # adds to the leaves' gradients
            total += value.detach()
        return total, [leaf.grad for leaf in leaves]

    return with_stored_gradients(compute, inputs, None)


def _divergence(left_out: Tensor, asks: Tensor, teacher: Tensor, student: Tensor) -> Tensor:
    """Return Σ KL(p ‖ q) of scores (…, U, U) over the rows that `asks`, (…, U), marks. A single unit gives 0."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    counted = asks[..., None] & ~left_out
    return (log_p.exp() * (log_p - log_q)).masked_fill(~counted, 0).sum()


def _cosines(vectors: Tensor) -> Tensor:
    """Return the cosines (…, U, U) between vectors (…, U, D), 0 for a vector of length 0."""
    units = unit_vectors(vectors)[0]
    return units @ units.transpose(-1, -2)


def _valid(states: Tensor, mask: Tensor) -> Tensor:
    """Return states (B, N, D) in the type of `wide`, 0 where they are not valid."""
    return wide(states).masked_fill(~mask[..., None], 0)
