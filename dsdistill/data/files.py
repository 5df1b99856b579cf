"""Read local files without network: tsv, csv, jsonl, parquet and txt, each also gzipped.

Text formats are read here and not by `datasets`, whose readers guess types (a sentence "NA" becomes a missing value)
and cannot name the line of an error.
"""

import contextlib
import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from dsdistill.config.bounded import open_file
from dsdistill.config.errors import UserError
from dsdistill.data.arrow import parquet_columns, read_parquet
from dsdistill.data.table import Row, Stream

LINE = 2**26  # bytes
LIMIT = "data.max_file"


def stream(name: str, root: str | None, wanted: Iterable[str], most: int) -> Stream:
    """Return the rows of a file of at most `most` bytes decompressed; a relative name starts from root.

    wanted: columns to read; formats that do not store columns separately give all columns.

    Raises:
        UserError: its extension is unknown, or it does not exist. Reading the rows raises UserError for bad contents.
    """
    path = Path(root or "", name).expanduser()
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in READERS:
        raise UserError(str(path), f"extension {suffix!r}", f"{', '.join(READERS)} (.gz too)")
    with _reading(path), _open(path, most) as file:
        status = os.fstat(file.fileno())
    wanted = tuple(wanted)
    identity = {
        "path": os.path.abspath(path),
        "size": status.st_size,
        "modified": status.st_mtime_ns,
    }
    declared, columns = None, ()
    if suffix == ".parquet":
        with _reading(path), _file(path, most) as file:
            declared, columns = parquet_columns(str(path), file, wanted)
    opened: list[BinaryIO] = []

    def done() -> float:
        with contextlib.suppress(ValueError, OSError):  # it is closed
            return opened[0].tell() / max(1, status.st_size) if opened else 0.0
        return 1.0

    return Stream(
        str(path),
        partial(_rows, path, suffix, wanted, most, opened),
        identity,
        unit="row" if suffix == ".parquet" else "line",
        classes=declared,
        plain=suffix == ".txt",
        columns=columns,
        done=done,
    )


def _rows(
    path: Path, suffix: str, wanted: tuple[str, ...], most: int, opened: list[BinaryIO]
) -> Iterator[Row | UserError]:
    with _reading(path), _file(path, most, opened) as file:
        if suffix == ".parquet":
            yield from read_parquet(str(path), file, wanted, most)
        else:
            yield from READERS[suffix](str(path), _lines(str(path), file, most))


@contextlib.contextmanager
def _file(path: Path, most: int, opened: list[BinaryIO] | None = None) -> Iterator[BinaryIO]:
    """Yield a file that gives decompressed contents; parquet, which is read from its end, is decompressed at once.

    opened: receives the file itself, whose position tells how much has been read.
    """
    packed = gzip.open if path.name.endswith(".gz") else contextlib.nullcontext
    with _open(path, most) as raw, packed(raw) as file:
        if opened is not None:
            opened[:] = [raw]
        suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
        yield _seekable(str(path), file, most) if suffix == ".parquet" else file


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise UserError, in one line, if a file cannot be read inside the context."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            str(path),
            f"{type(error).__name__}: {error}",
            "a readable file; one whose name ends in .gz must be in gzip format",
        ) from error
    except MemoryError:
        raise UserError(str(path), "a file larger than this machine's memory", "a smaller file") from None


