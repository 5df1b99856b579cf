import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sklearn

from dsdistill.evaluation import metrics

SIZES = [(1, 2), (7, 2), (50, 3), (400, 20)]


def draw(n, classes):
    generator = np.random.default_rng([n, classes])
    labels = generator.integers(0, classes, n)
    noise = generator.integers(0, classes, n)
    return np.where(generator.random(n) < 0.6, labels, noise), labels


@pytest.mark.filterwarnings("ignore:A single label")
@pytest.mark.parametrize("n, classes", SIZES)
def test_classes_match_oracle(n, classes):
    predicted, labels = draw(n, classes)
    assert metrics.accuracy(predicted, labels) == pytest.approx(sklearn.accuracy_score(labels, predicted))
    assert metrics.macro_f1(predicted, torch.tensor(labels)) == pytest.approx(
        sklearn.f1_score(labels, predicted, average="macro")
    )
    assert metrics.mcc(predicted, labels) == pytest.approx(sklearn.matthews_corrcoef(labels, predicted))


def test_classes_by_hand():
    predicted, labels = [0, 0, 1, 1], [0, 1, 1, 1]
    assert metrics.accuracy(predicted, labels) == 0.75
    assert metrics.macro_f1(predicted, labels) == pytest.approx((2 / 3 + 4 / 5) / 2)
    # (TP·TN − FP·FN) / √(…) with TP 2, TN 1, FP 0, FN 1
    assert metrics.mcc(predicted, labels) == pytest.approx(2 / math.sqrt(2 * 3 * 1 * 2))


@pytest.mark.parametrize("n", [1, 7, 200])
def test_two_classes_match_oracle(n):
    predicted, labels = draw(n, 2)
    expected = sklearn.f1_score(labels, predicted, zero_division=0.0)
    assert metrics.f1(predicted, labels) == pytest.approx(expected)
    logits = np.random.default_rng(n).normal(size=(n, 2))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = sklearn.log_loss(labels, probabilities, labels=[0, 1])
    assert metrics.cross_entropy(logits, labels) == pytest.approx(expected)


def test_f1_by_hand():
    assert metrics.f1([1, 1, 0, 0], [1, 0, 1, 0]) == 0.5
    assert metrics.f1([0, 0], [0, 0]) == 0.0


def test_macro_f1_ignores_classes_that_do_not_occur():
    assert metrics.macro_f1([0, 5], [0, 5]) == 1.0


@pytest.mark.parametrize("n", [2, 9, 300])
def test_correlations_match_oracle(n):
    generator = np.random.default_rng(n)
    x = generator.integers(0, 6, n) + np.arange(n) % 2 / 2  # ties
    y = x + generator.normal(size=n)
    assert metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_correlations_of_float32_far_from_zero():
    x = torch.arange(5, dtype=torch.float32) + 1e6
    assert metrics.pearson(x, -2 * x) == pytest.approx(-1.0)
    assert metrics.spearman(x, x**3) == pytest.approx(1.0)


@pytest.mark.parametrize("metric", [metrics.mcc, metrics.pearson, metrics.spearman])
def test_constant_gives_zero(metric):
    assert metric([1, 1, 1], [0, 1, 2]) == 0.0
    assert metric([0, 1, 2], [1, 1, 1]) == 0.0
    assert metric([1], [1]) == 0.0


def test_constant_that_rounds_gives_zero():
    assert metrics.pearson(torch.full((3,), 0.1), [1.0, 2.0, 3.0]) == 0.0


def test_kl_by_hand():
    teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    student = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log() + 3  # logits are free up to a constant
    assert metrics.kl(teacher, student) == pytest.approx(
        (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2, abs=1e-6
    )


def test_kl_matches_oracle_and_direction():
    generator = np.random.default_rng(0)
    teacher, student = generator.normal(size=(2, 30, 11)) * 5
    p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (teacher, student))
    assert metrics.kl(teacher, student) == pytest.approx(stats.entropy(p, q, axis=-1).mean())
    assert metrics.kl(teacher, student) != pytest.approx(metrics.kl(student, teacher))


def test_kl_extremes():
    assert metrics.kl([[1e4, 0.0]], [[1e4, 0.0]]) == 0.0
    assert metrics.kl([[0.0, -math.inf]], [[0.0, -math.inf]]) == 0.0  # a class ruled out by both
    assert metrics.kl([[0.0, 0.0]], [[0.0, -math.inf]]) == math.inf
    assert metrics.kl([[1e4, 0.0]], [[0.0, 1e4]]) == pytest.approx(1e4)


def test_agreement():
    assert metrics.agreement([[0.0, 1.0], [2.0, 1.0]], [[0.0, 9.0], [0.0, 1.0]]) == 0.5


def test_perplexity():
    assert metrics.perplexity(10 * math.log(50), 10) == pytest.approx(50)
    assert metrics.perplexity(1e9, 1) == math.inf


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: metrics.accuracy([0, 1], [0]), r"shapes \(2,\) and \(1,\)"),
        (lambda: metrics.accuracy([], []), "not empty"),
        (lambda: metrics.pearson([0.0, math.nan], [0.0, 1.0]), "1 of 2 values are NaN or infinite"),
        (lambda: metrics.kl([[math.nan, 0.0]], [[0.0, 0.0]]), "1 of 2 values are NaN or infinite"),
        (lambda: metrics.kl([[math.inf, 0.0]], [[0.0, 0.0]]), "1 of 2 values are NaN or infinite"),
        (lambda: metrics.spearman([-math.inf, 0.0], [0.0, 1.0]), "1 of 2 values are NaN or infinite"),
        (lambda: metrics.perplexity(0.0, 0), "0 tokens"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
