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
    its end. The examples are then the S documents that `places` lists; if the batch is only filler, `places` lists one
    document without tokens. `documents` and `unpacked` can be used for all batches, packed or not.
    """

    input_ids: Tensor  # (B, N) int64
    mask: Tensor  # (B, N) bool, True = valid
    # (B,) int64 class | (B,) float32 score, NaN for a text without one | (B, N) int64 tokens; see below
    labels: Tensor | None
    token_types: Tensor | None = None  # (B, N) int64, for models that distinguish the two texts of a pair
    ids: tuple[str, ...] = ()  # of the examples (packed: of the S documents); filler rows have ""
    # (B,), packed (S,), int64: position in the data set, so that the order can be restored; -1 for filler. The two
    # texts of the pair i have the positions 2i and 2i + 1.
    index: Tensor | None = None

    # (S, 4) int64, sorted by row: row, first token, one past the last, WORD or PHRASE; None if no term reads them.
    spans: Tensor | None = None

    # (B,), packed (S,), float32 in [0, 1): a random number of each example, new in each epoch, for choices with a
    # probability; None in evaluation.
    chance: Tensor | None = None

    # (B,) int64 in [0, 2³²): a random number of each row, new in each step, for terms that compare only some tokens of
    # a row; None in evaluation, and in batches from another training loop.
    draw: Tensor | None = None

    # (K,) int64, ascending: flat places b·N + n of the tokens that a language model is to predict. All of them are
    # valid and have labels. For causal_lm n ≥ 1, and none is the first token of a packed document. The loader finds
    # them on the host, because finding them on a GPU would make the host wait. None: the task does not predict tokens,
    # or they have not been found yet.
    counted: Tensor | None = None

    # Only for packed rows: (B, N) int64, position of each token in its document, counted from 0.
    position_ids: Tensor | None = None
    # (B, N) int64: which document of its row a token belongs to, counted from 0; a row's filler is one more.
    segments: Tensor | None = None
    # (S, L) int64: the flat places b·N + n of the tokens of each of S ≥ 1 documents, by row, -1 beyond its end.
    places: Tensor | None = None
    # (B,), packed (S,), int64: which source of a mixture an example is from; None: there is only one source.
    source: Tensor | None = None
    # (B,) int64: two rows with the same number are the two texts of one example, which are encoded separately. The
    # first is the query, the second its document. -1 for filler; None: each example is one row.
    pair: Tensor | None = None

    # These three are given together, if rows are mixed with partner rows (MixKD). partner_ids: (B, N) int64, the
    # partner's tokens. partner_labels: (B,), the partner's label, in the form of `labels`. share: (B,) float32 in
    # [0, 1], the row's own share λ, 1 for rows that are not mixed. Both models read λ E(ids) + (1 − λ) E(partner)
    # instead of the embeddings E(ids). `mask` covers both texts.
    partner_ids: Tensor | None = None
    partner_labels: Tensor | None = None
    share: Tensor | None = None

    # Labels of causal language models are the input ids themselves, not shifted, and NO_LABEL where nothing is to
    # be predicted (padding, prompts). Labels of masked language models are the original tokens at the positions to
    # predict, and NO_LABEL elsewhere. The class or score of a filler row is NO_LABEL, too.

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
        """Return (B·N,) int64 for packed rows: which of the S documents each token belongs to; S for filler."""
        assert self.places is not None  # only packed rows have owners
        count, tokens = len(self.places), self.input_ids.numel()
        owners = self.places.new_full((tokens + 1,), count)  # the last entry takes all −1 in `places`
        documents = torch.arange(count, device=owners.device)[:, None].expand_as(self.places)
        slots = torch.where(self.places < 0, tokens, self.places)
        return owners.scatter_(0, slots.flatten(), documents.flatten())[:-1]

    @cached_property
    def unpacked(self) -> "Batch":
        """Return a batch (S, L) with one document per row, in the order of `places`; if not packed, this batch."""
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
        """Return (B, 1), packed (B, N), float32: `chance` of each token's example; 1 for filler of packed rows."""
        if self.chance is None or self.places is None:
            return None if self.chance is None else self.chance[:, None]
        return torch.cat([self.chance, self.chance.new_ones(1)])[self.owners].view_as(self.input_ids)

    def pinned(self) -> "Batch":
        """Return the batch in pinned memory, from which a GPU can copy without the CPU."""
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
