"""Draw the query rows of each sequence that a step compares: anew each step, the same however the batch is split."""

import torch
from torch import Tensor

from dsdistill.data.batch import Batch

_WORD = 2**32 - 1
_STRIDE = 2654435761  # 2³² over the golden ratio (Knuth, The Art of Computer Programming 3, 6.4): keys lie far apart


def rows_of(batch: Batch, rows: int | None, layer: int, training: bool) -> tuple[Tensor, None] | None:
    """Return what operators take as `rows`; None: all rows, which evaluation and sequences that are shorter compare.

    Args:
        batch: its `draw` decides together with the layer; without one, in a loop of one's own, torch's generator does.
        rows: how many of a sequence are drawn; None: all.
        layer: of the student, so that layers draw apart.
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
    """Return (B, R) positions, one from each R-th part of a sequence; all of one with R tokens or fewer, then −1.

    Of the numbers 0 … R n − 1, which row r has n of, position i has R: so each token is as likely as any other. The
    parts need not end where tokens do, hence a token may come twice, which the operators count twice.

    Args:
        offsets: (B, R) int64, in [0, n) each.
        counts: (B, 1) int64, n: the tokens of each sequence, which come first in it.
    """
    rows = offsets.shape[1]
    places = torch.arange(rows, device=offsets.device).expand_as(offsets)
    few = torch.where(places < counts, places, -1)
    return torch.where(counts > rows, (places * counts + offsets) // rows, few)


def _mixed(x: Tensor) -> Tensor:
    """Return numbers below 2³², each bit of which depends on all bits of x, below 2³²; int64 without overflow."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & _WORD
    return (x >> 16) ^ x
