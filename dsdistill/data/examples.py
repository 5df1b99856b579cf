"""What passes from the sources to the loader: rows of text, then examples of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import Tensor

from dsdistill.data.masking import Masking
from dsdistill.data.spans import Spans

T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """n checked rows of one split, before any tokenizer."""

    place: str  # where they come from, for messages
    texts: list[tuple[str, ...]]  # one text, or the two of a pair
    labels: list[int] | list[float] | None  # class index | score | None: tokens are to be predicted
    ids: Sequence[str]
    limit: int | None = None  # causal_lm: blocks to keep (only the tokenizer can count them)

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Examples:
    """n tokenised examples, laid end to end: example i is tokens[starts[i]:starts[i + 1]], never empty."""

    tokens: Tensor  # (tokens of all examples,) int32
    starts: Tensor  # (n + 1,) int64
    labels: Tensor | None  # (n,) int64 class | (n,) float32 score | None: tokens are labels
    ids: Sequence[str]
    token_types: Tensor | None = None  # like tokens, uint8
    spans: Spans | None = None  # words and phrases, where a term reads them
    masking: Masking | None = None  # what is hidden from the models, where something is
    prompts: Tensor | None = None  # (n,) int64: tokens before the response, where an example has a prompt

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def lengths(self) -> Tensor:
        """(n,) int64: tokens of each example."""
        return self.starts.diff()

    def take(self, rows: list[int]) -> "Examples":
        """Some of the examples, in the order given."""
        starts = torch.cat([self.starts.new_zeros(1), self.lengths[rows].cumsum(0)])

        def cut(flat: Tensor | None) -> Tensor | None:
            return (
                None if flat is None else torch.cat([flat[self.starts[r] : self.starts[r + 1]] for r in rows])
            )

        return Examples(
            tokens=cut(self.tokens),
            starts=starts,
            labels=None if self.labels is None else self.labels[rows],
            ids=[self.ids[row] for row in rows],
            token_types=cut(self.token_types),
            spans=None if self.spans is None else self.spans.take(rows),
            masking=self.masking,
            prompts=None if self.prompts is None else self.prompts[rows],
        )


@dataclass(frozen=True)
class Splits(Generic[T]):
    """Both splits, as Rows or as Examples, and the names of the classes in the order of their indices."""

    train: T
    dev: T
    labels: tuple[str, ...]  # () unless the task is classification
