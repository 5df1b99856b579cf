"""Read files from outside with limits: files may not be too large, block or grow, and YAML may not expand too far."""

import json
import os
import re
import stat
from typing import Any, BinaryIO

import yaml

from dsdistill.config.errors import UserError

MIB, GIB = 2**20, 2**30
UNITS = {"GiB": GIB, "MiB": MIB, "GB": 10**9, "MB": 10**6}

# Limits of YAML: bytes of a file, levels, nodes with aliases expanded, characters of an unquoted number, and
# interpolations in one text.
YAML_BYTES, YAML_DEPTH, YAML_NODES, YAML_DIGITS, YAML_REFERENCES = 4 * MIB, 64, 10_000, 1000, 100


def parse_size(text: str) -> int | None:
    """Return the number of bytes that a text such as 80GiB means; None if it is not a size."""
    match = re.fullmatch(rf"(\d{{1,15}}(?:\.\d{{1,15}})?)\s*({'|'.join(UNITS)})", text.strip())
    return None if match is None else int(float(match[1]) * UNITS[match[2]])


def open_file(path: str, most: int, limit: str) -> BinaryIO:
    """Open a regular file of at most `most` bytes; `limit` names that bound in messages.

    Raises UserError for a folder, a pipe, a device or a larger file, and OSError as `open` does. It never blocks.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size <= most:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(path, "a pipe, a device or a folder", "a regular file")
    raise UserError(path, f"a file of {status.st_size:,} bytes", f"at most {most:,} ({limit})")


def read_bytes(path: str, most: int, limit: str = "the largest that is read") -> bytes:
    """Return the content of a file that `open_file` accepts, even if its reported size is wrong (/proc)."""
    with open_file(path, most, limit) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(path, f"a file of more than {most:,} bytes", f"at most {most:,} ({limit})")
    return content


def read_json(path: str, most: int) -> dict[str, Any]:
    """Return the JSON object in a file of at most `most` bytes.

    Raises UserError for a file that cannot be read, is not JSON, or does not hold one object.
    """
    try:
        content = json.loads(read_bytes(path, most).decode("utf-8"))
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(path, f"{type(error).__name__}: {error}", "a readable JSON file") from None
    if not isinstance(content, dict):
        raise UserError(path, f"a {type(content).__name__}", "one JSON object")
    return content


def read_yaml(path: str) -> str:
    """Return the text of a YAML file that `check_yaml` accepts.

    Raises UserError for a file that cannot be read or is not UTF-8, and yaml.YAMLError for text that is not YAML.
    """
    if not os.path.exists(path) or os.path.isdir(path):
        raise UserError(path, "no such file", "a YAML file")
    try:
        text = read_bytes(path, YAML_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(path, str(error), "a readable UTF-8 file") from None
    check_yaml(text, path)
    return text


def check_yaml(text: str, place: str) -> None:
    """Refuse YAML that is too deep or too large with its aliases expanded, before anything is built from it."""
    nodes, open_nodes = 0, []  # for each open list or mapping: its anchor and the number of nodes before it
    known: dict[str, tuple[int, int]] = {}  # nodes and levels by anchor
    deepest: list[int] = []  # levels below each open list or mapping
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        size, levels = 1, 0
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, nodes))
            deepest.append(0)
            nodes += 1
            if len(open_nodes) > YAML_DEPTH:
                raise UserError(place, f"YAML of more than {YAML_DEPTH} levels", f"at most {YAML_DEPTH}")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            size, levels, nodes = nodes - before, deepest.pop() + 1, before
        elif isinstance(event, yaml.AliasEvent):
            anchor = None
            size, levels = known.get(event.anchor, (1, 0))
            if any(event.anchor == name for name, _ in open_nodes):
                raise UserError(
                    place, f"*{event.anchor}, an alias inside its own value", "an alias of another value"
                )
        elif isinstance(event, yaml.ScalarEvent):
            anchor = event.anchor
            if (
                event.style not in tuple("'\"|>")
                and len(event.value) > YAML_DIGITS
                and event.value[0] in "+-.0123456789"
            ):
                raise UserError(
                    place, f"a number of {len(event.value):,} characters", f"at most {YAML_DIGITS:,}"
                )
            if event.value.count("${") > YAML_REFERENCES:
                raise UserError(
                    place,
                    f"a text of more than {YAML_REFERENCES} interpolations",
                    f"at most {YAML_REFERENCES}",
                )
        else:
            continue
        if anchor is not None:
            known[anchor] = size, levels
        nodes += size
        if deepest:
            deepest[-1] = max(deepest[-1], levels)
        if nodes > YAML_NODES:
            raise UserError(place, f"YAML of more than {YAML_NODES:,} values", f"at most {YAML_NODES:,}")
        if len(open_nodes) + levels > YAML_DEPTH:
            raise UserError(place, f"YAML of more than {YAML_DEPTH} levels", f"at most {YAML_DEPTH}")
