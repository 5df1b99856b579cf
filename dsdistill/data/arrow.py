"""Read parquet files and hub sets as rows with Arrow, which reads and decodes only the wanted columns.

The library `datasets` would fetch or open the files that an image or audio column names, even if a run does not read
that column.
"""

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from dsdistill.config.errors import UserError
from dsdistill.data.table import Row

if TYPE_CHECKING:
    import pyarrow

ROWS = 1024  # rows decoded at once
VALUE = 2**26  # most bytes of one text; a line of a text file has the same limit
MOST_CLASSES = 2**20


def parquet_columns(
    place: str, file: BinaryIO, wanted: Iterable[str]
) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Return the classes that a parquet file declares for the wanted columns, and the names of all columns."""
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.ParquetFile(file).schema_arrow
        return _declared(place, schema.metadata, readable(place, schema, wanted)), tuple(schema.names)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise UserError(place, f"{error}", "a parquet file") from error


def read_parquet(place: str, file: BinaryIO, wanted: Iterable[str], most: int) -> Iterator[Row]:
    """Yield a parquet file's rows with the wanted columns; raise UserError if these exceed `most` bytes decoded."""
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        schema, footer = parquet.schema_arrow, parquet.metadata
        names = readable(place, schema, wanted)
        if footer.num_rows > most:
            raise UserError(place, f"{footer.num_rows:,} rows", f"at most {most:,} bytes (data.max_file)")
        heads = {column.split(".")[0] for column in names}
        told = sum(
            chunk.total_uncompressed_size
            for group in map(footer.row_group, range(footer.num_row_groups))
            for chunk in map(group.column, range(group.num_columns))
            if chunk.path_in_schema.split(".")[0] in heads
        )
        _bound(place, told, most)
        if not names:
            yield from ((row, {}) for row in range(1, footer.num_rows + 1))
            return
        yield from arrow_rows(
            place, parquet.iter_batches(batch_size=ROWS, columns=names, use_threads=False), most
        )
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        # OSError: pages that differ from the footer; UnicodeDecodeError: a text that is not UTF-8
        raise UserError(place, f"{error}", "a parquet file") from error


def readable(place: str, schema: "pyarrow.Schema", wanted: Iterable[str]) -> list[str]:
    """Return the wanted columns that exist; raise UserError for one that cannot be read."""
    if len(set(schema.names)) < len(schema.names):
        raise UserError(place, "two columns of one name", "each name once")
    names = []
    for name in dict.fromkeys(wanted):
        if name not in schema.names:
            continue
        kind = schema.field(name).type
        if _is_simple(kind) or _is_conversation(kind):
            names.append(name)
        elif name != "id":  # without it, rows are identified by their positions
            raise UserError(place, f"column {name!r} of type {kind}", "texts, numbers or conversations")
    return names


def _is_simple(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    inner = kind.value_type if types.is_dictionary(kind) else kind
    return (
        types.is_string(inner)
        or types.is_large_string(inner)
        or types.is_string_view(inner)
        or types.is_integer(inner)
        or types.is_floating(inner)
        or types.is_decimal(inner)
        or types.is_boolean(inner)
        or types.is_null(inner)
    )


def _is_conversation(kind: "pyarrow.DataType") -> bool:
    """Return whether a column holds lists of structs, as conversations and tools are stored."""
    from pyarrow import types

    is_list = types.is_list(kind) or types.is_large_list(kind)
    return is_list and types.is_struct(kind.value_type)


def arrow_rows(place: str, batches: Iterable["pyarrow.RecordBatch"], most: int | None) -> Iterator[Row]:
    """Yield the rows of Arrow batches, numbered from 1; raise UserError if their values exceed `most` bytes."""
    import pyarrow

    size = count = 0
    for batch in batches:
        columns = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            size += _decoded(place, name, column) + 8 * len(column)  # plus one reference for each row
            if most is not None:
                _bound(place, size, most)
            if isinstance(column, pyarrow.DictionaryArray):
                column = column.dictionary_decode()
            values = column.to_pylist()
            columns[name] = values if _is_simple(column.type) else [_without_gaps(value) for value in values]
        for i in range(batch.num_rows):
            count += 1
            yield count, {name: values[i] for name, values in columns.items()}


def _without_gaps(value: Any) -> Any:
    """Return nested values without keys that are None: Arrow gives every struct the keys of all rows."""
    if isinstance(value, dict):
        return {key: _without_gaps(inner) for key, inner in value.items() if inner is not None}
    return [_without_gaps(inner) for inner in value] if isinstance(value, list) else value


def _decoded(place: str, name: str, column: "pyarrow.Array") -> int:
    """Return the bytes of a column's values after decoding: an Arrow dictionary stores repeated values once."""
    import pyarrow
    from pyarrow import compute

    repeated = isinstance(column, pyarrow.DictionaryArray)
    values = column.dictionary if repeated else column
    if not (pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type)):
        return 0 if repeated else column.nbytes
    lengths = compute.binary_length(values)
    if (longest := compute.max(lengths).as_py() or 0) > VALUE:
        raise UserError(f"{place}, column {name}", f"a text of {longest:,} bytes", f"at most {VALUE:,}")
    return compute.sum((lengths.take(column.indices) if repeated else lengths).cast("int64")).as_py() or 0


def _bound(place: str, size: int, most: int) -> None:
    if size > most:
        raise UserError(place, f"{size:,} bytes when decompressed", f"at most {most:,} (data.max_file)")


def _declared(place: str, metadata: dict[bytes, bytes] | None, names: list[str]) -> dict[str, list[str]]:
    """Return the class names of columns that `datasets` wrote to the `huggingface` entry of a file's metadata."""
    text = (metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    place = f"{place}, metadata huggingface"
    try:
        features = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(place, f"{type(error).__name__}: {error}", "JSON") from None
    for key in ("info", "features"):
        features = features.get(key) if isinstance(features, dict) else features
        if features is None:
            return {}
    if not isinstance(features, dict):
        raise UserError(place, f"a {type(features).__name__} as features", "a mapping of columns")
    classes = {}
    for name in names:
        feature = features.get(name)
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            classes[name] = _class_names(f"{place}, {name}", feature)
    return classes


def _class_names(place: str, feature: dict[str, Any]) -> list[str]:
    names, count = feature.get("names"), feature.get("num_classes")
    whole = isinstance(count, int) and not isinstance(count, bool) and 0 < count <= MOST_CLASSES
    if count is not None and not whole:
        raise UserError(place, f"num_classes {count!r}", f"a whole number up to {MOST_CLASSES:,}")
    if names is None and whole:
        return [str(index) for index in range(count)]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(place, f"class names {names!r}", "a list of texts")
    if len(set(names)) < len(names):
        raise UserError(place, f"class names {names!r}", "each name once")
    if whole and count != len(names):
        raise UserError(place, f"{len(names)} class names for {count} classes", "one name for each class")
    return names
