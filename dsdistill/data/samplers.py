"""Choose the examples of an epoch for samplers that do not take each once. An epoch has as many examples as the set.

The order depends only on the generator, which the loader seeds by (seed, epoch).
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dsdistill.config.checks import GROUP
from dsdistill.data.examples import Examples

NEIGHBOURS = GROUP - 1  # neighbours that come with an anchor
BLOCK = 1024  # anchors that are compared with all examples at once


class Sampler(Protocol):
    grouped: bool  # runs of GROUP examples belong together

    def order(self, chance: np.random.Generator) -> np.ndarray:
        """Return the examples of an epoch, (n,) int64."""


class Weighted:
    """Draw with replacement, p ∝ exp(score / temperature)."""

    grouped = False

    def __init__(self, scores: np.ndarray, temperature: float):
        powers = np.exp((scores - scores.max()) / temperature)
        self.shares = powers / powers.sum()

    def order(self, chance: np.random.Generator) -> np.ndarray:
        return chance.choice(len(self.shares), len(self.shares), p=self.shares)


class HardNegative:
    """Take each of the first examples of a permutation as an anchor, followed by its neighbours."""

    grouped = True

    def __init__(self, neighbours: np.ndarray):
        """Make a sampler. neighbours: (n, NEIGHBOURS) int64."""
        self.neighbours = neighbours

    def order(self, chance: np.random.Generator) -> np.ndarray:
        count = len(self.neighbours)
        anchors = chance.permutation(count)[: -(-count // GROUP)]
        return np.concatenate([anchors[:, None], self.neighbours[anchors]], axis=1).flatten()[:count]


def nearest_others(vectors: Tensor, examples: Examples) -> np.ndarray:
    """Return (n, NEIGHBOURS) int64: for each of the (n, D) vectors, the nearest by cosine that have another answer.

    The answer is the label; without labels it is the response to a prompt or the second text of a pair. The answers of
    single texts all count as different. So do those of pairs if the tokenizer has no token types, because the two texts
    then cannot be separated.
    """
    answers = torch.from_numpy(_answers(examples))
    unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
    nearest = []
    for start in range(0, len(unit), BLOCK):
        cosines = unit[start : start + BLOCK] @ unit.T
        cosines.masked_fill_(answers[start : start + BLOCK, None] == answers, -torch.inf)
        nearest.append(cosines.topk(min(NEIGHBOURS, len(unit)), dim=1).indices)
    return torch.cat(nearest).numpy()


def _answers(examples: Examples) -> np.ndarray:
    """Return (n,) numbers that are equal for equal answers."""
    if examples.labels is not None and not examples.labels.isnan().all():
        return np.unique(examples.labels.numpy(), return_inverse=True)[1]
    rows = range(len(examples))
    if examples.prompted:
        texts = [examples.tokens(row)[examples.context(row) :] for row in rows]
    elif any(types.any() for row in rows if (types := examples.types(row)) is not None):
        texts = [examples.tokens(row)[examples.types(row) == 1] for row in rows]
    else:
        return np.arange(len(examples))
    numbers: dict[bytes, int] = {}  # NumPy's arrays of bytes would drop zeros at the end, which are tokens
    return np.array([numbers.setdefault(text.tobytes(), len(numbers)) for text in texts])
