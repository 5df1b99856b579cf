"""Compare methods: means and deviations over the runs of each, and how a score depends on a setting."""

import collections
import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dsdistill.report.curves import Chart, wide
from dsdistill.report.run_files import CONFIG, METRICS, SUMMARY, RunFiles, number, scores_of
from dsdistill.report.study import Study
from dsdistill.report.summary import START, aligned, in_order, metric, title, turned

HEAD = "| method | runs |"  # beginning of the table
SEED = "seed-"  # prefix of the name of a run's folder
# Scores that depend on the machine and say nothing about a method.
_LEFT_OUT = {"tokens_per_second", "training_tokens_per_second"}
# Scores of a search that a comparison leaves out: others in the table say nearly the same.
_OF_SEARCH = {"mrr_10", "ndcg_10", "teacher_pearson", "distance"}
# Settings that differ between the runs of one method, or say nothing about it.
_PLACES = ("run.dir", "run.name", "run.seed", "data.cache")


def table(rows: dict[str, list[dict[str, Any]]], study: Study | None = None) -> str:
    """Return a Markdown table: the teacher's scores, then each method's, mean ± standard deviation over its runs.

    rows: summaries by method; the scores are those of its student. study: its scores are the columns, and the published
    numbers are in brackets.
    """
    columns, lines = cells(rows, study)
    head = [HEAD + " " + " | ".join(map(title, columns)) + " |", "|---|---:|" + "---:|" * len(columns)]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"


def plain(rows: dict[str, list[dict[str, Any]]], study: Study | None = None) -> str:
    """Return the same table as plain text for a terminal."""
    columns, lines = cells(rows, study)
    return "\n".join(aligned(turned([["method", "runs", *map(title, columns)], *lines])))


def legend(rows: dict[str, list[dict[str, Any]]], study: Study | None = None) -> list[str]:
    """Return what the lines of a table of methods mean."""
    told = ["Mean ± standard deviation over the finished runs of a method."]
    if study is not None and study.published:
        told.append("In brackets: the published numbers.")
    runs = [run["models"] for of in rows.values() for run in of]
    if any("start" in models for models in runs):
        told.append(f"{START}.")
    if any(metric(score) == "texts_per_second" for models in runs for score in models["student"]):
        told.append(
            "sentences/s: speed of each model's forward passes on the dev set, with all processes of the run."
        )
    return told


def cells(
    rows: dict[str, list[dict[str, Any]]], study: Study | None = None
) -> tuple[list[str], list[list[str]]]:
    """Return the scores that a table of methods shows, and its lines: name, runs and those scores.

    The first lines are the teacher's and, if runs scored it, the student's before its first step.
    """
    by_name: dict[str, list[dict[str, float]]] = {}
    for summaries in rows.values():
        for summary in summaries:
            if "teacher" in summary["models"]:
                by_name["teacher"] = [summary["models"]["teacher"]]
    by_name |= _starts(rows)
    by_name |= {name: [summary["models"]["student"] for summary in runs] for name, runs in rows.items()}
    if study is not None:
        by_name |= {name: [] for name in study.published if name not in by_name}
    if study is not None and study.metrics:
        columns = list(study.metrics)
    else:
        columns = compared(scores for runs in by_name.values() for scores in runs)
    return columns, [
        [name, str(len(runs)), *(_beside(name, column, runs, study) for column in columns)]
        for name, runs in by_name.items()
    ]


def _beside(name: str, column: str, runs: list[dict[str, float]], study: Study | None) -> str:
    """Return a score's mean and deviation, with the published number in brackets if there is one."""
    measured = _cell([scores[column] for scores in runs if column in scores])
    printed = None if study is None else study.beside(name, column)
    return measured if printed is None else f"{measured} ({printed:g})"


def _starts(rows: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, float]]]:
    """Return the scores of students before their first step: one line if all methods begin alike."""
    found: dict[str, list[dict[str, float]]] = {}
    for name, summaries in rows.items():
        starts = [run["models"]["start"] for run in summaries if "start" in run["models"]]
        if starts and all(_alike(starts[0], other) for other in starts):
            starts = [dict(collections.ChainMap(*starts))]
        for of in found.values():
            if len(of) == len(starts) and all(map(_alike, of, starts)):
                of[:] = [theirs | mine for theirs, mine in zip(of, starts, strict=True)]
                break
        else:
            found |= {name: starts} if starts else {}
    return {"start" if len(found) == 1 else f"{name}: start": of for name, of in found.items()}


def _alike(first: dict[str, float], second: dict[str, float]) -> bool:
    """Return whether two students agree in all scores that both have (one may have no teacher)."""
    return all(
        math.isclose(first[score], second[score], rel_tol=1e-3, abs_tol=1e-4)
        for score in first.keys() & second.keys()
    )


def compared(runs: Iterable[dict[str, float]]) -> list[str]:
    """Return the scores that a comparison shows, in the order of tables; for a search only the most important."""
    scores = in_order(s for run in runs for s in run)
    left_out = _LEFT_OUT | (_OF_SEARCH if any(metric(score) == "recall_1" for score in scores) else set())
    return [score for score in scores if metric(score) not in left_out]


def _cell(values: list[float]) -> str:
    if not values:
        return "–"
    mean = statistics.fmean(values)
    digits = max(0, 3 - math.floor(math.log10(abs(mean)))) if mean else 4
    text = f"{mean:,.{min(digits, 4)}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{min(digits, 4)}f}"


