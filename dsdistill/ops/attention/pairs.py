"""Which (query, key) pairs of a sequence exist: mask, causal order, sliding window, packed segments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsdistill.ops.gpu import block_elements


@dataclass(frozen=True)
class Pairs:
    """A query at i sees a key at j when both are valid and the conditions below hold.

    mask: (B, N) bool, True = valid; None = all. causal: j ≤ i. window: |i − j| < window.
    segments: (B, N) int, equal at i and j.
    """

    tokens: int
    mask: Tensor | None
    causal: bool
    window: int | None
    segments: Tensor | None

    @property
    def unrestricted(self) -> bool:
        """Every valid query sees every valid key."""
        return (
            not self.causal and self.segments is None and (self.window is None or self.window >= self.tokens)
        )

    def keys(self, start: int, stop: int) -> tuple[int, int]:
        """The range of keys that the queries start..stop can see at all."""
        first, last = 0, stop if self.causal else self.tokens
        if self.window is not None:
            first = max(0, start - self.window + 1)
            last = min(last, stop + self.window - 1)
        return first, last

    def block(self, rows: slice, keys: slice, batch: slice, device: torch.device) -> Tensor | None:
        """(b, 1, R, K) bool for a block of queries and keys of the sequences `batch`; None where all exist."""
        present = None
        if self.causal or self.window is not None:
            distance = torch.arange(rows.start, rows.stop, device=device)[:, None] - torch.arange(
                keys.start, keys.stop, device=device
            )
            present = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
            if self.window is not None:
                present = present & (distance.abs() < self.window)
            present = present[None]
        for labels, both in ((self.segments, torch.eq), (self.mask, torch.logical_and)):
            if labels is not None:
                pair = both(labels[batch, rows, None], labels[batch, None, keys])
                present = pair if present is None else present & pair
        return None if present is None else present[:, None]

    def count(self, batch: int, device: torch.device) -> Tensor:
        """Number of pairs that exist in all sequences together, int64."""
        if self.mask is None and self.segments is None:
            n = self.tokens
            width = n if self.window is None else min(self.window, n)
            # The queries see 1, 2, …, width keys to their left (themselves included), then width each.
            left = width * (width + 1) // 2 + (n - width) * width
            return torch.full((), batch * (left if self.causal else 2 * left - n), device=device)
        if self.mask is not None and self.window is None and self.segments is None:
            valid = self.mask.sum(1)
            return (valid * (valid + 1) // 2 if self.causal else valid * valid).sum()
        total = torch.zeros((), dtype=torch.int64, device=device)
        elements = block_elements(total, 1 << 22)
        step = max(1, elements // max(1, batch * self.tokens))
        for start in range(0, self.tokens, step):
            stop = min(start + step, self.tokens)
            block = self.block(slice(start, stop), slice(*self.keys(start, stop)), slice(None), device)
            assert block is not None  # something restricts the pairs, or the count were known by now
            total += block.sum()
        return total
