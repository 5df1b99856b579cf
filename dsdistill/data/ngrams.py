"""Measure how a domain's text differs from general text, by n-gram models of token ids (Moore & Lewis 2010)."""

from dataclasses import dataclass

import numpy as np

from dsdistill.data.examples import Examples

BIGRAM = 0.6  # weight of the bigram in its mixture with the unigram
ADDED = 0.1  # to each unigram count
TERM = 1.0  # nats per token, on average, by which a domain term is more likely in the domain


class Bigrams:
    """Compute p(w | v) = λ c(v, w) / c(v) + (1 − λ) (c(w) + α) / (N + α V), λ = 0.6, α = 0.1.

    w follows v. c(w) counts all tokens, N is their number, and V the size of the vocabulary; c(v) counts v only where
    another token of the same example follows it. If c(v) = 0, the first summand is 0, so that such p do not sum to 1.
    """

    def __init__(self, examples: Examples, vocabulary: int):
        before, after = _pairs(examples)
        counts = np.bincount(_flat(examples), minlength=vocabulary).astype(float)
        self.vocabulary = vocabulary
        self.unigram = (counts + ADDED) / (counts.sum() + ADDED * vocabulary)  # (V,)
        self.keys, self.counts = np.unique(before * vocabulary + after, return_counts=True)
        self.begun = np.bincount(before, minlength=vocabulary)

    def log_likelihood(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Return (n,) log p(after | before) in nats, for (n,) pairs of tokens."""
        keys = before * self.vocabulary + after
        places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        seen = np.where(self.keys[places] == keys, self.counts[places], 0)
        bigram = seen / self.begun[before].clip(min=1)
        return np.log(BIGRAM * bigram + (1 - BIGRAM) * self.unigram[after])


@dataclass(frozen=True)
class Contrast:
    """Compare a model of the domain with one of general text."""

    domain: Bigrams
    general: Bigrams

    def scores(self, examples: Examples) -> np.ndarray:
        """Return (n,) mean log-likelihoods per token by the domain's model minus those by the general one, in nats."""
        before, after = _pairs(examples)
        gained = self.domain.log_likelihood(before, after) - self.general.log_likelihood(before, after)
        counts = examples.lengths.numpy() - 1
        owner = np.repeat(np.arange(len(examples)), counts)
        return np.bincount(owner, gained, len(examples)) / counts.clip(min=1)

    def is_term(self, tokens: np.ndarray) -> bool:
        """Return whether a span of these tokens is a domain term.

        It is one if its tokens' log-likelihood in the domain is higher by more than TERM on average. Unigrams are used,
        because bigrams would depend on the words around a span. This definition is the project's own.
        """
        return (
            float(np.mean(np.log(self.domain.unigram[tokens] / self.general.unigram[tokens]))) > TERM
            if len(tokens)
            else False
        )


def _pairs(examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Return each example's tokens except the last, and the token after each of them; int64."""
    tokens = _flat(examples)
    first = np.zeros(len(tokens), dtype=bool)
    first[np.cumsum(examples.lengths.numpy()) - examples.lengths.numpy()] = True
    inside = np.flatnonzero(~first)
    return tokens[inside - 1], tokens[inside]


def _flat(examples: Examples) -> np.ndarray:
    """Return the tokens of all examples, end to end; int64."""
    return np.concatenate([examples.tokens(row) for row in range(len(examples))]).astype(np.int64)
