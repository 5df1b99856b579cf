"""Compute metrics of predictions by pure functions of tensors or arrays, in float64; return plain floats.

Small formulas are written out: none of our dependencies offers them without scikit-learn or SciPy, which the tests
use as oracles.
"""

import math

import torch
from numpy.typing import ArrayLike
from torch import Tensor


def accuracy(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Return the fraction of equal entries; both (n,) class indices."""
    predicted, labels = _pair(predicted, labels)
    return (predicted == labels).double().mean().item()


def macro_f1(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Return the mean F1 over the classes that occur in either; both (n,) class indices.

    F1 = 2 hits / (predicted + labelled), so that a precision or recall of 0 / 0 needs no special case.
    """
    confusion = _confusion(*_pair(predicted, labels))
    occurring = confusion.sum(0) + confusion.sum(1)
    scores = 2 * confusion.diag() / occurring
    return scores[occurring > 0].mean().item()


def f1(predicted: ArrayLike, labels: ArrayLike, positive: int = 1) -> float:
    """Return F1 of one class, as GLUE scores MRPC and QQP; 0 if neither has the class. Both (n,) class indices."""
    predicted, labels = (classes == positive for classes in _pair(predicted, labels))
    hits = (predicted & labels).sum().double()
    return (2 * hits / (predicted.sum() + labels.sum()).clamp(min=1)).item()


def cross_entropy(logits: ArrayLike, labels: ArrayLike) -> float:
    """Return the mean negative log-likelihood of the n labels, nats; (n, C) and (n,)."""
    logits, labels = torch.as_tensor(logits).double(), torch.as_tensor(labels)
    return torch.nn.functional.cross_entropy(logits, labels).item()


def mcc(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Return the Matthews correlation of (n,) class indices, any number of classes (Gorodkin 2004).

    It is 0 if either is constant: the formula gives 0 / 0, and a constant guess tells nothing.
    """
    confusion = _confusion(*_pair(predicted, labels))
    n, hits = confusion.sum(), confusion.diag().sum()
    labelled, guessed = confusion.sum(1), confusion.sum(0)
    spread = (n**2 - (labelled**2).sum()) * (n**2 - (guessed**2).sum())
    if spread == 0:
        return 0.0
    return ((hits * n - labelled @ guessed) / spread.sqrt()).item()


def kl(teacher_logits: ArrayLike, student_logits: ArrayLike) -> float:
    """Return the mean KL(teacher ‖ student) of the n distributions, nats, temperature 1; both (n, C)."""
    teacher, student = _pair(teacher_logits, student_logits, logits=True)
    # -inf logits (a class that both rule out) give 0 · (−inf + inf), which counts as 0 here.
    log_p, log_q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q))
    return terms.sum(-1).mean().item()


def agreement(teacher_logits: ArrayLike, student_logits: ArrayLike) -> float:
    """Return the fraction of the n examples on which both choose the same class; both (n, C)."""
    teacher, student = _pair(teacher_logits, student_logits, logits=True)
    return accuracy(teacher.argmax(-1), student.argmax(-1))


def pearson(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Return the linear correlation of (n,) scores, −1 to 1.

    It is 0 if either is constant: the formula gives 0 / 0, and a student that gives every pair the same score has
    learned nothing.
    """
    x, y = (values.double() for values in _pair(predicted, labels))
    # Constants are found by equality: after centring, rounding leaves noise that would correlate with anything.
    if (x == x[0]).all() or (y == y[0]).all():
        return 0.0
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()


def spearman(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Return the Pearson correlation of the ranks of (n,) scores (ties share their mean rank); 0 if one is constant."""
    return pearson(*map(_ranks, _pair(predicted, labels)))


def perplexity(nll: float, count: int) -> float:
    """Return exp(nll / count).

    Args:
        nll: negative log-likelihood of all predicted tokens together, nats.
        count: number of predicted tokens.
    """
    if count < 1:
        raise ValueError(f"perplexity: got {count} tokens, expected at least 1")
    try:
        return math.exp(nll / count)
    except OverflowError:
        return math.inf


def _pair(first: ArrayLike, second: ArrayLike, logits: bool = False) -> tuple[Tensor, Tensor]:
    """Return both as finite tensors of equal shape; a logit may be −inf (a class ruled out)."""
    first, second = torch.as_tensor(first).cpu(), torch.as_tensor(second).cpu()
    if first.shape != second.shape or not first.numel():
        raise ValueError(
            f"shapes {tuple(first.shape)} and {tuple(second.shape)}, expected equal and not empty"
        )
    for values in (first, second):
        bad = ~values.isfinite() & ~(values.isneginf() & logits)
        if bad.any():
            raise ValueError(
                f"{int(bad.sum())} of {values.numel()} values are NaN or infinite, expected none"
            )
    return first, second


def _confusion(predicted: Tensor, labels: Tensor) -> Tensor:
    """Return (C, C) float64: counts of examples by their class (row) and the predicted class (column)."""
    classes = int(max(predicted.max(), labels.max())) + 1
    pairs = torch.bincount(labels * classes + predicted, minlength=classes**2)
    return pairs.view(classes, classes).double()


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / 2)[inverse]
