"""Local files: tsv, csv, jsonl, parquet and txt, each also gzipped. Touches no network.

Text formats are read here and not through `datasets`, whose readers guess types (a sentence "NA" becomes a
missing value) and cannot name the line of an error.
"""

import contextlib
import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dsdistill.config.bounded import open_file
from dsdistill.config.errors import UserError
from dsdistill.data.arrow import read_parquet
from dsdistill.data.table import Table

LINE = 2**26  # bytes
LIMIT = "data.max_file"


def table(name: str, root: str | None, wanted: Iterable[str], most: int) -> Table:
    """Return the rows of a file of at most `most` bytes, decompressed; a relative name starts from root.

    wanted: columns; formats that hold them one by one give no others.
    """
    path = Path(root or "", name).expanduser()
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in READERS:
        raise UserError(str(path), f"extension {suffix!r}", f"{', '.join(READERS)} (.gz too)")
    try:
        packed = gzip.open if path.name.endswith(".gz") else contextlib.nullcontext
        with _open(path, most) as raw, packed(raw) as file:
            if suffix == ".parquet":
                return read_parquet(str(path), _seekable(str(path), file, most), wanted, most)
            return READERS[suffix](str(path), _lines(str(path), file, most))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            str(path), f"{type(error).__name__}: {error}", "a readable file, gzip where it ends in .gz"
        ) from error
    except MemoryError:
        raise UserError(str(path), "more than this machine's memory holds", "a smaller file") from None


def local_copy(root: str, name: str, split: str, wanted: Iterable[str], most: int) -> Table:
    """A split of a hub data set from a folder that holds it as files: ROOT/NAME/{train,dev,test}.FORMAT.

    Columns are the hub's, or label, text_a and text_b. The hub's `validation` is `dev` there.
    """
    folder, stem = Path(root, name).expanduser(), {"validation": "dev"}.get(split, split)
    names = [f"{stem}{suffix}{packed}" for suffix in READERS for packed in ("", ".gz")]
    file_name = next((name for name in names if (folder / name).is_file()), None)
    if file_name is None:
        there = (
            f"{folder} has {sorted(p.name for p in folder.iterdir())[:12]}"
            if folder.is_dir()
            else "no such folder"
        )
        raise UserError(
            f"data.root: {folder}", there, f"a file {stem}.FORMAT, {', '.join(READERS)} (.gz too)"
        )
    return table(file_name, str(folder), wanted, most)


def _open(path: Path, most: int) -> BinaryIO:
    if not path.exists() or path.is_dir():
        beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else None
        there = f"{path.parent} does not exist" if beside is None else f"{path.parent} has {beside[:12]}"
        raise UserError(str(path), "no such file", f"a file ({there})")
    return open_file(str(path), most, LIMIT)


def _seekable(place: str, file: BinaryIO, most: int) -> BinaryIO:
    """Return a file as it is, or what a gzipped one holds, unpacked no further than a parquet file could be."""
    if not isinstance(file, gzip.GzipFile):
        return file
    whole = io.BytesIO(file.read(4))
    if whole.getvalue() != b"PAR1":
        raise UserError(place, f"{whole.getvalue()!r} at its start", "a parquet file")
    whole.seek(0, os.SEEK_END)
    while part := file.read(LINE):
        if whole.tell() + len(part) > most:
            raise UserError(place, f"more than {most:,} bytes decompressed", f"at most that ({LIMIT})")
        whole.write(part)
    whole.seek(0)
    return whole


def _lines(place: str, file: BinaryIO, most: int) -> Iterator[str]:
    """Yield the lines of a text, each with its line feed; nothing beyond a bound is read or kept."""
    size = number = 0
    while line := file.readline(LINE + 1):
        number += 1
        size += len(line)
        if len(line) > LINE:
            raise UserError(f"{place}, line {number}", f"more than {LINE:,} bytes", "a shorter line")
        if size > most:
            raise UserError(place, f"more than {most:,} bytes decompressed", f"at most that ({LIMIT})")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            got = f"byte 0x{line[error.start]:02x}"
            raise UserError(f"{place}, line {number}", got, "UTF-8 text") from error
        if "\0" in text:
            raise UserError(f"{place}, line {number}", "a NUL character", "text")
        yield text.removeprefix("\ufeff") if number == 1 else text


def _tsv(place: str, lines: Iterator[str]) -> Table:
    # csv.QUOTE_NONE in effect: a quote is a plain character, and no field holds a tab or a line break.
    numbered = ((i, line.removesuffix("\n").removesuffix("\r")) for i, line in enumerate(lines, 1))
    return _with_header(place, [(i, line.split("\t")) for i, line in numbered if line.strip("\r")])


def _csv(place: str, lines: Iterator[str]) -> Table:
    csv.field_size_limit(LINE)  # it would refuse a field above 131,072 characters
    # A carriage return by itself ends a line too.
    reader = csv.reader((part for line in lines for part in io.StringIO(line, newline="")), strict=True)
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


def _jsonl(place: str, lines: Iterator[str]) -> Table:
    rows: list[tuple[int, dict[str, Any]]] = []
    for i, line in enumerate(lines, 1):
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


def _txt(place: str, lines: Iterator[str]) -> Table:
    text = "".join(lines)
    if not text.strip():
        raise UserError(place, "an empty file", "some text")
    return Table(place, {"text": [text]}, [1], plain=True)


READERS = {".tsv": _tsv, ".csv": _csv, ".jsonl": _jsonl, ".parquet": read_parquet, ".txt": _txt}
