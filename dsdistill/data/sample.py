"""Fewer train examples, and wrong labels among them: what sweeps over the amount and the quality of data turn.

Both depend on the seed and the data set alone, so every rank and every resumed run has the same.
"""

from dataclasses import replace
from math import ceil

import numpy as np
import torch

from dsdistill.data.examples import Examples

_FRACTION, _NOISE = 1, 2  # streams of random numbers


def chosen(count: int, fraction: float, seed: int) -> np.ndarray:
    """Return ⌈fraction · count⌉ of so many examples in their old order; a smaller fraction's are among a larger's."""
    order = np.random.default_rng([seed, _FRACTION]).permutation(count)
    return np.sort(order[: ceil(fraction * count)])


def with_noise(examples: Examples, share: float, classes: int, seed: int) -> Examples:
    """The same with round(share · n) labels replaced; those of a smaller share are among a larger one's.

    classes: how many there are, each other one equally likely to come in; 0 for scores, which the chosen examples
    pass on in a circle.
    """
    generator = np.random.default_rng([seed, _NOISE])
    order = generator.permutation(len(examples))
    shifts = generator.integers(1, classes, len(examples)) if classes else None
    chosen = torch.from_numpy(order[: round(share * len(examples))])
    labels = examples.labels.clone()
    if classes:
        labels[chosen] = (labels[chosen] + torch.from_numpy(shifts)[chosen]) % classes
    else:
        labels[chosen] = labels[chosen.roll(1)]
    return replace(examples, labels=labels)
