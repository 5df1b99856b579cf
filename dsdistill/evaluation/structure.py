"""Measure how much of the teacher's representation space a student keeps, by pure functions of arrays in float64.

Vectors are mean-pooled last-layer states unless said otherwise, of text that neither model trained on and with dropout
off. Fits use a second such set that shares no example with the first, with at least 10 examples per feature: with fewer
the maps would overfit. The papers that name these metrics print no formulas, so all formulas are this project's
interpretation. No metric is meaningful alone: a model that does not train has the best RCS, and a collapsed model has
the highest compactness C.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dsdistill.evaluation.metrics import spearman

RIDGE = 1e-3  # penalty, relative to the mean variance of a feature
COVERED = 0.95  # share of the teacher's variance that the principal components of R cover
UNITS = 400  # most units of a level of structural consistency


class Estimate(NamedTuple):
    """An Estimate is a value with its bootstrap interval (percentiles)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Compactness:
    score: Estimate  # 0 to 100
    effective_rank: float  # 1 to d
    participation_ratio: float  # (Σλ)² / Σλ², 1 to d
    compactness: float  # C, 0 to 1
    retention: float  # R, 0 to 1


@dataclass(frozen=True)
class Consistency:
    score: Estimate  # 0 to 100
    levels: dict[str, float]  # ρ of each, −1 to 1


class Change(NamedTuple):
    """A Change holds means over pairs of consecutive stages; lower is more stable."""

    rcs: float  # 0 to 1
    cka_distance: float  # 1 − debiased CKA, which a rotation of the space leaves at 0


def change(stages: Sequence[ArrayLike]) -> Change:
    """Return RCS, the mean over stages k ≥ 2 and examples i of (1 − cos(r_i^k, r_i^(k−1))) / 2, and 1 − debiased CKA.

    stages: at least 2, each the (n, d) vectors of the same n ≥ 4 examples at its end. Report RCS together with KL and
    the task's score: weights that never move score 0.
    """
    vectors = [_matrix(stage) for stage in stages]
    if len(vectors) < 2:
        raise ValueError(f"points in training: got {len(vectors)}, expected at least 2")
    steps = list(itertools.pairwise(vectors))
    turned = [((1 - _cosines(before, after)) / 2).mean().item() for before, after in steps]
    apart = [1 - debiased_cka(before, after) for before, after in steps]
    return Change(sum(turned) / len(steps), sum(apart) / len(steps))


def debiased_cka(x: ArrayLike, y: ArrayLike) -> float:
    """Return HSIC(x, y) / √(HSIC(x, x) HSIC(y, y)) with the unbiased HSIC (Song et al. 2012) of linear kernels.

    x: (n, d_x), y: (n, d_y), n ≥ 4. The result is near 0 for unrelated vectors however few there are (plain CKA is
    not), and may be slightly negative. It is 0 if all vectors of one side are equal.
    """
    x, y = _pair(x, y, at_least=4)
    # Only differences between vectors matter; a large mean would cost them digits.
    kernels = [x @ x.T for x in (x - x.mean(0), y - y.mean(0))]
    for kernel in kernels:
        kernel.fill_diagonal_(0)
    cross, own = _hsic(*kernels), [_hsic(kernel, kernel) for kernel in kernels]
    return cross / math.sqrt(own[0] * own[1]) if min(own) > 0 else 0.0


def _hsic(k: Tensor, m: Tensor) -> float:
    """Return the unbiased HSIC of two (n, n) kernels with zero diagonals."""
    n = len(k)
    value = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(1))
    return value.item() / (n * (n - 3))