@dataclass
class Run:
    """A Run is one folder of a comparison."""

    name: str  # METHOD/seed-N, or METHOD
    steps: int  # from the last line of its log
    summary: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """Return how far the run has come."""
        if not self.summary.get("finished"):
            return f"at step {self.steps:,}" if self.steps else "started, no step logged yet"
        return "evaluated" if "evaluated" in self.summary else "finished"


def is_run(folder: str) -> bool:
    """Return whether a folder has a file that a run writes."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in (CONFIG, METRICS, SUMMARY))


def _began(folder: str) -> bool:
    """Return whether a folder is surely a run's: a config.yaml alone may be anybody's."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in (METRICS, SUMMARY))


def runs_of(folder: str) -> dict[str, list[Run]]:
    """Return the runs METHOD/seed-N, or METHOD, below a folder, by method; they may be unfinished."""
    found: dict[str, list[Run]] = {}
    for method in _folders(folder):
        seeds = sorted(
            filter(_seeded, _folders(os.path.join(folder, method))), key=lambda name: (len(name), name)
        )
        for seed in ("", *seeds):
            path = os.path.join(folder, method, seed)
            if is_run(path) if seed else _began(path):
                files = RunFiles(path)
                summary = files.object(SUMMARY)
                summary["models"] = scores_of(summary)
                steps = 0 if summary.get("finished") else _steps(files)
                run = Run(os.path.join(method, seed).rstrip("/"), steps, summary, files.settings())
                found.setdefault(method, []).append(run)
    return found


def _seeded(name: str) -> bool:
    return name.startswith(SEED)


def _folders(folder: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if os.path.isdir(os.path.join(folder, name)))
    except OSError:
        return []


def _steps(files: RunFiles) -> int:
    last = 0.0
    for record in files.lines(METRICS):
        last = number(record.get("step")) or last
    return int(last)


def by_cell(runs: dict[str, list[Run]], study: Study | None) -> dict[str, list[Run]]:
    """Return runs by the names of a study's cells, in its order, in place of the names of their folders."""
    if study is None:
        return runs
    names = dict(zip(study.folders, study.cells, strict=True))
    named = {names[folder]: runs[folder] for folder in study.folders if folder in runs}
    return named | {folder: of for folder, of in runs.items() if folder not in names}


def scored(runs: dict[str, list[Run]]) -> dict[str, list[dict[str, Any]]]:
    """Return the summaries that a table can show: those of finished runs with a student's scores."""
    kept = {
        name: [
            run.summary for run in of if run.summary.get("finished") and "student" in run.summary["models"]
        ]
        for name, of in runs.items()
    }
    return {name: summaries for name, summaries in kept.items() if summaries}


def sweeps(runs: dict[str, list[Run]]) -> list[Chart]:
    """Return a chart for each setting that methods sweep, and each score: means and deviations over the runs.

    A sweep is two or more methods whose settings differ in only one number.
    """
    settings: dict[str, dict[str, Any]] = {}
    for method, of in runs.items():
        if any(run.summary["models"].get("student") and run.settings for run in of):
            settings[method] = _flat(next(run.settings for run in of if run.settings))
    numbers = {key for flat in settings.values() for key, value in flat.items() if number(value) is not None}
    charts: list[Chart] = []
    for key in sorted(numbers):
        groups: dict[str, dict[float, str]] = {}
        for method, flat in settings.items():
            if (value := number(flat.get(key))) is not None:
                rest = repr(sorted((k, repr(v)) for k, v in flat.items() if k != key))
                groups.setdefault(rest, {})[value] = method
        for swept in groups.values():
            if len(swept) > 1:
                charts += _swept(key, swept, runs, len(charts))
    return charts


def _swept(key: str, swept: dict[float, str], runs: dict[str, list[Run]], before: int) -> list[Chart]:
    """Return a chart for each score over the values of one setting."""
    scores = {
        value: [run.summary["models"].get("student", {}) for run in runs[m]] for value, m in swept.items()
    }
    charts: list[Chart] = []
    for score in compared(run for of in scores.values() for run in of):
        if metric(score) in ("parameters", "texts_per_second"):
            continue
        chart = Chart(f"sweep-{before + len(charts)}", f"{title(score)} by {key}", x=key, sparse=True)
        chart.x_logarithmic, chart.logarithmic = min(swept) > 0 and wide(swept), False
        for value in sorted(scores):
            found = [run[score] for run in scores[value] if score in run]
            if found:
                chart.add("mean", value, statistics.fmean(found))
                chart.spreads.setdefault("mean", []).append(
                    statistics.stdev(found) if len(found) > 1 else 0.0
                )
        charts.append(chart)
    return charts


def _flat(settings: object, prefix: str = "") -> dict[str, Any]:
    """Return settings by dotted key, without those that differ between the runs of one method."""
    if isinstance(settings, dict) and settings:
        return {k: v for name, of in settings.items() for k, v in _flat(of, f"{prefix}{name}.").items()}
    if isinstance(settings, list) and settings:
        return {k: v for i, of in enumerate(settings) for k, v in _flat(of, f"{prefix}{i}.").items()}
    key = prefix.removesuffix(".")
    return {} if key in _PLACES else {key: settings}
