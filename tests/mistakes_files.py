"""Files that expand, never end or declare wrong contents, for test_hostile_input.py."""

import gzip
import io
import json
import os
from functools import cache

import pyarrow
import pyarrow.parquet

HEADER = b"text\tlabel\n"


def _levels(name: str, count: int, each: str) -> str:
    """Return YAML anchors that each repeat the one before."""
    lines = [f"{name}0: &{name}0 [x, x]"]
    for level in range(1, count):
        lines.append(f"{name}{level}: &{name}{level} {each.replace('@', f'*{name}{level - 1}')}")
    return "\n".join(lines)


def _repeated(count: int, each: str) -> str:
    lines = ["a0: xxxxxxxxxx"]
    lines += [f"a{level}: {each.replace('@', f'{{a{level - 1}}}')}" for level in range(1, count)]
    return "\n".join(lines)


# YAML that is no config: its text, and what the line must hold.
YAML = {
    "lists 20,000 deep": ("run: " + "[" * 20_000, ["levels"]),
    "closed lists 20,000 deep": ("run: " + "[" * 20_000 + "]" * 20_000, ["levels"]),
    "mappings 2,000 deep": ("\n".join(" " * level + "a:" for level in range(2000)), ["levels"]),
    "lists of dashes": ("- " * 20_000, ["levels"]),
    "flow mappings": ("{a: " * 20_000, ["levels"]),
    "aliases that multiply": (_levels("a", 30, "[@, @, @, @, @, @, @, @]"), ["more than 10,000 values"]),
    "aliases in mappings": (_levels("a", 40, "{p: @, q: @}"), ["more than 10,000 values"]),
    "merged aliases": (
        "a: &a {x: 1}\n"
        + "\n".join(f"b{i}: {{<<: *a, y: [*a, *a, *a, *a, *a, *a, *a]}}" for i in range(999)),
        ["more than 10,000 values"],
    ),
    "aliases that deepen": (_levels("a", 100, "[@]"), ["levels"]),
    "an alias inside its anchor": ("run: &a [1, *a]", ["*a, an alias inside its own value"]),
    "a million values": ("run: [" + "1," * 1_000_000 + "]", ["more than 10,000 values"]),
    "five megabytes": ("# " + "x" * (5 << 20), ["5,242,882 bytes"]),
    "a number to base 60": ("run: 1" + ":1" * 20_000, ["a number of 40,001 characters"]),
    "a number of 6,000 digits": ("train: {steps: " + "1" * 6000 + "}", ["a number of 6,000"]),
    "interpolations that multiply": (_repeated(40, "'$@$@$@'"), ["interpolations of "]),
    "lists of interpolations": (_repeated(40, "['$@', '$@', '$@']"), ["interpolations of "]),
    "relative interpolations": (
        "run:\n  a0: xxxxxxxxxx\n"
        + "".join(f"  a{i}: '${{.a{i - 1}}}${{.a{i - 1}}}${{.a{i - 1}}}'\n" for i in range(1, 40)),
        ["interpolations of "],
    ),
    "interpolations of each other": ("a: '${b}'\nb: '${a}'", ["ecursive"]),
    "a chain of interpolations": (
        "".join(f"a{i}: '${{a{i + 1}}}'\n" for i in range(3000)) + "a3000: x",
        ["interpolations that resolve"],
    ),
    "interpolations 5,000 deep": ("a: '" + "${" * 5000 + "'", ["more than 100 interpolations"]),
}

