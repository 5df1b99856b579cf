"""Compute a weight for each token of a batch, and one vector for each span.

Spans come as Batch.spans, (S, 4) int64, sorted by row: row, first token, one past the last, kind.
"""

import math

import torch
from torch import Tensor

from dsdistill.alignment.units import wide

BLOCK_ELEMENTS = 1 << 18  # of one block of scores: 1 MiB; a few such blocks exist at a time
_FLOOR = 1e-6  # least standard deviation of a token over features


def token_weights(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return (B, N) float32: how much attention each token gets from the others; it sums to 1 over a sequence.

    With Ĥ = H / std(H), std taken over features: w_t = 1/n Σ_s softmax_t(Ĥ_s · Ĥ_t / √D), where a token attends to
    both sides but not to itself, and padding is left out (MTA, arXiv 2605.01374). In a sequence of one token the weight
    is 0. Weights are computed in blocks of rows, without gradients, because hidden (B, N, D) is the teacher's.
    """
    batch, tokens, width = hidden.shape
    states = wide(hidden.detach()).masked_fill(~mask[..., None], 0)
    states = states / states.std(-1, keepdim=True, correction=0).clamp_min(_FLOOR)
    asks = mask & (mask.sum(1, keepdim=True) > 1)  # there is another token to attend to
    weights = states.new_zeros(batch, tokens)
    rows = max(1, min(tokens, BLOCK_ELEMENTS // max(1, batch * tokens)))
    for start in range(0, tokens, rows):
        block = slice(start, min(start + rows, tokens))
        own = torch.arange(block.start, block.stop, device=mask.device)
        scores = states[:, block] @ states.transpose(1, 2) / math.sqrt(width)
        scores = scores.masked_fill_(~mask[:, None], -torch.inf)
        scores[:, own - start, own] = -torch.inf
        links = scores.masked_fill_(~asks[:, block, None], 0).softmax(
            -1
        )  # rows that attend to nothing: any finite value
        weights += links.masked_fill_(~asks[:, block, None], 0).sum(1)
    return weights.masked_fill(~mask, 0) / mask.sum(1, keepdim=True).clamp(min=1)


def even_weights(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return (B, N): the same weight for each token of a sequence, instead of those of `token_weights`."""
    return wide(hidden.new_ones(())) * mask / mask.sum(1, keepdim=True).clamp(min=1)


class SpanGrid:
    """Lay out the spans of one kind as (B, K) units, where K is the most that a row has."""

    def __init__(self, spans: Tensor, batch: int, tokens: int):
        row, first, past = spans[:, 0], spans[:, 1], spans[:, 2]
        lengths, count = past - first, torch.bincount(row, minlength=batch)
        # There is one entry for each token of each span, and no padding.
        self._span = torch.repeat_interleave(torch.arange(len(spans), device=spans.device), lengths)
        within = (
            torch.arange(len(self._span), device=spans.device) - (lengths.cumsum(0) - lengths)[self._span]
        )
        self._token = row[self._span] * tokens + first[self._span] + within  # in the flattened batch
        self._slot = (row, torch.arange(len(spans), device=spans.device) - (count.cumsum(0) - count)[row])
        self._shape = (batch, tokens)
        width = int(count.max()) if batch else 0
        self.mask = torch.arange(width, device=spans.device) < count[:, None]  # (B, K)

    @property
    def covered(self) -> Tensor:
        """Return (B, N) bool: whether a token is in some span."""
        flat = torch.zeros(math.prod(self._shape), dtype=torch.bool, device=self.mask.device)
        return flat.index_fill_(0, self._token, True).view(self._shape)

    def weights(self, token_weights: Tensor) -> Tensor:
        """Return (B, K): the sum of each span's token weights, scaled so that each row sums to 1."""
        total = self._place(self._sums(token_weights.flatten()))
        return total / total.sum(1, keepdim=True).clamp_min(1e-12)

    def vectors(self, hidden: Tensor, token_weights: Tensor) -> Tensor:
        """Return (B, K, D) float32: Σ w_t h_t / Σ w_t over each span's tokens, 0 without a span or weight."""
        weights = token_weights.flatten()
        sums = self._sums(
            wide(hidden.flatten(0, 1)[self._token]) * weights[self._token][:, None], expanded=True
        )
        return self._place(sums / self._sums(weights).clamp_min(1e-12)[:, None])

    def _sums(self, values: Tensor, expanded: bool = False) -> Tensor:
        """Return (S, …): sums over each span's tokens. values: by token, or by entry if `expanded`."""
        values = values if expanded else values[self._token]
        spans = self._slot[0].shape[0]
        return values.new_zeros(spans, *values.shape[1:]).index_add(0, self._span, values)

    def _place(self, values: Tensor) -> Tensor:
        """Return values (S, …) laid out as (B, K, …), 0 where a row has fewer spans."""
        return values.new_zeros(*self.mask.shape, *values.shape[1:]).index_put(self._slot, values)
