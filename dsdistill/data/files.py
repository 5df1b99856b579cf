"""Local files: tsv, csv, jsonl, parquet and txt, each also gzipped. Touches no network.

Text formats are read here and not through `datasets`, whose readers guess types (a sentence "NA" becomes a
missing value) and cannot name the line of an error.
"""

import csv
import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any

from dsdistill.config.errors import UserError
from dsdistill.data.table import Table


def table(name: str, root: str | None) -> Table:
    """The rows of a file; a relative name starts from root."""
    path = Path(root or "", name).expanduser()
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in READERS:
        raise UserError(str(path), f"extension {suffix!r}", f"{', '.join(READERS)} (.gz too)")
    return READERS[suffix](str(path), _bytes(path))


def local_copy(root: str, name: str, split: str) -> Table:
    """A split of a hub data set from a folder that holds it as files: ROOT/NAME/{train,dev,test}.FORMAT.

    Columns are the hub's, or label, text_a and text_b. The hub's `validation` is `dev` there.
    """
    folder, stem = Path(root, name).expanduser(), {"validation": "dev"}.get(split, split)
    names = [f"{stem}{suffix}{packed}" for suffix in READERS for packed in ("", ".gz")]
    found = next((name for name in names if (folder / name).is_file()), None)
    if found is None:
        there = (
            f"{folder} has {sorted(p.name for p in folder.iterdir())[:12]}"
            if folder.is_dir()
            else "no such folder"
        )
        raise UserError(
            f"data.root: {folder}", there, f"a file {stem}.FORMAT, {', '.join(READERS)} (.gz too)"
        )
    return table(found, str(folder))


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else None
        there = f"{path.parent} does not exist" if beside is None else f"{path.parent} has {beside[:12]}"
        raise UserError(str(path), "no such file", f"a file ({there})")
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.name.endswith(".gz") else data
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            str(path), f"{type(error).__name__}: {error}", "a readable file, gzip where it ends in .gz"
        ) from error


def _decode(place: str, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{place}, line {line}", f"byte 0x{data[error.start]:02x}", "UTF-8 text") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{place}, line {line}", "a NUL character", "text")
    return text


def _tsv(place: str, data: bytes) -> Table:
    # csv.QUOTE_NONE in effect: a quote is a plain character, and no field holds a tab or a line break.
    lines = _decode(place, data).split("\n")
    rows = [(i, line.removesuffix("\r").split("\t")) for i, line in enumerate(lines, 1) if line.strip("\r")]
    return _with_header(place, rows)


def _csv(place: str, data: bytes) -> Table:
    csv.field_size_limit(len(data) + 1)  # it would refuse a field above 131,072 characters
    reader = csv.reader(io.StringIO(_decode(place, data), newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if row:
                rows.append((reader.line_num, row))
    except csv.Error as error:
        raise UserError(
            f"{place}, line {reader.line_num}", error, 'comma-separated values, quoted with "'
        ) from error
    return _with_header(place, rows)


def _with_header(place: str, rows: list[tuple[int, list[str]]]) -> Table:
    if not rows:
        raise UserError(place, "an empty file", "a header line and rows")
    (_, header), *rows = rows
    if len(set(header)) != len(header):
        raise UserError(f"{place}, line 1", f"columns {header}", "each name once")
    for line, row in rows:
        if len(row) != len(header):
            raise UserError(f"{place}, line {line}", f"{len(row)} fields", f"{len(header)}, as in the header")
    columns = dict(zip(header, (list(c) for c in zip(*(row for _, row in rows), strict=True)), strict=False))
    return Table(place, columns, [line for line, _ in rows])


def _jsonl(place: str, data: bytes) -> Table:
    rows: list[tuple[int, dict[str, Any]]] = []
    for i, line in enumerate(_decode(place, data).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}, line {i}", f"{error}", "one JSON object a line") from error
        if not isinstance(row, dict):
            raise UserError(f"{place}, line {i}", f"a {type(row).__name__}", "one JSON object a line")
        if (half := _half_character(line, row)) is not None:
            raise UserError(f"{place}, line {i}", f"{half}, half of a character", "text")
        rows.append((i, row))
    names = dict.fromkeys(name for _, row in rows for name in row)  # in order of appearance
    return Table(place, {name: [row.get(name) for _, row in rows] for name in names}, [i for i, _ in rows])


def _half_character(line: str, row: dict) -> str | None:
    """A lone surrogate, which JSON can write and no other text can hold; or None."""
    if "\\u" not in line:
        return None
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return ascii(error.object[error.start])
    return None


def _parquet(place: str, data: bytes) -> Table:
    import pyarrow
    import pyarrow.parquet

    from dsdistill.data.hub import from_arrow

    try:
        return from_arrow(place, pyarrow.parquet.read_table(pyarrow.BufferReader(data)))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the second: a text that is no UTF-8
        raise UserError(place, f"{error}", "a parquet file") from error


def _txt(place: str, data: bytes) -> Table:
    text = _decode(place, data)
    if not text.strip():
        raise UserError(place, "an empty file", "some text")
    return Table(place, {"text": [text]}, [1], plain=True)


READERS = {".tsv": _tsv, ".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet, ".txt": _txt}
