"""Draw as PNG how scores change along the axis of a study."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dsdistill.report.curves import wide
from dsdistill.report.methods import compared
from dsdistill.report.plot import COLOURS
from dsdistill.report.study import Study
from dsdistill.report.summary import title

PICTURE = "axis.png"
MOST = 6  # most scores that are drawn


def axis_plot(study: Study, rows: Mapping[str, Sequence[Mapping[str, Any]]], picture: str) -> None:
    """Draw each score over the values of the axis: mean and standard deviation, and published numbers as rings.

    rows: summaries of the runs of each cell. picture: file to write.
    """
    from matplotlib.figure import Figure  # slow to import; not pyplot, which would choose a window system

    scores = {cell: [of["models"]["student"] for of in runs] for cell, runs in rows.items()}
    every = [of for runs in scores.values() for of in runs]
    shown = [score for score in study.metrics or compared(every) if any(score in of for of in every)][:MOST]
    if not shown:
        return
    figure = Figure(figsize=(7, 2.6 * len(shown)), layout="constrained")
    drawn = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    numbers = [value for value in study.values if isinstance(value, int | float)]
    places: dict[float | str, float] = {value: value for value in numbers}
    if len(numbers) < len(study.values):  # names are placed at equal distances
        places = {value: place for place, value in enumerate(dict.fromkeys(study.values))}
    for axes, score in zip(drawn, shown, strict=True):
        for (name, cells), colour in zip(study.curves().items(), COLOURS * len(study.cells), strict=False):
            found = [(places[v], [of[score] for of in scores.get(c, ()) if score in of]) for v, c in cells]
            found = [(x, values) for x, values in found if values]
            means = [statistics.fmean(values) for _, values in found]
            errors = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in found]
            x = [place for place, _ in found]
            axes.errorbar(x, means, errors, marker="o", capsize=3, color=colour, label=name or "measured")
            printed = [(places[v], study.beside(c, score)) for v, c in cells]
            rings = [(x, value) for x, value in printed if value is not None]
            if rings:
                axes.plot(
                    *zip(*rings, strict=True),
                    "o",
                    mfc="none",
                    color=colour,
                    alpha=0.6,
                    label=f"{name} published".strip(),
                )
        axes.set_ylabel(title(score))
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    below = drawn[-1]
    below.set_xlabel(study.axis)
    if len(numbers) < len(study.values):
        below.set_xticks(list(places.values()), [str(value) for value in places])
    elif min(numbers) > 0 and wide(numbers):
        below.set_xscale("log")
    figure.savefig(picture, dpi=150, format="png")
