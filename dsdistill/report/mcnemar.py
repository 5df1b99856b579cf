"""Test, for each seed separately, if one of two methods is right on more examples (McNemar 1947, the exact form)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsdistill.report.methods import Run
from dsdistill.report.run_files import PREDICTIONS, RunFiles
from dsdistill.report.study import Study
from dsdistill.report.summary import metric, title

Right = dict[str, tuple[tuple[str, ...], np.ndarray]]  # ids of each dev set's examples, and which are right


@dataclass(frozen=True)
class Paired:
    """A Paired compares what two methods get right in one dev set: one number for each seed that both have."""

    first: str
    second: str
    name: str  # of the dev set
    only_first: tuple[int, ...]  # number of examples that only the first gets right
    only_second: tuple[int, ...]
    p: tuple[float, ...]  # two-sided


def paired(path: str, runs: dict[str, list[Run]], study: Study | None) -> list[Paired]:
    """Return a test on each dev set for every pair of methods that the study claims to differ in accuracy."""
    pairs: dict[tuple[str, str], None] = {}
    for claim in study.claims if study is not None else ():
        if metric(claim.metric) == "accuracy":
            pairs |= dict.fromkeys(zip(claim.order, claim.order[1:], strict=False))
            others = study.cells if study is not None and claim.best else ()
            pairs |= dict.fromkeys((claim.best, other) for other in others if other != claim.best)
    known: dict[str, list[Right]] = {}
    for name in {name for pair in pairs for name in pair}:
        finished = [run for run in runs.get(name, ()) if run.summary.get("finished")]
        known[name] = [_right(RunFiles(os.path.join(path, run.name))) for run in finished]
    made = []
    for first, second in pairs:
        seeds = list(zip(known[first], known[second], strict=False))
        for name in dict.fromkeys(name for a, b in seeds for name in a if name in b):
            both = [(a[name], b[name]) for a, b in seeds if name in a and name in b]
            counts = [_counts(a[1], b[1]) for a, b in both if a[0] == b[0]]
            if counts:
                ours, theirs = zip(*counts, strict=True)
                made.append(Paired(first, second, name, ours, theirs, tuple(exact(*of) for of in counts)))
    return made


def exact(first: int, second: int) -> float:
    """Return the two-sided p-value of the hypothesis that both methods are equally likely to be the only right one.

    first, second: number of examples that only the first, or only the second, method gets right.
    """
    from scipy.stats import binomtest  # slow to import

    return float(binomtest(first, first + second).pvalue) if first + second else 1.0


def rows_of(found: Sequence[Paired]) -> list[list[str]]:
    """Return the header and the rows of a table of tests."""
    head = ["methods", "score", "right only by the first", "right only by the second", "p"]
    return [
        head,
        *(
            [_pair(of), title(_score(of)), _each(of.only_first), _each(of.only_second), _ps(of)]
            for of in found
        ),
    ]


def legend() -> str:
    """Return what the numbers of the table mean."""
    return (
        "For each seed: the number of examples that only the first, or only the second, method gets right, and the "
        "p-value of McNemar's exact test (two-sided)."
    )


def _pair(of: Paired) -> str:
    return f"{of.first} and {of.second}"


def _score(of: Paired) -> str:
    return f"{of.name}/accuracy" if of.name else "accuracy"


def _each(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts))


def _ps(of: Paired) -> str:
    return ", ".join(f"{p:.2g}" for p in of.p)


def _right(files: RunFiles) -> Right:
    """Return which examples of each dev set with classes a run's student gets right."""
    found: dict[str, tuple[list[str], list[bool]]] = {}
    for record in files.lines(PREDICTIONS):
        if "label" in record and "student" in record:
            names, right = found.setdefault(str(record.get("set", "")), ([], []))
            names.append(str(record.get("id")))
            right.append(record["student"] == record["label"])
    return {name: (tuple(names), np.array(right)) for name, (names, right) in found.items()}


def _counts(first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    return int((first & ~second).sum()), int((second & ~first).sum())
