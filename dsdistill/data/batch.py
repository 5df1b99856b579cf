"""What one forward pass reads."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

NO_LABEL = -100
WORD, PHRASE = 0, 1  # kinds of spans


@dataclass(frozen=True)
class Batch:
    """B examples of N tokens, padded on the right.

    A row without a valid token is filler: it keeps the ranks in step (every rank runs the same number of
    forward passes) and counts in no loss and no metric.

    Rows of a causal language model may be packed: each holds several documents, one after the other, and filler at
    its end. Then the examples are the S documents that `places` lists, one of them without a token where the batch is
    filler alone. `documents` and `unpacked` say the same of packed and other batches.
    """

    input_ids: Tensor  # (B, N) int64
    mask: Tensor  # (B, N) bool, True = valid
    # (B,) int64 class | (B,) float32 score, NaN where a text has none | (B, N) int64 tokens; see below
    labels: Tensor | None
    token_types: Tensor | None = None  # (B, N) int64, for models that tell the two texts of a pair apart
    ids: tuple[str, ...] = ()  # of the examples (packed: of the S documents); filler rows have ""
    # (B,), packed (S,), int64: place in the data set, so that order can be restored; filler -1. The two texts of
    # example i have the places 2i and 2i + 1.
    index: Tensor | None = None

    # (S, 4) int64, by row: row, first token, one past the last, WORD or PHRASE; None where no term reads them.
    spans: Tensor | None = None

    # (B,), packed (S,), float32 in [0, 1): each example's draw of this epoch, for what has a probability; None in
    # evaluation.
    chance: Tensor | None = None

    # (B,) int64 in [0, 2³²): each row's draw of this step, for terms that compare some tokens of a row alone; None in
    # evaluation, and where a loop of somebody's own made the batch.
    draw: Tensor | None = None

    # (K,) int64, ascending: flat places b·N + n of the tokens that a language model is to predict. causal_lm: n ≥ 1,
    # and none is the first of a packed document; both tasks: the token is valid and has a label. The loader finds them
    # on the host, since finding them on a GPU would wait for it. None: not a language task, or nobody has found them.
    counted: Tensor | None = None

    # Of packed rows alone, which hold several documents: (B, N) int64, position of each token in its document,
    # counted from 0.
    position_ids: Tensor | None = None
    # (B, N) int64: which document of its row a token belongs to, counted from 0; what fills a row up is one more.
    segments: Tensor | None = None
    # (S, L) int64: the flat places b·N + n of the tokens of each of S ≥ 1 documents, by row, -1 beyond its end.
    places: Tensor | None = None
    # (B,), packed (S,), int64: which source of a mixture an example is from; None: there is one alone.
    source: Tensor | None = None
    # (B,) int64, rows of the same number are the two texts of one example, which are read apart: the first of them is
    # the query, the second its document; filler -1. None: each example is one row.
    pair: Tensor | None = None

    # Labels of causal language models are the input ids themselves, not shifted; NO_LABEL where nothing is to
    # be predicted (padding, prompts). Labels of masked ones are the tokens that were hidden. A class or score of a
    # filler row is NO_LABEL too.

    @property
    def rows(self) -> Tensor:
        """(B,) bool: rows that hold an example, or several."""
        return self.mask.any(dim=1)

    @property
    def documents(self) -> Tensor:
        """(B,), packed (S,), bool: which units that are read apart, rows or documents, are examples."""
        return self.rows if self.places is None else self.places[:, 0] >= 0

    @cached_property
    def owners(self) -> Tensor:
        """(B·N,) int64 of packed rows: which of the S documents each token belongs to, S at filler."""
        assert self.places is not None  # asked of packed rows alone
        count, tokens = len(self.places), self.input_ids.numel()
        owners = self.places.new_full((tokens + 1,), count)  # the last entry takes what lies beyond documents
        documents = torch.arange(count, device=owners.device)[:, None].expand_as(self.places)
        slots = torch.where(self.places < 0, tokens, self.places)
        return owners.scatter_(0, slots.flatten(), documents.flatten())[:-1]

    @cached_property
    def unpacked(self) -> "Batch":
        """The same documents, one a row, (S, L) in the order of `places`; the batch itself where none are packed."""
        if self.places is None:
            return self
        mask, places, spans = self.places >= 0, self.places.clamp(min=0), self.spans

        def laid(values: Tensor, fill: int) -> Tensor:
            return values.flatten()[places].masked_fill(~mask, fill)

        if spans is not None:
            first = spans[:, 0] * self.input_ids.shape[1] + spans[:, 1]
            shift = spans[:, 1] - self._positions.flatten()[first]
            spans = torch.stack(
                [self.owners[first], spans[:, 1] - shift, spans[:, 2] - shift, spans[:, 3]], dim=1
            )
        labels = None if self.labels is None else laid(self.labels, NO_LABEL)
        ids, draw = laid(self.input_ids, 0), None
        if self.draw is not None:  # of a row, by where in it the document begins
            tokens = self.input_ids.shape[1]
            draw = (self.draw[places[:, 0] // tokens] + places[:, 0] % tokens) % 2**32
        return Batch(ids, mask, labels, None, self.ids, self.index, spans, self.chance, draw)

    @property
    def _positions(self) -> Tensor:
        assert self.position_ids is not None  # packed rows have them
        return self.position_ids

    @property
    def token_chance(self) -> Tensor | None:
        """(B, 1), packed (B, N), float32: the draw of the example that a token belongs to, 1 at packed filler."""
        if self.chance is None or self.places is None:
            return None if self.chance is None else self.chance[:, None]
        return torch.cat([self.chance, self.chance.new_ones(1)])[self.owners].view_as(self.input_ids)

    def pinned(self) -> "Batch":
        """Return the batch in memory that a GPU copies from without the processor."""
        return self._each(lambda values: values.pin_memory())

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device."""
        return self._each(lambda values: values.to(device, non_blocking=True))

    def tensors(self) -> list[Tensor]:
        """Return all of the batch's tensors."""
        values = (getattr(self, field.name) for field in fields(self))
        return [value for value in values if isinstance(value, Tensor)]

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: change(value) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)