def local_copy(root: str, name: str, split: str, wanted: Iterable[str], most: int) -> Stream:
    """Return a split of a hub data set from a folder that holds it as files: ROOT/NAME/{train,dev,test}.FORMAT.

    Columns have the hub's names, or the names label, text_a and text_b. The hub's split `validation` is `dev` there.
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
    return stream(file_name, str(folder), wanted, most)


def _open(path: Path, most: int) -> BinaryIO:
    if not path.exists() or path.is_dir():
        beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else None
        there = f"{path.parent} does not exist" if beside is None else f"{path.parent} has {beside[:12]}"
        raise UserError(str(path), "no such file", f"a file ({there})")
    return open_file(str(path), most, LIMIT)


def _seekable(place: str, file: BinaryIO, most: int) -> BinaryIO:
    """Return a file; a gzipped one is decompressed into memory, but only if it begins like a parquet file."""
    if not isinstance(file, gzip.GzipFile):
        return file
    whole = io.BytesIO(file.read(4))
    if whole.getvalue() != b"PAR1":
        raise UserError(place, f"a file that begins with {whole.getvalue()!r}", "a parquet file")
    whole.seek(0, os.SEEK_END)
    while part := file.read(LINE):
        if whole.tell() + len(part) > most:
            raise UserError(
                place, f"more than {most:,} bytes when decompressed", f"at most {most:,} ({LIMIT})"
            )
        whole.write(part)
    whole.seek(0)
    return whole


def _lines(place: str, file: BinaryIO, most: int) -> Iterator[str]:
    """Yield the lines of a text, each with its line feed; nothing beyond the limits is read or kept."""
    size = number = 0
    while line := file.readline(LINE + 1):
        number += 1
        size += len(line)
        if len(line) > LINE:
            raise UserError(
                f"{place}, line {number}", f"more than {LINE:,} bytes", f"a line of at most {LINE:,}"
            )
        if size > most:
            raise UserError(
                place, f"more than {most:,} bytes when decompressed", f"at most {most:,} ({LIMIT})"
            )
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            got = f"byte 0x{line[error.start]:02x}"
            raise UserError(f"{place}, line {number}", got, "UTF-8 text") from error
        if "\0" in text:
            raise UserError(f"{place}, line {number}", "a NUL character", "text")
        yield text.removeprefix("\ufeff") if number == 1 else text


def _tsv(place: str, lines: Iterator[str]) -> Iterator[Row | UserError]:
    # As with csv.QUOTE_NONE, a quote is a plain character, and no field holds a tab or a line break.
    numbered = ((i, line.removesuffix("\n").removesuffix("\r")) for i, line in enumerate(lines, 1))
    return _with_header(place, ((i, line.split("\t")) for i, line in numbered if line.strip("\r")))


def _csv(place: str, lines: Iterator[str]) -> Iterator[Row | UserError]:
    csv.field_size_limit(LINE)  # by default a field above 131,072 characters is refused
    # A carriage return alone ends a line, too.
    reader = csv.reader((part for line in lines for part in io.StringIO(line, newline="")), strict=True)
    return _with_header(place, _parsed(place, reader))


def _parsed(place: str, reader: Any) -> Iterator[tuple[int, list[str]]]:
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise UserError(
            f"{place}, line {reader.line_num}", error, 'comma-separated values, quoted with "'
        ) from error


def _with_header(place: str, rows: Iterator[tuple[int, list[str]]]) -> Iterator[Row | UserError]:
    _, header = next(rows, (0, None))
    if header is None:
        raise UserError(place, "an empty file", "a header line and rows")
    if len(set(header)) != len(header):
        raise UserError(f"{place}, line 1", f"columns {header}", "each name once")
    for line, row in rows:
        if len(row) != len(header):
            wanted = f"{len(header)}, as in the header"
            yield UserError(f"{place}, line {line}", f"{len(row)} fields", wanted)
        else:
            yield line, dict(zip(header, row, strict=True))


def _jsonl(place: str, lines: Iterator[str]) -> Iterator[Row | UserError]:
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        at, wanted = f"{place}, line {i}", "one JSON object on each line"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield UserError(at, f"{error}", wanted)
            continue
        if not isinstance(row, dict):
            yield UserError(at, f"a {type(row).__name__}", wanted)
        elif (half := _half_character(line, row)) is not None:
            yield UserError(at, f"{half}, half of a surrogate pair", "valid Unicode text")
        else:
            yield i, row


def _half_character(line: str, row: dict) -> str | None:
    """Return a lone surrogate, which JSON can write but UTF-8 cannot; None if there is none."""
    if "\\u" not in line:
        return None
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return ascii(error.object[error.start])
    return None


def _txt(place: str, lines: Iterator[str]) -> Iterator[Row]:
    return ((i, {"text": line}) for i, line in enumerate(lines, 1))


READERS = {".tsv": _tsv, ".csv": _csv, ".jsonl": _jsonl, ".parquet": read_parquet, ".txt": _txt}
