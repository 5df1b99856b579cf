"""Columns of one file or split, and where each row came from."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsdistill.config.errors import UserError

SHOWN = 12  # column names that a message lists


@dataclass(frozen=True)
class Table:
    """n rows as columns of n values. None stands for a missing value.

    Raises:
        UserError: there is no row.
    """

    place: str  # file or data set
    columns: dict[str, list[Any]]
    lines: Sequence[int]  # (n,) line of each row in its file, or its row number, from 1
    unit: str = "line"  # what `lines` counts
    classes: dict[str, list[str]] | None = None  # class names of columns that hold their indices
    plain: bool = False  # a text file: the only column is `text` and the only row all of it
    others: tuple[str, ...] = ()  # names of columns that nobody wants and that were not read

    def __post_init__(self):
        if not self.lines:
            raise UserError(self.place, "no rows", "at least one")

    def __len__(self) -> int:
        return len(self.lines)

    def at(self, row: int) -> str:
        return f"{self.place}, {self.unit} {self.lines[row]}"

    def column(self, name: str) -> list[Any]:
        if name not in self.columns:
            known = [*self.columns, *self.others]
            near = sorted(known, key=lambda column: -_likeness(name, column))[:SHOWN]
            raise UserError(
                self.place,
                f"no column {name!r}",
                f"one of its columns: {', '.join(near)}"
                + (f" (nearest of {len(known)})" if len(near) < len(known) else ""),
            )
        return self.columns[name]


def _likeness(name: str, known: str) -> float:
    return difflib.SequenceMatcher(None, name.lower(), known.lower()).ratio()
