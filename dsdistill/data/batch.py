"""Define the input of one forward pass."""

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
    """Hold B examples of N tokens, padded on the right.

    A row without a valid token is filler: it keeps the ranks in step (every rank runs the same number of
    forward passes) and counts in no loss and no metric.

    Rows of a causal language model may be packed: each holds several documents, one after the other, and filler at
    its end. The examples are then the S documents that `places` lists; if the batch is only filler, it lists one
    without a token. `documents` and `unpacked` mean the same for packed and other batches.
    """

    input_ids: Tensor  # (B, N) int64
    mask: Tensor  # (B, N) bool, True = valid
    # (B,) int64 class | (B,) float32 score, NaN for a text without one | (B, N) int64 tokens; see below
    labels: Tensor | None
    token_types: Tensor | None = None  # (B, N) int64, for models that distinguish the two texts of a pair
    ids: tuple[str, ...] = ()  # of the examples (packed: of the S documents); filler rows have ""
    # (B,), packed (S,), int64: place in the data set, so that the order can be restored; -1 for filler. The two texts
    # of example i have the places 2i and 2i + 1.
    index: Tensor | None = None

    # (S, 4) int64, sorted by row: row, first token, one past the last, WORD or PHRASE; None if no term reads them.
    spans: Tensor | None = None

    # (B,), packed (S,), float32 in [0, 1): each example's draw of this epoch, for choices with a probability; None in
    # evaluation.
    chance: Tensor | None = None

    # (B,) int64 in [0, 2³²): each row's draw of this step, for terms that compare only some tokens of a row; None in
    # evaluation, and in batches from another training loop.
    draw: Tensor | None = None

    # (K,) int64, ascending: flat places b·N + n of the tokens that a language model is to predict. causal_lm: n ≥ 1,
    # and none is the first of a packed document; both tasks: the token is valid and has a label. The loader finds them
    # on the host, since finding them on a GPU would wait for it. None: not a language task, or not found yet.
    counted: Tensor | None = None

    # Only for packed rows: (B, N) int64, position of each token in its document, counted from 0.
    position_ids: Tensor | None = None
    # (B, N) int64: which document of its row a token belongs to, counted from 0; a row's filler is one more.
    segments: Tensor | None = None
    # (S, L) int64: the flat places b·N + n of the tokens of each of S ≥ 1 documents, by row, -1 beyond its end.
    places: Tensor | None = None
    # (B,), packed (S,), int64: which source of a mixture an example is from; None: there is only one.
    source: Tensor | None = None
    # (B,) int64: two rows with the same number are the two texts of one example, which are read separately, first the
    # query, then its document; -1 for filler. None: each example is one row.
    pair: Tensor | None = None

    # Rows that are mixed with others (MixKD), all three or none: (B, N) int64 and (B,), as labels, the tokens and the
    # label of each row's partner, and (B,) float32 in [0, 1], the row's own share λ, 1 for rows that are not mixed.
    # Both models read λ E(ids) + (1 − λ) E(partner) in place of the embeddings E of tokens; `mask` covers both texts.
    partner_ids: Tensor | None = None
    partner_labels: Tensor | None = None
    share: Tensor | None = None

    # Labels of causal language models are the input ids themselves, not shifted, and NO_LABEL where nothing is to
    # be predicted (padding, prompts). Labels of masked ones are the tokens that were hidden. The class or score of a
    # filler row is NO_LABEL, too.

    @property
    def rows(self) -> Tensor:
        """Return (B,) bool: which rows hold one or more examples."""
        return self.mask.any(dim=1)

    @property
    def documents(self) -> Tensor:
        """Return (B,), packed (S,), bool: which rows or packed documents are examples."""
        return self.rows if self.places is None else self.places[:, 0] >= 0

    @cached_property
    def owners(self) -> Tensor:
        """Return for packed rows (B·N,) int64: which of the S documents each token belongs to, S at filler."""
        assert self.places is not None  # only packed rows have owners
        count, tokens = len(self.places), self.input_ids.numel()
        owners = self.places.new_full((tokens + 1,), count)  # the last entry takes what lies beyond documents
        documents = torch.arange(count, device=owners.device)[:, None].expand_as(self.places)
        slots = torch.where(self.places < 0, tokens, self.places)
        return owners.scatter_(0, slots.flatten(), documents.flatten())[:-1]

    @cached_property
    def unpacked(self) -> "Batch":
        """Return the same documents, one a row, (S, L), in the order of `places`; or the batch if none is packed."""
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
        if self.draw is not None:  # the row's draw, shifted by where the document begins
            tokens = self.input_ids.shape[1]
            draw = (self.draw[places[:, 0] // tokens] + places[:, 0] % tokens) % 2**32
        return Batch(ids, mask, labels, None, self.ids, self.index, spans, self.chance, draw)

    @property
    def _positions(self) -> Tensor:
        assert self.position_ids is not None  # packed rows have them
        return self.position_ids

    @property
    def token_chance(self) -> Tensor | None:
        """Return (B, 1), packed (B, N), float32: the draw of each token's example, 1 at packed filler."""
        if self.chance is None or self.places is None:
            return None if self.chance is None else self.chance[:, None]
        return torch.cat([self.chance, self.chance.new_ones(1)])[self.owners].view_as(self.input_ids)

    def pinned(self) -> "Batch":
        """Return the batch in pinned memory, from which a GPU copies without the processor."""
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
