"""Say which (query, key) pairs of a sequence exist: mask, causal order, sliding window, packed segments."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsdistill.ops.common import valid_rows
from dsdistill.ops.gpu import block_elements


@dataclass(frozen=True)
class Pairs:
    """Hold the conditions under which a query at i sees a key at j: both are valid, and all conditions below hold.

    mask: (B, N) bool, True = valid; None = all. causal: j ≤ i. window: |i − j| < window.
    segments: (B, N) int, equal at i and j.
    rows: (B, R) int64, the positions of the compared queries, in any order; −1 names no query; None = all N.
    """

    tokens: int
    mask: Tensor | None
    causal: bool
    window: int | None
    segments: Tensor | None
    rows: Tensor | None = None

    @property
    def queries(self) -> int:
        """Return how many queries of a sequence are compared, positions of −1 included."""
        return self.tokens if self.rows is None else self.rows.shape[1]

    @property
    def unrestricted(self) -> bool:
        """Return whether every valid query sees every valid key."""
        return (
            not self.causal and self.segments is None and (self.window is None or self.window >= self.tokens)
        )

    def query_mask(self) -> Tensor | None:
        """Return (B, R) bool, True at the queries that count; None if all count; without rows, the mask (B, N)."""
        return self.mask if self.rows is None else valid_rows(self.rows, self.mask)

    def keys(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range of keys that any of the queries start..stop can see."""
        if self.rows is not None:
            if not self.causal and self.window is None:
                return 0, self.tokens
            if self.rows.device.type != "cpu" or torch.compiler.is_compiling():
                return 0, self.tokens  # reading the positions would wait for the device or break the trace
            found = self.rows[:, start:stop].clamp(min=0)
            start, stop = int(found.min()), int(found.max()) + 1
        first, last = 0, stop if self.causal else self.tokens
        if self.window is not None:
            first = max(0, start - self.window + 1)
            last = min(last, stop + self.window - 1)
        return first, last

    def block(self, rows: slice, keys: slice, batch: slice, device: torch.device) -> Tensor | None:
        """Return which pairs of a block exist in the sequences `batch`, (b, 1, R, K) bool, or None if all exist."""
        present = None
        found = None if self.rows is None else self.rows[batch, rows].clamp(min=0)
        if self.causal or self.window is not None:
            positions = torch.arange(rows.start, rows.stop, device=device) if found is None else found
            distance = positions[..., None] - torch.arange(keys.start, keys.stop, device=device)
            present = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
            if self.window is not None:
                present = present & (distance.abs() < self.window)
            present = present[None] if found is None else present
        for labels, both in ((self.segments, torch.eq), (self.mask, torch.logical_and)):
            if labels is not None:
                own = labels[batch, rows] if found is None else labels[batch].gather(1, found)
                pair = both(own[..., None], labels[batch, None, keys])
                present = pair if present is None else present & pair
        return None if present is None else present[:, None]

    def count(self, batch: int, device: torch.device) -> Tensor:
        """Return the number of existing pairs, summed over all sequences, int64; `rows` does not change it."""
        if self.mask is None and self.segments is None:
            n = self.tokens
            width = n if self.window is None else min(self.window, n)
            # The queries see 1, 2, …, width keys to their left (themselves included), then width each.
            left = width * (width + 1) // 2 + (n - width) * width
            return torch.full((), batch * (left if self.causal else 2 * left - n), device=device)
        if self.mask is not None and self.window is None and self.segments is None:
            valid = self.mask.sum(1)
            return (valid * (valid + 1) // 2 if self.causal else valid * valid).sum()
        whole = replace(self, rows=None)
        total = torch.zeros((), dtype=torch.int64, device=device)
        elements = block_elements(total, 1 << 22)
        step = max(1, elements // max(1, batch * self.tokens))
        for start in range(0, self.tokens, step):
            stop = min(start + step, self.tokens)
            block = whole.block(slice(start, stop), slice(*whole.keys(start, stop)), slice(None), device)
            assert block is not None  # without a restriction the count has been returned above
            total += block.sum()
        return total