def semantic_alignment(
    student: ArrayLike,
    teacher: ArrayLike,
    fit_student: ArrayLike,
    fit_teacher: ArrayLike,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return 100 · max(0, mean cos(W (r_S − μ_S), r_T − μ_T)).

    student (n, d_s), teacher (n, d_t): held-out. fit_student (m, d_s), fit_teacher (m, d_t): used to fit the means and
    W, a ridge regression with penalty 1e-3 · tr(XᵀX) / d_s.
    """
    student, teacher = _pair(student, teacher)
    fit_student, fit_teacher = _pair(fit_student, fit_teacher)
    predicted = (student - fit_student.mean(0)) @ _ridge(fit_student, fit_teacher)
    cosines = _cosines(predicted, teacher - fit_teacher.mean(0))
    return _bootstrap(
        lambda chosen: 100 * max(0.0, cosines[chosen].mean().item()), len(cosines), samples, seed
    )


def domain_capture(
    student: ArrayLike,
    teacher: ArrayLike,
    domain: ArrayLike,
    fit_student: ArrayLike,
    fit_teacher: ArrayLike,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return the semantic alignment of the spans that are terms of the domain.

    student, teacher: (n, d) mean-pooled states of spans; domain: (n,) bool. The map is fitted on spans of any kind.
    """
    chosen = torch.as_tensor(domain).cpu().bool()
    if not chosen.any():
        raise ValueError(f"domain: got none of {len(chosen)} spans, expected at least one")
    student, teacher = (_matrix(x)[chosen] for x in (student, teacher))
    return semantic_alignment(student, teacher, fit_student, fit_teacher, samples=samples, seed=seed)


def representation_compactness(
    student: ArrayLike,
    teacher: ArrayLike,
    fit_student: ArrayLike,
    fit_teacher: ArrayLike,
    *,
    samples: int = 200,
    seed: int = 0,
) -> Compactness:
    """Return 100 · 2CR / (C + R): compactness C is high for few directions, retention R if they predict the teacher's.

    C = 1 − (erank − 1) / (d_s − 1) on held-out vectors, where erank is the exponential of the entropy of the
    covariance's normalised eigenvalues (Roy & Vetterli 2007). With fewer examples than features erank is too low.
    R is the held-out R² of a ridge regression from the student, clipped to [0, 1], averaged over the teacher's
    principal components that cover 95% of its variance. The components are whitened: otherwise a student that has kept
    only the first direction would score high.
    """
    student, teacher = _pair(student, teacher)
    fit_student, fit_teacher = _pair(fit_student, fit_teacher)
    components, scale = _principal_components(fit_teacher)
    targets = [(x - fit_teacher.mean(0)) @ components / scale for x in (fit_teacher, teacher)]
    predicted = (student - fit_student.mean(0)) @ _ridge(fit_student, targets[0])

    def parts(chosen: Tensor) -> tuple[float, float]:
        return _compact(student[chosen])[0], _explained(predicted[chosen], targets[1][chosen])

    def score(chosen: Tensor) -> float:
        c, r = parts(chosen)
        return 200 * c * r / (c + r) if c + r > 0 else 0.0

    everything = torch.arange(len(student))
    c, effective_rank, participation = _compact(student)
    return Compactness(
        _bootstrap(score, len(student), samples, seed),
        effective_rank,
        participation,
        c,
        parts(everything)[1],
    )


def _compact(x: Tensor) -> tuple[float, float, float]:
    """Return C, effective rank and participation ratio of (n, d) vectors."""
    x = x - x.mean(0)
    # The smaller of the two Gram matrices has all nonzero eigenvalues.
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    if values.sum() <= 0:  # all vectors alike
        return 1.0, 1.0, 1.0
    shares = values / values.sum()
    rank = math.exp(-(shares * shares.clamp_min(1e-300).log()).sum().item())
    width = x.shape[1]
    return 1 - (rank - 1) / max(width - 1, 1), rank, 1 / shares.square().sum().item()


def _explained(predicted: Tensor, truth: Tensor) -> float:
    """Return the mean of the columns' R², each clipped to [0, 1]."""
    spread = (truth - truth.mean(0)).square().sum(0)
    error = (truth - predicted).square().sum(0)
    return torch.where(spread > 0, 1 - error / spread.clamp_min(1e-300), 0.0).clamp(0, 1).mean().item()


def _principal_components(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (d, k) directions that cover the variance, and the (k,) standard deviations along them."""
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    if values.sum() <= 0:
        raise ValueError("teacher: got equal vectors, expected vectors that differ")
    covered = values.cumsum(0) / values.sum()
    count = int((covered < COVERED).sum()) + 1
    return vectors[:, :count], values[:count].sqrt()


def structural_consistency(
    levels: Mapping[str, tuple[Sequence[ArrayLike], Sequence[ArrayLike]]],
    *,
    samples: int = 200,
    seed: int = 0,
) -> Consistency:
    """Return 100 · max(0, mean over levels of ρ); ρ: Spearman correlation of both models' pairwise cosine distances.

    levels: by name (token, phrase, sequence), the student's and the teacher's groups of units, (n_g, d) arrays.
    Distances are taken within a group. The tokens of a sequence form a group, and so do its phrases; all sequences form
    one. A level's ρ is the mean over its groups of 3 units or more; at most 400 units of a level are used, drawn with
    the seed.
    """
    generator = torch.Generator().manual_seed(seed)
    measured = {
        name: _Level(name, student, teacher, generator) for name, (student, teacher) in levels.items()
    }
    if not measured:
        raise ValueError("levels: got none, expected at least one level")
    rho = {name: level.rho() for name, level in measured.items()}
    draws = [
        100 * max(0.0, sum(level.resampled(generator) for level in measured.values()) / len(measured))
        for _ in range(samples)
    ]
    return Consistency(_estimate(100 * max(0.0, sum(rho.values()) / len(rho)), draws), rho)


class _Level:
    """A _Level holds the distances of one level's groups, for student and teacher."""

    def __init__(self, name: str, student: Sequence, teacher: Sequence, generator: torch.Generator):
        if len(student) != len(teacher):
            raise ValueError(
                f"{name}: got {len(student)} and {len(teacher)} groups, expected the same number"
            )
        self.distances: list[tuple[Tensor, Tensor]] = []
        left = UNITS
        for index in torch.randperm(len(student), generator=generator).tolist():
            mine, other = _pair(student[index], teacher[index])
            chosen = torch.randperm(len(mine), generator=generator)[:left]
            if len(chosen) >= 3:
                self.distances.append((_distances(mine[chosen]), _distances(other[chosen])))
                left -= len(chosen)
        if not self.distances:
            raise ValueError(f"{name}: got no group of 3 units, expected at least one")
        self.rhos = torch.tensor([_rank_correlation(*pair) for pair in self.distances])

    def rho(self) -> float:
        return self.rhos.mean().item()

    def resampled(self, generator: torch.Generator) -> float:
        """Return ρ of groups drawn with replacement; if there is only one group, its units are drawn."""
        if len(self.rhos) > 1:
            return (
                self.rhos[torch.randint(len(self.rhos), (len(self.rhos),), generator=generator)].mean().item()
            )
        mine, other = self.distances[0]
        drawn = torch.randint(len(mine), (len(mine),), generator=generator)
        # A unit drawn twice has distance 0 to itself in both models: such pairs would raise ρ without meaning.
        return _rank_correlation(mine[drawn][:, drawn], other[drawn][:, drawn], drawn[:, None] != drawn)


def _distances(x: Tensor) -> Tensor:
    """Return the (n, n) distances, 1 − cosine."""
    unit = torch.nn.functional.normalize(x, dim=-1)
    return 1 - unit @ unit.T


def _rank_correlation(mine: Tensor, other: Tensor, keep: Tensor | None = None) -> float:
    above = torch.ones_like(mine, dtype=torch.bool).triu(1)
    if keep is not None:
        above &= keep
    return spearman(mine[above], other[above]) if above.any() else 0.0


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """Return (n,) cosines of rows; 0 if one of them is 0."""
    return torch.nn.functional.cosine_similarity(*_pair(x, y), dim=-1, eps=1e-300)


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    """Return the (d_x, d_y) matrix W that minimises ‖X W − Y‖² + λ ‖W‖², with columns of X and Y centred."""
    x, y = x - x.mean(0), y - y.mean(0)
    gram = x.T @ x
    penalty = RIDGE * gram.trace() / len(gram)
    if penalty <= 0:
        return x.new_zeros(x.shape[1], y.shape[1])
    return torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=x.dtype), x.T @ y)


