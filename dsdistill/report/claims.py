"""Judge the claims of a paper by the runs of a comparison, paired by their seeds."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsdistill.report.study import BETTER, DOWN, UP, WORSE, Claim, Study
from dsdistill.report.summary import metric, title

REPRODUCED, REVERSED, NOT_SEEN = "reproduced", "reversed", "not seen"
LEVEL = 0.95  # of the one-sided test
# Scores that are better if they are lower.
LOWER = {"loss", "kl", "perplexity", "cer", "rcs", "cka_distance", "distance", "latency_ms", "parameters"}

Scores = Mapping[str, Sequence[Mapping[str, float]]]


@dataclass(frozen=True)
class Verdict:
    """A Verdict is what the runs say about one claim."""

    claim: str  # in words
    score: str
    difference: float | None  # mean over the seeds, positive in the claimed direction; None without runs
    error: float | None  # its standard error; None with one seed
    outcome: str


def verdicts(study: Study, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Verdict]:
    """Return the verdicts on all claims; a claim about several pairs or curves has one for each.

    Each seed gives one difference, positive in the claimed direction. A claim is reproduced if the mean of these
    differences exceeds t standard errors, where t is the 95% quantile of Student's distribution (2.92 for three seeds).
    It is reversed if the mean is below −t standard errors, and otherwise not seen. For a trend, the difference is the
    least-squares slope over the values of the axis, numbered 0, 1, 2, …

    rows: summaries of the runs of each cell, in the order of the seeds.
    """
    scores = {cell: [of["models"]["student"] for of in rows.get(cell, ())] for cell in study.cells}
    made = []
    for claim in study.claims:
        if claim.trend:
            made += [_trend(claim, name, cells, scores) for name, cells in study.curves().items()]
            continue
        pairs = list(zip(claim.order, claim.order[1:], strict=False))
        pairs += [(claim.best, other) for other in _rivals(study, claim)]
        made += [_better(claim.metric, first, second, scores) for first, second in pairs]
    return made


def rows_of(found: Sequence[Verdict]) -> list[list[str]]:
    """Return the header and the rows of a table of verdicts."""
    head = ["claim", "score", "difference", "standard error", "verdict"]
    return [
        head,
        *([of.claim, title(of.score), _shown(of.difference), _shown(of.error), of.outcome] for of in found),
    ]


def legend(seeds: int) -> str:
    """Return what the verdicts mean, with the quantile for this number of seeds."""
    limit = f"{quantile(seeds):.2f} standard errors" if seeds > 1 else "its limit, which needs two seeds"
    return (
        f"Verdicts: a claim is reproduced if the mean difference of the seeds, in the claimed direction, is more than "
        f"{limit} (one-sided test, 95%). It is reversed if the difference is that large in the opposite direction. "
        "Otherwise it is not seen. For a trend, the difference is the slope from one value of the axis to the next."
    )


def quantile(seeds: int) -> float:
    """Return the 95% quantile of Student's distribution for a mean over `seeds` differences."""
    from scipy.stats import t  # slow to import

    return float(t.ppf(LEVEL, seeds - 1))


def _rivals(study: Study, claim: Claim) -> list[str]:
    """Return the cells that the best one is compared with: the others of its curve, or of the table without an axis."""
    if not claim.best:
        return []
    curves = study.curves() if study.axis else {}
    own = next(
        (of for of in curves.values() if claim.best in [cell for _, cell in of]),
        [("", c) for c in study.cells],
    )
    return [cell for _, cell in own if cell != claim.best]


def _better(score: str, first: str, second: str, scores: Scores) -> Verdict:
    sign = -1 if metric(score) in LOWER else 1
    pairs = zip(scores.get(first, ()), scores.get(second, ()), strict=False)
    found = [sign * (a[score] - b[score]) for a, b in pairs if score in a and score in b]
    return _verdict(f"{first} is better than {second}", score, found)


def _trend(claim: Claim, name: str, cells: Sequence[tuple[float | str, str]], scores: Scores) -> Verdict:
    score, trend = claim.metric, claim.trend
    falls = trend == DOWN or (trend in (BETTER, WORSE) and (trend == BETTER) == (metric(score) in LOWER))
    runs = zip(*(scores.get(cell, ()) for _, cell in cells), strict=False)
    found = [
        (-1 if falls else 1) * _slope([run[score] for run in seed])
        for seed in runs
        if all(score in run for run in seed)
    ]
    words = {UP: "rises", DOWN: "falls", BETTER: "gets better", WORSE: "gets worse"}[trend]
    where = f" ({name})" if name else ""
    return _verdict(f"{title(score)} {words} along the axis{where}", score, found)


def _slope(values: Sequence[float]) -> float:
    """Return the least-squares slope over 0, 1, 2, …"""
    middle = (len(values) - 1) / 2
    products = sum((x - middle) * value for x, value in enumerate(values))
    return products / sum((x - middle) ** 2 for x in range(len(values)))


def _verdict(claim: str, score: str, found: Sequence[float]) -> Verdict:
    if len(found) < 2:
        mean = found[0] if found else None
        return Verdict(claim, score, mean, None, f"{NOT_SEEN} ({'one seed' if found else 'not run'})")
    mean, error = statistics.fmean(found), statistics.stdev(found) / math.sqrt(len(found))
    outcome = NOT_SEEN
    if abs(mean) > quantile(len(found)) * error:
        outcome = REPRODUCED if mean > 0 else REVERSED
    return Verdict(claim, score, mean, error, outcome)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:+.4g}"
