"""Samplers and the n-gram models behind one of them."""

import math

import numpy as np
import pytest
import torch

from dsdistill.config.checks import GROUP
from dsdistill.data import Examples, Loader
from dsdistill.data.ngrams import ADDED, BIGRAM, Bigrams, Contrast
from dsdistill.data.samplers import HardNegative, Weighted, nearest_others
from tests.data.rig import made


def examples(rows, labels=None, second=None) -> Examples:
    return made(rows, labels, types=second)


def test_weights_decide_how_often_an_example_comes():
    sampler = Weighted(np.array([0.0, math.log(3.0)]), 1.0)
    assert sampler.shares == pytest.approx([0.25, 0.75])
    assert Weighted(np.array([0.0, math.log(3.0)]), 0.5).shares == pytest.approx([0.1, 0.9])
    many = Weighted(np.repeat([0.0, math.log(3.0)], 2000), 1.0).order(np.random.default_rng(0))
    assert len(many) == 4000 and (many >= 2000).mean() == pytest.approx(0.75, abs=0.03)


def test_neighbours_have_other_answers():
    angles = torch.tensor([0.0, 0.01, 0.02, 0.5, 1.0, 3.0])
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    rows = [[1]] * 6
    found = nearest_others(vectors, examples(rows, labels=[0, 0, 1, 1, 1, 1]))
    assert found[0].tolist() == [2, 3, 4] and set(found[5, :2]) == {0, 1}
    assert nearest_others(vectors, examples(rows))[0].tolist() == [1, 2, 3]
    # In pairs the answer is the second text; 0 and 1 have the same.
    pairs = [[7, 9], [8, 9], [7, 5], [7, 6], [7, 7], [7, 8]]
    second = [[0, 1]] * 6
    assert nearest_others(vectors, examples(pairs, second=second))[0].tolist() == [2, 3, 4]


def test_the_answer_to_a_prompt_is_its_response():
    angles = torch.tensor([0.0, 0.01, 0.02, 0.5, 1.0, 3.0])
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    rows = [[1, 2, 9], [1, 2, 2, 9], [1, 9, 9], [1, 8, 9], [2, 7], [2, 7, 0]]
    before = [2, 3, 1, 1, 1, 1]
    prompted = made(rows, ranges=[[(at, len(row))] for at, row in zip(before, rows, strict=True)])
    found = nearest_others(vectors, prompted)
    assert found[0].tolist() == [2, 3, 4] and found[2].tolist() == [1, 0, 3]
    assert found[4].tolist() == [3, 2, 1]
    assert found[5].tolist() == [4, 3, 2]  # 7 and 7 0 are two answers, though a zero ends the second


def test_groups_stay_together_on_any_ranks():
    neighbours = np.stack([(np.arange(16) + shift) % 16 for shift in (1, 2, 3)], axis=1)
    data = examples([[1] * (1 + i % 5) for i in range(16)])
    for world_size, micro in ((1, 4), (2, 2), (1, 8)):
        loaders = [
            Loader(data, 8, micro, world_size, rank, 0, 0, sampler=HardNegative(neighbours))
            for rank in range(world_size)
        ]
        assert loaders[0].steps_per_epoch == 2
        for moments in zip(*(loader.step(0, 1) for loader in loaders), strict=True):
            met = sorted(int(i) for batch in moments for i in batch.index)
            groups = {frozenset((a, *neighbours[a])) for a in range(16)}
            assert len(met) == micro * world_size
            left = set(met)
            assert any(group <= left for group in groups) and len(met) % GROUP == 0


def test_an_epoch_is_drawn_by_seed_and_epoch_alone():
    sampler = Weighted(np.arange(20.0), 3.0)
    data = examples([[1, 2]] * 20)
    first, second = (Loader(data, 4, 4, 1, 0, 7, 0, sampler=sampler) for _ in range(2))
    second.rows(3, 0)  # asked for in another order
    assert [first.rows(0, s).tolist() for s in range(5)] == [second.rows(0, s).tolist() for s in range(5)]
    assert first.rows(0, 0).tolist() != first.rows(1, 0).tolist()


def test_bigrams_by_hand():
    """Tokens 1 2 1 | 2 2 of a vocabulary of 3: bigrams 12, 21, 22; 1 and 2 are each followed, 1 once and 2 twice."""
    model = Bigrams(examples([[1, 2, 1], [2, 2]]), 3)

    def p(token, count):
        return BIGRAM * count + (1 - BIGRAM) * (token + ADDED) / (5 + 3 * ADDED)

    found = np.exp(model.log_likelihood(np.array([1, 2, 2, 1, 0]), np.array([2, 1, 2, 1, 0])))
    assert found == pytest.approx([p(3, 1), p(2, 0.5), p(3, 0.5), p(2, 0), p(0, 0)])
    seen = np.arange(3)
    for before in (1, 2):  # the probabilities add up to 1
        assert np.exp(model.log_likelihood(np.full(3, before), seen)).sum() == pytest.approx(1)


def test_text_of_the_domain_scores_higher():
    chance = np.random.default_rng(0)
    domain = [[1, *chance.integers(5, 12, 8)] for _ in range(40)]
    general = [[1, *chance.integers(10, 20, 8)] for _ in range(40)]
    contrast = Contrast(
        *(Bigrams(examples([list(map(int, r)) for r in rows]), 20) for rows in (domain, general))
    )
    fresh = examples(
        [[1, *map(int, chance.integers(5, 12, 8))], [1, *map(int, chance.integers(10, 20, 8))], [1]]
    )
    scores = contrast.scores(fresh)
    assert scores[0] > 1 > -1 > scores[1] and scores[2] == 0
    assert contrast.is_term(np.array([5, 6])) and not contrast.is_term(np.array([15, 6, 16]))
    assert not contrast.is_term(np.array([10, 11]))