def _bootstrap(statistic: Callable[[Tensor], float], n: int, samples: int, seed: int) -> Estimate:
    """Return `statistic` of all n examples, and its interval over sets of n drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    draws = [statistic(torch.randint(n, (n,), generator=generator)) for _ in range(samples)]
    return _estimate(statistic(torch.arange(n)), draws)


def _estimate(value: float, draws: list[float], level: float = 0.95) -> Estimate:
    if not draws:
        return Estimate(value, value, value)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.tensor(draws, dtype=torch.float64).quantile(ends).tolist()
    return Estimate(value, low, high)


def _matrix(x: ArrayLike) -> Tensor:
    x = torch.as_tensor(x).detach().cpu().double()
    if x.dim() != 2 or not x.numel():
        raise ValueError(f"got shape {tuple(x.shape)}, expected (n, d) and not empty")
    if not x.isfinite().all():
        raise ValueError(
            f"{int((~x.isfinite()).sum())} of {x.numel()} values are NaN or infinite, expected none"
        )
    return x


def _pair(x: ArrayLike, y: ArrayLike, at_least: int = 1) -> tuple[Tensor, Tensor]:
    x, y = _matrix(x), _matrix(y)
    if len(x) != len(y) or len(x) < at_least:
        raise ValueError(f"got {len(x)} and {len(y)} vectors, expected the same number, at least {at_least}")
    return x, y
