"""Hold rows of one file or split, one by one or as columns, and where each of them came from."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsdistill.config.errors import UserError

SHOWN = 12  # column names that a message lists
Row = tuple[int, dict[str, Any]]  # line or row number, from 1, and values by column
Bad = Callable[[UserError], None]  # is called with the error of a row that cannot be used


@dataclass(frozen=True)
class Stream:
    """Read the rows of one file or split on demand, each time from the beginning."""

    place: str  # file or data set
    read: Callable[[], Iterator[Row | UserError]]  # an error stands for a row that cannot be read
    identity: dict[str, Any]  # values that change when the contents do
    unit: str = "line"  # what the numbers of the rows count
    classes: dict[str, list[str]] | None = None  # class names of columns that hold their indices
    plain: bool = False  # a text file: each row is a line in the column `text`, with its line feed
    columns: tuple[str, ...] = ()  # names of all columns, if they are known before the rows
    done: Callable[[], float] = lambda: 0.0  # the share of the source that has been read, if known
    shown: bool = True  # whether progress is shown

    def rows(self, bad: Bad | None = None) -> Iterator[Row]:
        """Yield the rows; `bad` gets the error of each row that cannot be read, without it the first is raised."""
        rows = self.read()
        while True:
            try:
                row = next(rows, None)
            except UserError as error:  # nothing can be read after it
                row = error
            if row is None:
                return
            if not isinstance(row, UserError):
                yield row
            elif bad is None:
                raise row
            else:
                bad(row)

    def at(self, line: int) -> str:
        """Return where a row is, for messages."""
        return f"{self.place}, {self.unit} {line}"

    def table(self, bad: Bad | None = None) -> "Table":
        """Return all rows together; `bad` as in `rows`.

        Raises:
            UserError: there is no row, or a row that cannot be read.
        """
        lines, rows = [], []
        for line, row in self.rows(bad):
            lines.append(line)
            rows.append(row)
        if self.plain:
            text = "".join(row["text"] for row in rows)
            if not text.strip():
                raise UserError(self.place, "an empty file", "some text")
            return Table(self.place, {"text": [text]}, [1], plain=True)
        names = dict.fromkeys(name for row in rows for name in row)  # in order of appearance
        columns = {name: [row.get(name) for row in rows] for name in names}
        others = tuple(name for name in self.columns if name not in columns)
        return Table(self.place, columns, lines, self.unit, self.classes, others=others)


def no_column(place: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for a missing column, which lists existing columns, the most similar first."""
    known = list(known)
    near = sorted(known, key=lambda column: -_likeness(name, column))[:SHOWN]
    wanted = f"one of its columns: {', '.join(near)}"
    wanted += f" (nearest of {len(known)})" if len(near) < len(known) else ""
    return UserError(place, f"no column {name!r}", wanted)


@dataclass(frozen=True)
class Table:
    """Hold n rows as columns of n values. None stands for a missing value.

    Raises:
        UserError: there is no row.
    """

    place: str  # file or data set
    columns: dict[str, list[Any]]
    lines: Sequence[int]  # (n,) line of each row in its file, or its row number, from 1
    unit: str = "line"  # what `lines` counts
    classes: dict[str, list[str]] | None = None  # class names of columns that hold their indices
    plain: bool = False  # a text file: the only column is `text` and the only row all of it
    others: tuple[str, ...] = ()  # names of columns that were not wanted and not read

    def __post_init__(self):
        if not self.lines:
            raise UserError(self.place, "no rows", "at least one")

    def __len__(self) -> int:
        return len(self.lines)

    def at(self, row: int) -> str:
        return f"{self.place}, {self.unit} {self.lines[row]}"

    def take(self, rows: Sequence[int]) -> "Table":
        """Return some of the rows, in the order given."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return replace(self, columns=columns, lines=[self.lines[row] for row in rows])

    def column(self, name: str) -> list[Any]:
        if name not in self.columns:
            raise no_column(self.place, name, [*self.columns, *self.others])
        return self.columns[name]


def _likeness(name: str, known: str) -> float:
    return difflib.SequenceMatcher(None, name.lower(), known.lower()).ratio()
