"""Reduce the train examples and put wrong labels among them, for sweeps over the amount and quality of data.

Both depend only on the seed and the data set, so every rank and every resumed run has the same examples and labels.
"""

from dataclasses import replace
from math import ceil

import numpy as np
import torch

from dsdistill.data.examples import Examples

_FRACTION, _NOISE = 1, 2  # streams of random numbers


def chosen(count: int, fraction: float, seed: int) -> np.ndarray:
    """Return ⌈fraction · count⌉ of `count` examples, in order; a larger fraction contains those of a smaller one."""
    order = np.random.default_rng([seed, _FRACTION]).permutation(count)
    return np.sort(order[: ceil(fraction * count)])


def with_noise(examples: Examples, share: float, classes: int, seed: int) -> Examples:
    """Return the examples with round(share · n) labels replaced; a larger share contains those of a smaller one.

    classes: number of classes; each label is replaced by another class, all of them equally likely. 0: labels are
    scores, and the replaced examples pass theirs on in a circle.
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
