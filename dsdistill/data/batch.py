"""What one forward pass reads."""

from dataclasses import dataclass, fields, replace
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
    """

    input_ids: Tensor  # (B, N) int64
    mask: Tensor  # (B, N) bool, True = valid
    labels: Tensor | None  # (B,) int64 class | (B,) float32 score | (B, N) int64 tokens; see below
    token_types: Tensor | None = None  # (B, N) int64, for models that tell the two texts of a pair apart
    ids: tuple[str, ...] = ()  # of the examples; filler rows have ""
    index: Tensor | None = None  # (B,) int64 place in the data set, so that order can be restored; filler -1

    # (S, 4) int64, by row: row, first token, one past the last, WORD or PHRASE; None where no term reads them.
    spans: Tensor | None = None

    # (B,) float32 in [0, 1): each example's draw of this epoch, for what has a probability; None in evaluation.
    chance: Tensor | None = None

    # (K,) int64, ascending: flat places b·N + n of the tokens that a language model is to predict. causal_lm: n ≥ 1;
    # both tasks: the token is valid and has a label. The loader finds them on the host, since finding them on a GPU
    # would wait for it. None: not a language task, or nobody has found them.
    counted: Tensor | None = None

    # Of packed rows alone, which hold several documents: (B, N) int64, position of each token in its document,
    # counted from 0.
    position_ids: Tensor | None = None
    # (B, N) int64: which document of its row a token belongs to, counted from 0; what fills a row up is one more.
    segments: Tensor | None = None
    # (S, L) int64: the flat places b·N + n of the tokens of each of S documents, by row, -1 beyond its end.
    places: Tensor | None = None
    # Declared for what comes next: nothing fills or reads it yet.
    # (B,) int64, rows of the same number belong together (the two texts of one example); None: none do. A loader of
    # examples with two texts that are read apart is to fill them.
    pair: Tensor | None = None

    # Labels of causal language models are the input ids themselves, not shifted; NO_LABEL where nothing is to
    # be predicted (padding, prompts). Labels of masked ones are the tokens that were hidden. A class or score of a
    # filler row is NO_LABEL too.

    @property
    def rows(self) -> Tensor:
        """(B,) bool: rows that are examples."""
        return self.mask.any(dim=1)

    def to(self, device: torch.device | str) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)
