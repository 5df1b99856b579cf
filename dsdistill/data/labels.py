"""Convert label columns to class indices or scores."""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from dsdistill.config.errors import UserError
from dsdistill.data.table import Table

INTEGER = re.compile(r"-?\d{1,18}")  # longer ones are treated as names
DECIMAL = re.compile(r"(-?\d{1,18})\.0+")  # integers take this form in a column with gaps
NO_CLASS = "-1"  # hub sets write this where a label is not public
DROPS = "data.drop_unlabelled: true leaves out such rows"
SHOWN = 12  # classes that a message lists


@dataclass(frozen=True)
class Classes:
    """Hold the names of a run's classes in the order of their indices."""

    names: tuple[str, ...]
    ordered: bool  # data.labels or the data set gives this order, so that a number is an index


def classes_of(tables: Sequence[tuple[str, Table]], given: tuple[str, ...] | None) -> Classes:
    """Return the classes: as given, else as the data sets declare them, else those of the train set, sorted.

    Args:
        tables: pairs of a label column's name and a table of the train set.
        given: `data.labels`.

    Raises:
        UserError: a name is given twice, there are fewer than two classes, a row has no label, or some tables have
            numbers and others names, so that the class of a number is unknown.
    """
    if given is not None:
        if len(set(given)) != len(given):
            raise UserError("data.labels", f"{list(given)}", "each name once")
        return Classes(given, ordered=True)
    declared = {tuple(table.classes[column]) for column, table in tables if column in (table.classes or {})}
    if len(declared) == 1:
        return Classes(*declared, ordered=True)
    found = [set(spelled(table, column)) for column, table in tables]
    names: set[str] = set().union(*found)
    if all(map(_is_number, names)):
        names = {_undecimal(name) for name in names}
        # "1" and "01" are one number; sorted by number alone, their order would differ between ranks.
        ordered = sorted(names, key=lambda name: (int(name), name))
    else:
        _check_alike(tables, found)
        ordered = sorted(names)
    if len(names) < 2:
        places, columns = ", ".join(table.place for _, table in tables), dict.fromkeys(of for of, _ in tables)
        raise UserError(places, f"one class, {names.pop()!r}, in {', '.join(columns)}", "at least 2 classes")
    return Classes(tuple(ordered), ordered=False)


def _check_alike(tables: Sequence[tuple[str, Table]], found: Sequence[set[str]]) -> None:
    """Raise UserError if one table has only numbers as labels and another only names."""
    named = next((names for names in found if not any(map(_is_number, names))), None)
    for (column, table), names in zip(tables, found, strict=True):
        if named is not None and all(map(_is_number, names)):
            got = f"label {table.column(column)[0]!r} in column {column} together with names such as {min(named)!r}"
            raise UserError(
                table.at(0), got, "only names, or data.labels with the names in the order of the numbers"
            )


def class_indices(table: Table, column: str, classes: Classes) -> list[int]:
    """Return (n,) the index of each row's class.

    A label is the name of a class; or its index, if the order of the names is given and none of them is itself a
    number. 1.0 is read as 1, unless a class is named 1.0.

    Raises:
        UserError: a row has another label, or none.
    """
    names = classes.names
    index = {name: i for i, name in enumerate(names)}
    if classes.ordered and not any(INTEGER.fullmatch(name) for name in names):
        index |= {str(i): i for i in range(len(names))}
    indices = []
    for row, name in enumerate(spelled(table, column, names)):
        found = index.get(name, index.get(_undecimal(name)))
        if found is None:
            raise UserError(table.at(row), f"label {name!r} in column {column}", _known(classes, name))
        indices.append(found)
    return indices


def _known(classes: Classes, name: str) -> str:
    names = classes.names
    known = f"one of the {len(names)} classes {', '.join(names[:SHOWN])}" + ", …" * (len(names) > SHOWN)
    if not classes.ordered and _is_number(name) != all(map(_is_number, names)):
        known += " (data.labels may list the names in the order of the numbers)"
    return known


def scores(table: Table, column: str) -> list[float]:
    """Return (n,) the finite label of each row.

    Raises:
        UserError: a row has another label, or none.
    """
    values = []
    for row, value in enumerate(table.column(column)):
        if is_missing(value, {NO_CLASS}):
            raise _unlabelled(table, column, row)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):  # the last: an integer beyond all floats
            number = math.nan
        if not math.isfinite(number):
            raise UserError(table.at(row), f"label {value!r} in column {column}", "a finite number")
        values.append(number)
    return values


def labelled(table: Table, column: str, names: Collection[str]) -> Table:
    """Return the rows that have a label; a value among `names` always counts as one.

    Raises:
        UserError: no row has a label.
    """
    names = () if column in (table.classes or {}) else names
    rows = [row for row, value in enumerate(table.column(column)) if not is_missing(value, names)]
    if len(rows) == len(table):
        return table
    if not rows:
        raise UserError(table.place, f"no row with a label in column {column}", "at least one")
    return table.take(rows)


def is_missing(value: Any, names: Collection[str] = ()) -> bool:
    """Return whether a value stands for no label: it is missing, blank, - or -1, and not one of the names."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    name = str(value).strip()
    return not name or (_undecimal(name) in ("-", NO_CLASS) and not {name, _undecimal(name)} & {*names})


def spelled(table: Table, column: str, names: Collection[str] = ()) -> list[str]:
    """Return (n,) each row's label as a name: the one that its table declares for an index, else the label itself.

    names: values that are labels although they look like missing ones, such as a class named -1.
    """
    declared = (table.classes or {}).get(column)
    return [_name(table, column, row, declared, names) for row in range(len(table))]


def _name(table: Table, column: str, row: int, declared: Sequence[str] | None, names: Collection[str]) -> str:
    value = table.column(column)[row]
    if is_missing(value, () if declared is not None else names):
        raise _unlabelled(table, column, row)
    if isinstance(value, float) and value.is_integer():  # integers become floats in a column with gaps
        value = int(value)
    if declared is not None and isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < len(declared):
            raise UserError(table.at(row), f"label {value} in column {column}", f"0 to {len(declared) - 1}")
        return declared[value]
    if not isinstance(value, str | int):
        raise UserError(table.at(row), f"{value!r} in column {column}", "a label, text or integer")
    return str(value)


def _unlabelled(table: Table, column: str, row: int) -> UserError:
    value = table.column(column)[row]
    got = (
        f"label {value!r} in column {column}"
        if str(value).strip() not in ("", "None", "nan")
        else f"no {column}"
    )
    declared = column in (table.classes or {})
    named = "; data.labels may name a class -1" if not declared and _undecimal(str(value)) == NO_CLASS else ""
    return UserError(table.at(row), got, f"a label ({DROPS}{named})")


def _is_number(name: str) -> bool:
    return bool(INTEGER.fullmatch(name) or DECIMAL.fullmatch(name))


def _undecimal(name: str) -> str:
    """Return 1 for 1.0, and any other name unchanged."""
    match = DECIMAL.fullmatch(name)
    return name if match is None else match[1]
