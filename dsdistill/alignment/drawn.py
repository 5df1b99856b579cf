"""Draw which rows of each sequence a step compares: new ones at each step, independent of how the batch is split."""

import torch
from torch import Tensor

from dsdistill.data.batch import Batch

_WORD = 2**32 - 1
_STRIDE = 2654435761  # 2³² over the golden ratio (Knuth, The Art of Computer Programming 3, 6.4): keys lie far apart


def rows_of(batch: Batch, rows: int | None, layer: int, training: bool) -> tuple[Tensor, None] | None:
    """Return the operators' argument `rows`. None: all rows are compared, as in evaluation and in shorter batches.

    Args:
        batch: its `draw` and the layer determine the rows. Without `draw`, as in a user's own training loop, torch's
            generator draws the rows.
        rows: how many rows of a sequence are drawn; None: all.
        layer: student layer, so that layers draw different rows.
        training: whether the term is in training mode.
    """
    if rows is None or not training or batch.mask.shape[1] <= rows:
        return None
    draw = batch.draw
    if draw is None:
        draw = torch.randint(_WORD, batch.mask.shape[:1], device=batch.mask.device)
    key = _mixed((draw + layer * _STRIDE) & _WORD)[:, None]
    numbers = _mixed((key + torch.arange(rows, device=key.device) * _STRIDE) & _WORD)
    counts = batch.mask.sum(1, keepdim=True)
    return stratified((numbers * counts) >> 32, counts), None


def stratified(offsets: Tensor, counts: Tensor) -> Tensor:
    """Return (B, R) positions, one from each of R equal parts of a sequence.

    A sequence of at most R tokens gives all its positions, then −1. The numbers 0 … R n − 1 are divided among rows (n
    each) and among positions (R each), so that each token is equally likely. A part may end within a token's numbers.
    Then a token may be drawn twice, and the operators count it twice.

    Args:
        offsets: (B, R) int64, in [0, n) each.
        counts: (B, 1) int64, n: the number of tokens of each sequence; padding comes after them.
    """
    rows = offsets.shape[1]
    places = torch.arange(rows, device=offsets.device).expand_as(offsets)
    few = torch.where(places < counts, places, -1)
    return torch.where(counts > rows, (places * counts + offsets) // rows, few)


def _mixed(x: Tensor) -> Tensor:
    """Return a hash of x: both are int64 below 2³², every bit depends on all bits of x, and nothing overflows."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & _WORD
    return (x >> 16) ^ x