# Overrides, after a config that works.
OVERRIDES = {
    "a list 20,000 deep": ("run.name=" + "[" * 20_000, ["levels"]),
    "aliases": ("run=[&a [1,1,1,1,1,1,1,1,1,1]," + ",".join(
        f"&{new} [{','.join([f'*{old}'] * 9)}]" for old, new in zip("abcde", "bcdef", strict=True)) + "]",
        ["more than 10,000 values"]),
    "a key of 5,000 levels": (".".join("a" * 5000) + "=1", ["levels"]),
    "a number to base 60": ("train.steps=1" + ":1" * 20_000, ["a number of"]),
    "the largest file in words": ("data.max_file=plenty", ["data.max_file: got 'plenty'", "200GiB"]),
    "no largest file": ("data.max_file=0", ["data.max_file: got 0"]),
    "the largest file below nothing": ("data.max_file=-1GiB", ["data.max_file: got '-1GiB'"]),
    "the largest file of no unit": ("data.max_file=5TB", ["data.max_file: got '5TB'"]),
    "a switch as the largest file": ("data.max_file=true", ["data.max_file: got True"]),
}  # fmt: skip


@cache
def _packed(start: bytes = b"") -> bytes:
    """Return 80 MiB of one letter, gzipped to a few hundred kilobytes."""
    return gzip.compress(start + b"a" * (80 << 20), compresslevel=1)


@cache
def _rows() -> bytes:
    return gzip.compress(HEADER + b"the sum\ta\n" * 200_000)


def _parquet(table=None, metadata: bytes | None = None, **options) -> bytes:
    table = table or pyarrow.table({"text": ["the sum", "the mean"], "label": [0, 1]})
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": metadata})
    whole = io.BytesIO()
    pyarrow.parquet.write_table(table, whole, **options)
    return whole.getvalue()


def _declaring(**label) -> bytes:
    """Return two rows whose metadata declares what the label column is."""
    features = {"label": {"_type": "ClassLabel", **label}}
    return _parquet(metadata=json.dumps({"info": {"features": features}}).encode())


def _repeating() -> bytes:
    """Return 2,000 rows with a text of a megabyte, which a dictionary holds once."""
    indices = pyarrow.array([0] * 2000, pyarrow.int32())
    text = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["x" * 1_000_000]))
    return _parquet(pyarrow.table({"text": text, "label": ["a"] * 2000}))


def _structs(name: str) -> bytes:
    columns = {"text": ["the sum"], "label": ["a"]}
    return _parquet(pyarrow.table(columns | {name: [{"bytes": None, "path": "planted.png"}]}))


def _lists(name: str) -> bytes:
    return _parquet(pyarrow.table({"text": ["the sum"], "label": ["a"]} | {name: [["the sum"]]}))


SMALL = {"data.max_file": "1MB"}

