"""Turn what pydantic finds wrong with settings into one readable line."""

import difflib
from collections.abc import Iterable, Sequence
from typing import get_args

from pydantic_core import ErrorDetails

from dsdistill.config.errors import UserError
from dsdistill.config.secrets import shown
from dsdistill.config.section import Section

_BRANCHES = ("str", "int", "bool", "float")  # names of union branches that look like keys


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ' (did you mean X?)', or nothing if no known word is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def explain(
    errors: Sequence[ErrorDetails],
    section: type[Section],
    origin: str | None = None,
    within: tuple[str, ...] = (),
) -> UserError:
    """Return one line for one of the errors that pydantic found in the settings of `section`.

    A misspelt key comes first, since it may explain other errors. origin: the file of the settings. within: the keys
    that lead to the section.
    """
    first = next((error for error in errors if error["type"] == "extra_forbidden"), _deepest(errors))
    inner = first.get("ctx", {}).get("error")
    start = "" if origin is None else f"{origin}: "
    if isinstance(inner, UserError):
        return inner if origin is None else inner.within(origin)
    location = (*within, *first["loc"])
    path = _readable(location)
    place = f"{start}{path or 'top level'}"
    got = shown(path, first["input"])
    got = got if len(got) <= 60 else got[:57] + "..."
    if first["type"] == "extra_forbidden":
        *parents, key = first["loc"]
        known = _section(section, parents).model_fields
        hint = nearest(str(key), known) or f" ({', '.join(known)})"
        dotted = ".".join(map(str, location))
        return UserError(f"{start}{dotted}", f"an unknown key with value {got}", "a known key" + hint)
    if first["type"] == "missing":
        return UserError(place, "nothing", "a value: this key is required")
    if path.endswith(".layers"):  # a union: pydantic reports each of its branches
        return UserError(
            place,
            got,
            "uniform, skip, last, emd, cka_offline, or a list of [student, teacher] pairs counted from 1",
        )
    message = first["msg"].lower()
    for noise in ("input should be ", "a valid ", " should match", " should have", " after validation"):
        message = message.replace(noise, "")
    return UserError(place, got, message)


def _deepest(errors: Sequence[ErrorDetails]) -> ErrorDetails:
    """Return the first error; if it comes from a union, return the error of the branch that fits best."""
    place = errors[0]["loc"][:-1]
    if "layers" in errors[0]["loc"]:  # `explain` lists the valid values
        return errors[0]
    beside = [error for error in errors if error["loc"][: len(place)] == place]
    return max(beside, key=lambda error: len(error["loc"]))


def _readable(location: tuple[int | str, ...]) -> str:
    """Return the dotted path without the names of pydantic's union branches."""
    kept = [part for part in location if part not in _BRANCHES]
    return ".".join(str(part) for part in kept if isinstance(part, int) or part.isidentifier())


def _section(section: type[Section], parents: list[int | str]) -> type[Section]:
    """Return the section that a path of field names leads to from `section`."""
    for name in (name for name in parents if isinstance(name, str)):
        annotation = section.model_fields[name].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, Section))
    return section
