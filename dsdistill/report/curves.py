"""Make the curves of a page from the log of a run, with no more points than a screen can show."""

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsdistill.report.run_files import RunFiles, mapping, number
from dsdistill.report.summary import in_order, metric, title

MOST = 1000  # most points of a curve
CHART, BUDGET = 16_000, 45_000  # most points of a chart, and of a page
FEWEST = 20  # points that a curve keeps even among very many curves
SMOOTHED, RUNS = (
    400,
    120,
)  # number of points from which means are drawn over a curve's faint values, and number of means
SIDE_BY_SIDE = 64  # most curves of a chart
LONGEST = 100  # most characters of a curve's name
DECADES = 100  # ratio of largest to smallest value from which a logarithmic scale is used


class Curve:
    """A Curve is a list of points in the order of ascending x; a y of NaN is a gap."""

    def __init__(self) -> None:
        self.x, self.y = array("d"), array("d")

    def __len__(self) -> int:
        return len(self.x)

    def add(self, x: float, y: float | None) -> None:
        """Add a point, which replaces those at x and beyond: a resumed run logs these again."""
        while self.x and self.x[-1] >= x:
            self.x.pop()
            self.y.pop()
        self.x.append(x)
        self.y.append(math.nan if y is None else y)

    def thinned(self, most: int) -> list[tuple[float, float | None]]:
        """Return at most `most` points, including the smallest and the largest y, with gaps as None.

        The points between the first and the last are divided into equal runs. Each run keeps its smallest and its
        largest y, and a gap if it has one.
        """
        n = len(self.x)
        kept: Iterable[int] = range(n)
        if n > most:
            of_a_run = 3 if any(map(math.isnan, self.y)) else 2
            runs, chosen = max(1, (most - 2) // of_a_run), {0, n - 1}
            for run in range(runs):
                inside = range(1 + run * (n - 2) // runs, 1 + (run + 1) * (n - 2) // runs)
                there = [i for i in inside if not math.isnan(self.y[i])]
                chosen |= (
                    {min(there, key=self.y.__getitem__), max(there, key=self.y.__getitem__)}
                    if there
                    else set()
                )
                if len(there) < len(inside):
                    chosen.add(next(i for i in inside if math.isnan(self.y[i])))
            kept = sorted(chosen)
        return [(self.x[i], None if math.isnan(self.y[i]) else self.y[i]) for i in kept]

    def smoothed(self, runs: int) -> list[tuple[float, float | None]]:
        """Divide the points into `runs` equal runs; return each one's mean, at the middle of its x; ignore gaps."""
        n, made = len(self.x), []
        for run in range(runs):
            first, end = run * n // runs, (run + 1) * n // runs
            there = [y for y in self.y[first:end] if not math.isnan(y)]
            mean = math.fsum(there) / len(there) if there else None
            made.append(((self.x[first] + self.x[end - 1]) / 2, mean))
        return made


@dataclass
class Chart:
    """A Chart is what the page's script draws as one figure."""

    name: str  # the figure's id
    title: str
    curves: dict[str, Curve] = field(default_factory=dict)
    unit: str = ""
    x: str = "step"
    marked: bool = False  # bad steps and spikes are shown
    sparse: bool = False  # each point is drawn
    logarithmic: bool | None = None  # initial scale; None: chosen by the values
    x_logarithmic: bool = False
    first_colour: int = 0  # gives a term the same colour in every chart
    spreads: dict[str, list[float]] = field(default_factory=dict)  # by curve: each point's standard deviation

    def add(self, curve: str, x: float, y: float | None) -> None:
        """Add a point to a curve of the chart, which is made if there is none of this name."""
        if curve not in self.curves:  # no setdefault, which would make a Curve for each of millions of points
            self.curves[curve] = Curve()
        self.curves[curve].add(x, y)

    @property
    def drawn(self) -> dict[str, Curve]:
        """Return the curves that have a value, at most the first SIDE_BY_SIDE."""
        there = {name: curve for name, curve in self.curves.items() if not all(map(math.isnan, curve.y))}
        return dict(list(there.items())[:SIDE_BY_SIDE])

    def plain(self, most: int) -> dict[str, Any]:
        """Return the chart as the script reads it, with at most `most` points per curve."""
        curves = []
        for name, curve in self.drawn.items():
            plain: dict[str, Any] = {"name": name[:LONGEST], "xy": _flat(curve.thinned(most))}
            if len(curve) >= SMOOTHED:
                plain["mean"] = _flat(curve.smoothed(RUNS))
            if name in self.spreads:
                plain["sd"] = self.spreads[name]
            curves.append(plain)
        logarithmic = self.logarithmic
        if logarithmic is None:
            logarithmic = wide(y for curve in self.drawn.values() for y in curve.y)
        return {
            "title": self.title,
            "x": self.x,
            "log": logarithmic,
            "xlog": self.x_logarithmic,
            "marked": self.marked,
            "sparse": self.sparse,
            "colour": self.first_colour,
            "curves": curves,
        }


def wide(values: Iterable[float]) -> bool:
    """Return whether positive values span two decades, so that a logarithmic scale shows more."""
    least, most = math.inf, 0.0
    for value in values:
        if value > 0 and math.isfinite(value):
            least, most = min(least, value), max(most, value)
    return most > 0 and most / least >= DECADES


def points_each(charts: Sequence[Chart]) -> list[int]:
    """Return how many points a curve of each chart may have, so that the page stays small."""
    counts = [len(chart.drawn) for chart in charts]
    most = [min(MOST, CHART // max(1, count)) for count in counts]
    total = sum(count * each for count, each in zip(counts, most, strict=True))
    return [max(FEWEST, int(each * min(1.0, BUDGET / max(1, total)))) for each in most]


def _flat(points: list[tuple[float, float | None]]) -> list[float | int | None]:
    """Return x and y alternating, with as few digits as a plot needs."""
    return [_short(value) for point in points for value in point]


def _short(value: float | None) -> float | int | None:
    if value is None:
        return None
    return int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.5g}")


@dataclass
class Stretch:
    """A Stretch holds what the log says about one stage."""

    first: float
    last: float
    loss: float | None = None  # at its last logged step
    scores: dict[str, float] = field(default_factory=dict)  # of its last evaluation


class Log:
    """A Log holds the charts and the stages of one run, from metrics.jsonl."""

    def __init__(self, files: RunFiles, name: str = "metrics.jsonl"):
        self.steps = 0
        self.loss = Chart("loss", "Loss and weighted terms", marked=True)
        self.raw = Chart("terms", "Terms without their weights", marked=True, first_colour=1)
        self.rate = Chart("rate", "Learning rate")
        self.norm = Chart("norm", "Gradient norm", marked=True)
        self.pace = Chart("pace", "Throughput", unit="tokens/s", logarithmic=False)
        self.memory = Chart("memory", "Peak memory of the first process", unit="MiB", logarithmic=False)
        self.sources = Chart("sources", "Loss by source")
        self.weights: dict[str, Chart] = {}
        self.scores: dict[str, Chart] = {}
        self.stages: dict[str, Stretch] = {}
        for record in files.lines(name):
            self._take(record)

    def charts(self) -> list[Chart]:
        """Return the charts that have something to draw, in the order of the page."""
        weights = [self.weights[name] for name in sorted(self.weights)]
        scores = [self.scores[name] for name in in_order(self.scores)]
        found = [
            self.loss,
            self.raw,
            self.sources,
            *scores,
            self.rate,
            self.norm,
            *weights,
            self.pace,
            self.memory,
        ]
        return [chart for chart in found if chart.drawn]

    def _take(self, record: dict[str, Any]) -> None:
        step = number(record.get("step"))
        if step is None or step < 0:
            return
        if "evaluation" in record:
            self._evaluated(step, mapping(record["evaluation"]))
            return
        if "loss" not in record:
            return
        self.steps += 1
        loss = number(record["loss"])
        self.loss.add("total", step, loss)
        terms = mapping(record.get("terms"))
        for name in dict.fromkeys((*terms, *self.raw.curves)):  # a gap if a stage lacks a term
            term = mapping(terms.get(name))
            self.loss.add(name, step, number(term.get("weighted")))
            self.raw.add(name, step, number(term.get("raw")))
            if isinstance(weights := term.get("layer_weights"), list):
                moving = self._weights(name)
                for place, weight in enumerate(weights, 1):
                    moving.add(f"part {place}", step, number(weight))
        for name, source in mapping(record.get("sources")).items():
            self.sources.add(name, step, number(mapping(source).get("loss")))
        for chart, curve, key in (
            (self.rate, "learning rate", "learning_rate"),
            (self.norm, "gradient norm", "grad_norm"),
            (self.pace, "since the previous logged step", "recent_tokens_per_second"),
            (self.pace, "mean since the start", "tokens_per_second"),
            (self.memory, "memory", "peak_memory_mib"),
        ):
            if key in record:
                chart.add(curve, step, number(record[key]))
        if isinstance(stage := record.get("stage"), str):
            stretch = self.stages.setdefault(stage, Stretch(step, step))
            stretch.last, stretch.loss = step, loss

    def _weights(self, term: str) -> Chart:
        return self.weights.setdefault(
            term, Chart(f"weights-{len(self.weights)}", f"Layer weights of {term}", logarithmic=False)
        )

    def _evaluated(self, step: float, scores: dict[str, Any]) -> None:
        values = {name: number(score) for name, score in scores.items()}
        for name in in_order(values):
            measured = metric(name)
            if not measured.endswith("per_second"):
                chart = self.scores.setdefault(
                    measured, Chart(f"score-{len(self.scores)}", f"Dev sets: {title(measured)}", sparse=True)
                )
                chart.add(name.rpartition("/")[0] or "student", step, values[name])
        if self.stages:
            last = self.stages[next(reversed(self.stages))]
            last.scores |= {name: value for name, value in values.items() if value is not None}