# Data files: name, how their bytes are made, changes of the config, what the line must hold.
DATA = {
    "a bomb of TSV": ("dev.tsv.gz", _packed, {}, ["line 1: got more than 67,108,864 bytes"]),
    "a bomb of CSV": ("dev.csv.gz", _packed, {}, ["line 1: got more than 67,108,864 bytes"]),
    "a bomb of JSON": ("dev.jsonl.gz", _packed, {}, ["line 1: got more than 67,108,864 bytes"]),
    "a bomb of text": (
        "train.txt.gz",
        _packed,
        {"task": "masked_lm", "terms": {"task": {}}, "student.new_head": True},
        ["line 1: got more than 67,108,864 bytes"],
    ),
    "a bomb below a header": (
        "dev.tsv.gz",
        lambda: _packed(HEADER),
        {},
        ["line 2: got more than 67,108,864 bytes"],
    ),
    "a bomb of parquet": ("dev.parquet.gz", _packed, {}, ["a file that begins with b'aaaa'"]),
    "a bomb that begins as parquet": (
        "dev.parquet.gz",
        lambda: _packed(b"PAR1"),
        SMALL,
        ["more than 1,000,000 bytes when decompressed", "data.max_file"],
    ),
    "many rows": ("dev.tsv.gz", _rows, SMALL, ["more than 1,000,000 bytes when decompressed", "data.max_file"]),
    "many rows of CSV": ("dev.csv.gz", _rows, SMALL, ["more than 1,000,000 bytes when decompressed"]),
    "a larger file than is allowed": (
        "train.tsv",
        lambda: HEADER + b"the sum\ta\n" * 99,
        {"data.max_file": 500},
        ["a file of 1,001 bytes", "at most 500 (data.max_file)"],
    ),
    "NUL bytes in gzip": ("dev.tsv.gz", lambda: gzip.compress(b"\0" * 1000), {}, ["line 1: got a NUL"]),
    "gzip of gzip": ("dev.tsv.gz", lambda: gzip.compress(_rows()), {}, ["line 1: got byte 0x8b"]),
    "a field beyond bounds": (
        "dev.csv.gz",
        lambda: gzip.compress(b'text,label\n"' + (b"the sum" * 20_000 + b"\n") * 600, compresslevel=1),
        {},
        ["field larger than field limit (67108864)"],
    ),
    "one text in all rows": ("dev.parquet", _repeating, {"data.max_file": "50MB"}, ["bytes when decompressed"]),
    "rows of zeros": (
        "dev.parquet",
        lambda: _parquet(pyarrow.table({"text": pyarrow.nulls(10**7), "label": pyarrow.nulls(10**7)})),
        SMALL,
        ["rows, expected at most 1,000,000 bytes"],
    ),
    "metadata that is no JSON": ("dev.parquet", lambda: _parquet(metadata=b"{"), {}, ["metadata huggingface"]),
    "metadata that is deep": (
        "dev.parquet",
        lambda: _parquet(metadata=b"[" * 100_000),
        {},
        ["metadata huggingface"],
    ),
    "metadata of bytes": ("dev.parquet", lambda: _parquet(metadata=b"\xff\xfe"), {}, ["metadata huggingface"]),
    "features that are a list": (
        "dev.parquet",
        lambda: _parquet(metadata=b'{"info": {"features": [1]}}'),
        {},
        ["a list as features"],
    ),
    "class names that are numbers": ("dev.parquet", lambda: _declaring(names=[0, 1]), {}, ["names [0, 1]"]),
    "class names that are a text": ("dev.parquet", lambda: _declaring(names="ab"), {}, ["names 'ab'"]),
    "class names twice": ("dev.parquet", lambda: _declaring(names=["a", "a"]), {}, ["each name once"]),
    "no class names": ("dev.parquet", lambda: _declaring(names=[]), {}, ["class names []"]),
    "class names elsewhere": (
        "dev.parquet",
        lambda: _declaring(names_file="/etc/passwd"),
        {},
        ["class names None"],
    ),
    "fewer class names than classes": (
        "dev.parquet",
        lambda: _declaring(names=["a", "b"], num_classes=3),
        {},
        ["2 class names for 3 classes"],
    ),
    "classes beyond counting": ("dev.parquet", lambda: _declaring(num_classes=10**12), {}, ["num_classes 10000"]),
    "classes of a text": ("dev.parquet", lambda: _declaring(names=["a"], num_classes="1"), {}, ["num_classes '1'"]),
    "an image as text": ("dev.parquet", lambda: _structs("text"), {}, ["column 'text' of type struct"]),
    "an image as label": ("dev.parquet", lambda: _structs("label"), {}, ["column 'label' of type struct"]),
    "a list as text": ("dev.parquet", lambda: _lists("text"), {}, ["column 'text' of type list"]),
    "days as labels": (
        "dev.parquet",
        lambda: _parquet(
            pyarrow.table(
                {"text": ["a"], "label": pyarrow.array([0], pyarrow.timestamp("s", tz="Europe/Rome"))}
            )
        ),
        {},
        ["column 'label' of type timestamp"],
    ),
    "a page that is not there": (
        "dev.parquet",
        lambda: (whole := _parquet())[:4] + bytes(60) + whole[64:],
        {},
        ["a parquet file"],
    ),
    "a footer alone": ("dev.parquet", lambda: b"PAR1" + _parquet()[-300:], {}, ["a parquet file"]),
}  # fmt: skip


def special(path) -> None:
    """Make a pipe in place of a file: whoever reads it waits."""
    os.mkfifo(path)


def endless(path) -> None:
    path.symlink_to("/dev/zero")
