"""Define what a comparison shows: its cells, the published numbers next to them, and the claims that it tests.

DIR/study.json keeps this with the runs, so that `dsdistill report DIR` shows the same as `dsdistill compare`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsdistill import disk
from dsdistill.config.bounded import read_json
from dsdistill.config.errors import UserError

STUDY = "study.json"
BETTER, WORSE, UP, DOWN = TRENDS = ("better", "worse", "up", "down")
_BYTES = 2**20


@dataclass(frozen=True)
class Claim:
    """A Claim is one statement of a paper about one score.

    Exactly one of these is given: order, the names of cells from best to worst; best, the cell that is better than all
    others; trend, how the score changes along the axis: it rises (up), falls (down), gets better or gets worse.
    """

    metric: str
    order: tuple[str, ...] = ()
    best: str = ""
    trend: str = ""


@dataclass(frozen=True)
class Study:
    """A Study is what a plan says in addition to its runs."""

    cells: tuple[str, ...]  # names, in the order of the table
    folders: tuple[str, ...]  # of the cells
    title: str = ""
    axis: str = ""  # title of the axis, if the cells are its values
    values: tuple[float | str, ...] = ()  # the value of each cell on the axis
    series: tuple[str, ...] = ()  # which curve each cell belongs to
    metrics: tuple[str, ...] = ()  # () for all
    published: dict[str, tuple[float | None, ...]] = field(
        default_factory=dict
    )  # by cell, in the order of metrics
    claims: tuple[Claim, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)  # reasons, by name

    def write(self, folder: str) -> None:
        """Write DIR/study.json."""
        with disk.writing(Path(folder, STUDY)) as file:
            json.dump(asdict(self), file, indent=1)
            file.write("\n")

    def beside(self, cell: str, metric: str) -> float | None:
        """Return the published value of a cell's score; None if the paper prints none."""
        values = self.published.get(cell, ())
        place = self.metrics.index(metric) if metric in self.metrics else len(values)
        return values[place] if place < len(values) else None

    def curves(self) -> dict[str, list[tuple[float | str, str]]]:
        """Return the cells of each curve along the axis, as (value, cell)."""
        found: dict[str, list[tuple[float | str, str]]] = {}
        for series, value, cell in zip(self.series, self.values, self.cells, strict=True):
            found.setdefault(series, []).append((value, cell))
        return found


def read_study(folder: str) -> Study | None:
    """Return the study of a comparison's folder; None if it has none, or one that cannot be read."""
    try:
        found = read_json(str(Path(folder, STUDY)), _BYTES)
        return _study(found)
    except (UserError, OSError, ValueError, TypeError, KeyError):
        return None


def _study(found: Mapping[str, Any]) -> Study:
    made = Study(
        cells=_texts(found["cells"]),
        folders=_texts(found["folders"]),
        title=str(found["title"]),
        axis=str(found["axis"]),
        values=tuple(value if isinstance(value, int | float) else str(value) for value in found["values"]),
        series=_texts(found["series"]),
        metrics=_texts(found["metrics"]),
        published={
            str(cell): tuple(None if value is None else float(value) for value in values)
            for cell, values in found["published"].items()
        },
        claims=tuple(
            Claim(str(of["metric"]), _texts(of["order"]), str(of["best"]), str(of["trend"]))
            for of in found["claims"]
        ),
        left_out={str(name): str(why) for name, why in found["left_out"].items()},
    )
    axis = (len(made.values), len(made.series))
    if len(made.folders) != len(made.cells) or axis not in ((0, 0), (len(made.cells),) * 2):
        raise ValueError("parts of different lengths")
    return made


def _texts(values: Sequence[Any]) -> tuple[str, ...]:
    if isinstance(values, str):
        raise TypeError("a text instead of a list")
    return tuple(map(str, values))
