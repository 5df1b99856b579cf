"""Say how far methods differ in what they find, by a paired bootstrap over the queries of a dev set."""

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
BLOCK = 2**24  # numbers of resamples that are whole at once
LISTED = 100  # pairs of methods
TEACHER = "teacher"


@dataclass(frozen=True)
class Difference:
    """A Difference is the first method's recall less the second's on one dev set, and its interval."""

    first: str
    second: str
    score: str  # SET/recall_10, or without a set recall_10
    mean: float
    low: float
    high: float

    def __str__(self):
        star = " *" if self.low > 0 or self.high < 0 else ""
        return f"{self.mean:+.4f} ({self.low:+.4f} to {self.high:+.4f}){star}"


def differences(path: str, runs: dict[str, list[Run]]) -> list[Difference]:
    """Return how far the methods of a comparison differ from each other, and each from the teacher.

    A query counts as the mean of a method's runs, so that it is paired with itself; methods of other queries than the
    first one's are left out, as are runs that are not finished.
    """
    ranks: dict[str, list[dict[str, dict[str, np.ndarray]]]] = {}
    teacher: dict[str, np.ndarray] = {}
    queries: dict[str, list[str]] | None = None
    for method, of in runs.items():
        for run in of:
            if not run.summary.get("finished"):
                continue
            names, found = _ranks(RunFiles(os.path.join(path, run.name)))
            if not found.get("student") or names != (queries := names if queries is None else queries):
                continue
            ranks.setdefault(method, []).append(found)
            teacher = teacher or found.get("teacher", {})
    if TEACHER in ranks:  # a method of this name
        teacher = {}
    pairs = [*((method, TEACHER) for method in ranks if teacher), *combinations(ranks, 2)]
    made: list[Difference] = []
    for name in queries or {}:
        hits = {m: _hits([found["student"][name] for found in of]) for m, of in ranks.items()}
        if name in teacher:
            hits[TEACHER] = _hits([teacher[name]])
        made += _differences(name, hits, pairs[:LISTED])
    return made


def rows(found: Sequence[Difference]) -> list[list[str]]:
    """Return the head and the lines of a table of differences."""
    scores = list(dict.fromkeys(of.score for of in found))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for of in found:
        lines.setdefault((of.first, of.second), {})[of.score] = str(of)
    head = ["difference", *map(title, scores)]
    return [head, *([" − ".join(pair), *(line.get(s, "-") for s in scores)] for pair, line in lines.items())]


def legend() -> str:
    """Return what the numbers of the table mean."""
    return (
        f"{LEVEL:.0%} intervals of a paired bootstrap over queries ({RESAMPLES:,} resamples, seed {SEED}); "
        "a query counts as the mean of a method's runs. *: the interval excludes zero."
    )


def _ranks(files: RunFiles) -> tuple[dict[str, list[str]], dict[str, dict[str, np.ndarray]]]:
    """Return the queries of each dev set, and each model's (n,) ranks of their documents."""
    names: dict[str, list[str]] = {}
    found: dict[str, dict[str, list[float]]] = {}
    for record in files.lines(PREDICTIONS):
        student = number(part(record, "rank", "student"))
        if student is None:
            continue
        name = str(record.get("set", ""))
        names.setdefault(name, []).append(str(record.get("id")))
        for model in ("student", "teacher"):
            rank = number(part(record, "rank", model))
            if rank is not None:
                found.setdefault(model, {}).setdefault(name, []).append(rank)
    whole = {
        model: {name: np.array(of) for name, of in sets.items() if len(of) == len(names[name])}
        for model, sets in found.items()
    }
    return names, whole


def _hits(runs: Sequence[np.ndarray]) -> np.ndarray:
    """Return (n, cuts): the share of runs that find each query's document so early."""
    return np.mean([np.stack([ranks <= most for most in CUTS.values()], axis=1) for ranks in runs], axis=0)


def _differences(
    name: str, hits: dict[str, np.ndarray], pairs: Sequence[tuple[str, str]]
) -> list[Difference]:
    """Return the differences of pairs of methods on one dev set, all by the same resamples."""
    pairs = [pair for pair in pairs if all(method in hits for method in pair)]
    if not pairs:
        return []
    each = np.concatenate([hits[first] - hits[second] for first, second in pairs], axis=1)
    sampled = resampled(each)
    low, high = np.quantile(sampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    keys = [(*pair, f"{name}/{score}" if name else score) for pair in pairs for score in CUTS]
    values = zip(keys, each.mean(0).tolist(), low.tolist(), high.tolist(), strict=True)
    return [Difference(*key, mean, least, most) for key, mean, least, most in values]


def resampled(each: np.ndarray) -> np.ndarray:
    """Return (RESAMPLES, k) means of (n, k) values over resamples of the n rows.

    Rows that are equal are drawn together, by how often each kind of row comes: few kinds stand for many queries.
    """
    kinds, counts = np.unique(each, axis=0, return_counts=True)
    generator, block = np.random.default_rng(SEED), max(1, BLOCK // len(kinds))
    drawn = [
        generator.multinomial(len(each), counts / len(each), size=min(block, RESAMPLES - start)) @ kinds
        for start in range(0, RESAMPLES, block)
    ]
    return np.concatenate(drawn) / len(each)
