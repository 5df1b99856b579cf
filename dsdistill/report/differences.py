"""Estimate how far methods differ in recall, by a paired bootstrap over the queries of a dev set."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from dsdistill.report.methods import Run
from dsdistill.report.run_files import PREDICTIONS, RunFiles, number, part
from dsdistill.report.summary import title

RESAMPLES, SEED, LEVEL = 10_000, 0, 0.95
CUTS = {"recall_1": 1, "recall_10": 10}  # ranks that count as found
BLOCK = 2**24  # most numbers of resamples in memory at once
TEACHER = ""  # stands for the teacher among names of methods, which are names of folders


@dataclass(frozen=True)
class Difference:
    """A Difference is the first method's recall minus the second's on one dev set, with its interval."""

    first: str
    second: str
    score: str  # SET/recall_10, or recall_10 if the set has no name
    mean: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Return whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def differences(path: str, runs: dict[str, list[Run]]) -> list[Difference]:
    """Return how far the methods of a comparison differ from the teacher, and from each other, on each dev set.

    The result of a query is its mean over a method's runs, so that each query is paired with itself. If runs have
    different queries under the same name, only runs with the queries of most methods count. Unfinished runs are left
    out.
    """
    sets: dict[str, dict[tuple[str, ...], dict[str, list[np.ndarray]]]] = {}
    for method, of in runs.items():
        for run in of:
            if not run.summary.get("finished"):
                continue
            for name, (queries, models) in _ranks(RunFiles(os.path.join(path, run.name))).items():
                group = sets.setdefault(name, {}).setdefault(queries, {})
                group.setdefault(method, []).append(models["student"])
                if "teacher" in models:
                    group.setdefault(TEACHER, [models["teacher"]])
    made: list[Difference] = []
    for name, groups in sets.items():
        hits = {method: _hits(of) for method, of in max(groups.values(), key=len).items()}
        methods = [method for method in hits if method != TEACHER]
        pairs = [*((method, TEACHER) for method in methods if TEACHER in hits), *combinations(methods, 2)]
        made += _differences(name, hits, pairs)
    return made


def rows(found: Sequence[Difference]) -> list[list[str]]:
    """Return the header and the rows of a table of differences."""
    head = ["difference", "score", "mean", f"{LEVEL:.0%} interval", "interval excludes 0"]
    lines = [
        [
            f"{of.first} − {of.second}",
            title(of.score),
            f"{of.mean:+.4f}",
            f"{of.low:+.4f} to {of.high:+.4f}",
            "yes" if of.certain else "no",
        ]
        for of in found
    ]
    return [head, *lines]


def legend() -> str:
    """Return what the numbers of the table mean."""
    return (
        f"Intervals: paired bootstrap over queries ({RESAMPLES:,} resamples, seed {SEED}); "
        "the result of a query is its mean over a method's runs."
    )


def _ranks(files: RunFiles) -> dict[str, tuple[tuple[str, ...], dict[str, np.ndarray]]]:
    """Return each dev set's queries, and (n,) ranks of their documents by the student and, if known, the teacher."""
    queries: dict[str, list[str]] = {}
    ranks: dict[str, dict[str, list[float]]] = {}
    for record in files.lines(PREDICTIONS):
        if number(part(record, "rank", "student")) is None:
            continue
        name = str(record.get("set", ""))
        queries.setdefault(name, []).append(str(record.get("id")))
        for model in ("student", "teacher"):
            if (rank := number(part(record, "rank", model))) is not None:
                ranks.setdefault(name, {}).setdefault(model, []).append(rank)
    return {
        name: (tuple(of), {model: np.array(its) for model, its in ranks[name].items() if len(its) == len(of)})
        for name, of in queries.items()
    }


def _hits(runs: Sequence[np.ndarray]) -> np.ndarray:
    """Return (n, cuts): the share of runs that rank each query's document within each cut."""
    return np.mean([np.stack([ranks <= most for most in CUTS.values()], axis=1) for ranks in runs], axis=0)


def _differences(
    name: str, hits: dict[str, np.ndarray], pairs: Sequence[tuple[str, str]]
) -> list[Difference]:
    """Return the differences of pairs of methods on one dev set, all from the same resamples."""
    if not pairs:
        return []
    each = np.concatenate([hits[first] - hits[second] for first, second in pairs], axis=1)
    sampled = resampled(each)
    low, high = np.quantile(sampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    keys = [
        (first, second or "teacher", f"{name}/{score}" if name else score)
        for first, second in pairs
        for score in CUTS
    ]
    values = zip(keys, each.mean(0).tolist(), low.tolist(), high.tolist(), strict=True)
    return [Difference(*key, mean, least, most) for key, mean, least, most in values]


def resampled(each: np.ndarray) -> np.ndarray:
    """Return (RESAMPLES, k) means of (n, k) values over resamples of the n rows.

    Equal rows are drawn together, by a multinomial over distinct rows, which are few even for many queries.
    """
    kinds, counts = np.unique(each, axis=0, return_counts=True)
    generator, block = np.random.default_rng(SEED), max(1, BLOCK // len(kinds))
    drawn = [
        generator.multinomial(len(each), counts / len(each), size=min(block, RESAMPLES - start)) @ kinds
        for start in range(0, RESAMPLES, block)
    ]
    return np.concatenate(drawn) / len(each)
