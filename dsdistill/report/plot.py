"""Plot the curves of a run as a PNG."""

import json
import math
from collections.abc import Iterable
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from dsdistill.config.errors import UserError
from dsdistill.report.summary import title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # distinct for colour-blind readers
TOTAL = "#222222"
DECADES = 100  # ratio of largest to smallest value from which a logarithmic scale is used
SMOOTHED = 100  # number of points from which a curve is drawn smoothed, over its faint raw values


def read_log(path: str) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl. An incomplete last line, after a kill or while it is written, is left out.

    Raises:
        UserError: no such file, or a line before the last is not JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise UserError(path, error.strerror, "the log of a run") from error
    records = []
    for i, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if i < len(lines):
                raise UserError(f"{path}, line {i}", error, "one JSON object on each line") from error
    return records


def loss_plot(log: str, picture: str) -> None:
    """Draw the loss, its weighted terms and the evaluations, if the log has any, over the steps, as PNG.

    Raises:
        UserError: the log cannot be read or has no step.
    """
    from matplotlib.figure import Figure  # slow to import; not pyplot, which would choose a window system

    records = read_log(log)
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "evaluation" in record]
    if not steps:
        raise UserError(log, "no line with a loss", "at least one step")
    figure = Figure(figsize=(8, 6.4 if evaluations else 4.5), layout="constrained")
    if evaluations:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.2))
        _draw_evaluations(below, evaluations)
    else:
        above = below = figure.subplots()
    _draw_loss(above, steps)
    below.set_xlabel("step")
    below.xaxis.get_major_locator().set_params(integer=True)
    for axes in {above, below}:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    figure.savefig(picture, dpi=150)


def _draw_loss(axes: "Axes", records: list[dict[str, Any]]) -> None:
    x = [record["step"] for record in records]
    names = dict.fromkeys(name for record in records for name in record["terms"])
    curves = {"total": [record["loss"] for record in records]}
    for name in names:
        curves[name] = [record["terms"].get(name, {}).get("weighted", math.nan) for record in records]
    for i, (name, values) in enumerate(curves.items()):
        colour, width = (TOTAL, 2.2) if name == "total" else (COLOURS[(i - 1) % len(COLOURS)], 1.4)
        _draw(axes, x, values, name.replace("_", " "), colour, width)
    _scale(axes, curves.values())
    axes.set_ylabel("weighted loss")


def _draw_evaluations(axes: "Axes", records: list[dict[str, Any]]) -> None:
    x = [record["step"] for record in records]
    names = dict.fromkeys(name for record in records for name in record["evaluation"])
    curves = {
        title(name): [record["evaluation"].get(name, math.nan) for record in records]
        for name in names
        if not name.endswith("per_second")
    }
    for i, (called, values) in enumerate(curves.items()):
        axes.plot(x, values, marker="o", markersize=3.5, color=COLOURS[i % len(COLOURS)], label=called)
    _scale(axes, curves.values())
    axes.set_ylabel("dev set")


def _scale(axes: "Axes", curves: Iterable[list[float]]) -> None:
    values = [value for curve in curves for value in curve if math.isfinite(value) and value > 0]
    if values and max(values) / min(values) >= DECADES:
        axes.set_yscale("log")


def _draw(axes: "Axes", x: list[int], y: list[float], label: str, colour: str, width: float) -> None:
    if len(x) < SMOOTHED:
        axes.plot(x, y, color=colour, linewidth=width, label=label, marker="o" if len(x) == 1 else None)
        return
    axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.3)
    axes.plot(x, _smooth(y, len(y) // 50), color=colour, linewidth=width, label=label)


def _smooth(values: list[float], half: int) -> list[float]:
    """Return the mean of each value with up to `half` neighbours on either side; only finite values count."""
    finite = [value if math.isfinite(value) else 0.0 for value in values]
    sums = [0.0, *accumulate(finite)]
    counts = [0, *accumulate(map(math.isfinite, values))]
    smoothed = []
    for i in range(len(values)):
        start, end = max(i - half, 0), min(i + half + 1, len(values))
        count = counts[end] - counts[start]
        smoothed.append((sums[end] - sums[start]) / count if count else math.nan)
    return smoothed
