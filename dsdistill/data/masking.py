"""Choose which tokens of an example the models do not see, and which tokens they must predict.

The draw depends only on (seed, epoch, example), not on ranks, micro-batches or a resumed run.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from dsdistill.config.errors import UserError
from dsdistill.data.batch import NO_LABEL

PREDICTED = 0.15  # share of the tokens that a masked language model must predict
HIDDEN = 0.15  # share of the tokens that the sampler random_masked hides
_DEV, _STREAM = 2**32 - 1, 3


@dataclass(frozen=True)
class Masking:
    """Mask ordinary tokens of an example, that is, tokens that are not special.

    predicted: share of the ordinary tokens that become labels; at least one does, unless the share is 0. Each of them
        becomes the mask token with probability 0.8, a random ordinary token with 0.1, or stays (Devlin et al. 2019).
    hidden: share of the ordinary tokens that become the mask token without becoming labels. They are taken from those
        that are not predicted, as far as there are enough.
    """

    predicted: float
    hidden: float
    mask_id: int
    special: np.ndarray  # ids of special tokens
    ordinary: np.ndarray  # all other ids
    seed: int

    def draw(self, tokens: np.ndarray, example: int, epoch: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Return (n,) tokens as the models see them, and (n,) labels, NO_LABEL where nothing is predicted.

        epoch: None for the dev set, whose draw is the same for every seed of the run.
        """
        key = [_DEV, example, _STREAM] if epoch is None else [self.seed, epoch, example, _STREAM]
        chance = np.random.default_rng(key)
        places = chance.permutation(np.flatnonzero(~np.isin(tokens, self.special)))
        count = min(len(places), max(1, round(self.predicted * len(places)))) if self.predicted else 0
        chosen, left = places[:count], places[count:]
        seen, labels = tokens.copy(), np.full(len(tokens), NO_LABEL)
        labels[chosen] = tokens[chosen]
        fate = chance.random(count)
        seen[chosen[fate < 0.8]] = self.mask_id
        others = chosen[(fate >= 0.8) & (fate < 0.9)]
        seen[others] = chance.choice(self.ordinary, len(others))
        seen[left[: round(self.hidden * len(places))]] = self.mask_id
        return seen, labels


def masking(tokenizer: Any, predicted: float, hidden: float, seed: int) -> Masking:
    """Return the masking for a tokenizer; raise UserError if it has no mask token."""
    if tokenizer.mask_token_id is None:
        raise UserError("data.tokenizer", "a tokenizer without a mask token", "one that has it")
    special = np.array(sorted(tokenizer.all_special_ids))
    ordinary = np.setdiff1d([*tokenizer.get_vocab().values()], special)  # ids need not be consecutive
    return Masking(predicted, hidden, tokenizer.mask_token_id, special, ordinary, seed)
