"""Label columns to class indices or scores."""

import math
import re
from typing import Any

from dsdistill.config.errors import UserError
from dsdistill.data.table import Table

INTEGER = re.compile(r"-?\d{1,18}")  # longer ones are names like any other


def class_names(train: Table, column: str, given: tuple[str, ...] | None) -> tuple[str, ...]:
    """The classes in order: as given, else as the data set declares them, else those of train, sorted."""
    if given is not None:
        if len(set(given)) != len(given):
            raise UserError("data.labels", f"{list(given)}", "each name once")
        return given
    if train.classes and column in train.classes:
        return tuple(train.classes[column])
    names = set(spelled(train, column))
    if len(names) < 2:
        raise UserError(train.place, f"one class, {names.pop()!r}, in {column}", "at least 2 classes")
    numbers = all(INTEGER.fullmatch(name) for name in names)
    # "1" and "01" are one number; by it alone they would come in the set's order, another one on each rank.
    return tuple(sorted(names, key=lambda name: (int(name), name)) if numbers else sorted(names))


def class_indices(table: Table, column: str, names: tuple[str, ...]) -> list[int]:
    """(n,) index into names of each row's label.

    A label is one of the names; or, where no name is a number itself, its index.
    """
    index = {name: i for i, name in enumerate(names)}
    if not any(INTEGER.fullmatch(name) for name in names):
        index |= {str(i): i for i in range(len(names))}
    indices = []
    for row, name in enumerate(spelled(table, column)):
        if name not in index:
            known = f"one of the {len(names)} classes {', '.join(names[:12])}" + ", …" * (len(names) > 12)
            raise UserError(table.at(row), f"label {name!r} in column {column}", known)
        indices.append(index[name])
    return indices


def scores(table: Table, column: str) -> list[float]:
    """(n,) finite label of each row."""
    values = []
    for row, value in enumerate(table.column(column)):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):  # the last: an integer beyond all floats
            number = math.nan
        if not math.isfinite(number):
            raise UserError(table.at(row), f"label {value!r} in column {column}", "a finite number")
        values.append(number)
    return values


def spelled(table: Table, column: str) -> list[str]:
    """(n,) each row's label as a name: the one that its table declares for an index, else the label itself."""
    declared = (table.classes or {}).get(column)
    return [_name(value, declared, table, column, row) for row, value in enumerate(table.column(column))]


def _name(value: Any, declared: list[str] | None, table: Table, column: str, row: int) -> str:
    if declared is not None and isinstance(value, int):
        if not 0 <= value < len(declared):  # hub sets mark rows without a public label with -1
            raise UserError(table.at(row), f"label {value} in column {column}", f"0 to {len(declared) - 1}")
        return declared[value]
    if isinstance(value, float) and value.is_integer():  # what integers become in a column with gaps
        value = int(value)
    if not isinstance(value, str | int) or value == "":
        got = f"no {column}" if value in (None, "") else f"{value!r} in column {column}"
        raise UserError(table.at(row), got, "a label, text or integer")
    return str(value)
