"""Check the arguments of the commands verify and bench."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import yaml

from dsdistill.config import UserError
from dsdistill.ops.backends import extension


def check_instruction_set() -> None:
    """Raise UserError if DSDISTILL_ISA names an instruction set that the native operators cannot use here."""
    native, wanted = extension(), os.environ.get("DSDISTILL_ISA")
    if native is not None and wanted is not None and wanted not in native.instruction_sets():
        raise UserError("DSDISTILL_ISA", repr(wanted), f"one of {', '.join(native.instruction_sets())}")


def parse_shapes(text: str | None) -> dict[str, str | int | float]:
    """Return the sizes and options of NAME=VALUE,...; raise UserError for a part that is neither number nor word."""
    options = {}
    for part in text.split(",") if text else ():
        name, found, value = part.partition("=")
        if not found:
            raise UserError("--shapes", part, "NAME=VALUE")
        try:
            options[name.strip()] = found = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):  # ValueError: an invalid date
            found = None
        if not isinstance(found, str | int | float):
            raise UserError("--shapes", part, "NAME=VALUE, a number or a word")
    return options


def check_unused(case: str, dtype: str, backends: Sequence[str] | None, plot: object) -> None:
    """Raise UserError for options of the operators given with a case that measures something else."""
    for name, given in (("dtype", dtype != "float32"), ("backends", backends), ("plot", plot)):
        if given:
            raise UserError(f"bench --{name}", f"a value for {case}", "none: it does not matter here")


def check_common(
    dtype: str, dtypes: Iterable[str], backends: Sequence[str] | None, contenders: Sequence[str]
) -> None:
    """Raise UserError for a dtype, contender or instruction set that does not exist."""
    check_instruction_set()
    if dtype not in dtypes:
        raise UserError("bench dtype", repr(dtype), f"one of {', '.join(map(repr, dtypes))}")
    if unknown := set(backends or ()) - set(contenders):
        raise UserError("bench backends", sorted(unknown), f"some of {', '.join(contenders)}")
