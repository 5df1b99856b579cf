import csv
import gzip
import json
import os
import subprocess
import sys

import datasets
import pytest

from dsdistill.config.errors import UserError
from dsdistill.config.schema import Data as Section
from tests.data.rig import load, read, texts_of

ROWS = [
    {"id": "7", "text": 'a "quoted', "label": "yes"},
    {"id": "8", "text": "NA", "label": "no"},
    {"id": "9", "text": "tail ü", "label": "yes"},
]


def tsv(rows):
    return "\n".join("\t".join(values) for values in [rows[0].keys(), *(row.values() for row in rows)]) + "\n"


def write(path, rows):
    """Write the rows in the format that the file's name asks for."""
    kind = path.name.removesuffix(".gz").rsplit(".")[-1]
    if kind == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(tsv(rows), encoding="utf-8")
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


def section(tmp_path, train="train.tsv", dev=None, **more):
    return Section(
        source="files",
        root=str(tmp_path),
        train=train,
        dev=dev or train,
        cache=str(tmp_path / "cache"),
        **more,
    )


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.parquet", "a.TSV", "a.tsv.gz", "a.csv.gz",
                                  "a.jsonl.gz", "a.parquet.gz"])  # fmt: skip
def test_every_format_reads_alike(tmp_path, name):
    write(tmp_path / name, ROWS)
    data = read(section(tmp_path, name), "classification")
    assert data.train.texts == [(row["text"],) for row in ROWS]
    assert data.train.labels == [1, 0, 1] and data.labels == ("no", "yes")
    assert data.train.ids == ["7", "8", "9"]


def test_csv_text_with_line_breaks_and_carriage_returns(tmp_path):
    rows = [{"text": "two\nlines, and", "label": "0"}, {"text": "b\r\nc", "label": "1"}]
    write(tmp_path / "a.csv", rows)
    assert read(section(tmp_path, "a.csv"), "classification").train.texts == [
        ("two\nlines, and",),
        ("b\r\nc",),
    ]


def test_tsv_of_windows(tmp_path):
    (tmp_path / "train.tsv").write_bytes(b"\xef\xbb\xbf" + tsv(ROWS).replace("\n", "\r\n").encode())
    data = read(section(tmp_path), "classification")
    assert data.train.texts[2] == ("tail ü",) and data.labels == ("no", "yes")


def test_absolute_path_needs_no_root(tmp_path):
    path = write(tmp_path / "train.tsv", ROWS)
    given = Section(source="files", train=str(path), dev=str(path))
    assert len(read(given, "classification").train) == 3


@pytest.mark.parametrize(
    "labels, given, expected, indices",
    [
        (["10", "9", "9"], None, ("9", "10"), [1, 0, 0]),  # by number, not by spelling
        (["b", "10", "b"], None, ("10", "b"), [1, 0, 1]),
        (["b", "a", "b"], ("b", "a"), ("b", "a"), [0, 1, 0]),
        (["1", "0", "1"], ("bad", "good"), ("bad", "good"), [1, 0, 1]),  # indices of the names
        (["1", "0", "1"], ("1", "0"), ("1", "0"), [0, 1, 0]),  # the names themselves
        ([2, 1, 2], None, ("1", "2"), [1, 0, 1]),
        ([2.0, 1.0, 1.0], None, ("1", "2"), [1, 0, 0]),
        # One number in many spellings: with the order of a Python set each rank would number classes differently.
        (["1", "01", "001", "0001", "0"], None, ("0", "0001", "001", "01", "1"), [4, 3, 2, 1, 0]),
    ],
)
def test_classes(tmp_path, labels, given, expected, indices):
    rows = [{"text": "a", "label": label} for label in labels]
    write(tmp_path / "a.jsonl", rows)
    data = read(section(tmp_path, "a.jsonl", labels=given), "classification")
    assert (data.labels, data.train.labels) == (expected, indices)


def test_declared_classes_keep_their_order(tmp_path):
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["z", "a", "m"])
    )
    rows = {"text": ["one", "two"], "label": [2, 0]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "a.parquet")
    data = read(section(tmp_path, "a.parquet"), "classification")
    assert (data.labels, data.train.labels) == (("z", "a", "m"), [2, 0])
    data = read(section(tmp_path, "a.parquet", labels=("m", "a", "z")), "classification")
    assert data.train.labels == [0, 2]


DECLARED = {"a": ["neg", "pos"], "b": ["neg", "pos"], "c": ["pos", "neg"], "d": ["neg", "so-so"]}


@pytest.mark.parametrize(
    ("names", "given", "expected", "indices"),
    [
        (["a", "b"], None, ("neg", "pos"), [1, 0, 1, 0]),
        (["a", "c"], None, ("neg", "pos"), [1, 0, 0, 1]),  # orders differ, so names decide
        (["c", "d"], None, ("neg", "pos", "so-so"), [0, 1, 2, 0]),
        (
            ["b", "plain"],
            None,
            ("neg", "pos"),
            [1, 0, 0, 1],
        ),  # a file without declared classes has names or indices
        (["a", "c"], ("pos", "neg"), ("pos", "neg"), [0, 1, 1, 0]),
    ],
)
def test_declared_classes_of_several_files(tmp_path, names, given, expected, indices):
    for name, classes in DECLARED.items():
        features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=classes))
        rows = {"text": ["one", "two"], "label": [1, 0]}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / f"{name}.parquet")
    write(tmp_path / "plain.jsonl", [{"text": "one", "label": "neg"}, {"text": "two", "label": 1}])
    files = tuple("plain.jsonl" if name == "plain" else f"{name}.parquet" for name in names)
    data = read(section(tmp_path, files, files[1], labels=given), "classification")
    assert (data.labels, data.train.labels, data.dev.labels) == (expected, indices, indices[2:])


def test_limits_are_taken_from_the_front(tmp_path):
    write(tmp_path / "train.tsv", ROWS)
    data = read(section(tmp_path, max_train=2, max_dev=1), "classification")
    assert (data.train.ids, data.dev.ids, data.labels) == (["7", "8"], ["7"], ("no", "yes"))


def test_ids_that_repeat_give_way_to_positions(tmp_path):
    write(tmp_path / "train.tsv", [row | {"id": "same"} for row in ROWS])
    assert read(section(tmp_path), "classification").train.ids == ["0", "1", "2"]


def test_text_file_is_one_document(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("first\n\nsecond\n")
    given = section(tmp_path, "a.txt", label=None)
    assert texts_of(given, "causal_lm", tokenizer) == [("first\n\nsecond\n",)]


BLANK = ["", " = Title = \n", " \t\u3000", "a sentence", "\n"]


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
@pytest.mark.parametrize("source", ["a.jsonl", "a.parquet", "folder", "hub"])
def test_blank_rows_of_plain_text_are_left_out(tmp_path, monkeypatch, tokenizer, source, task):
    """The first row of wikitext, which configs/qwen_24_to_6.yaml reads, is such a row."""
    held = datasets.Dataset.from_dict({"text": BLANK})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: held)
    (tmp_path / "wikitext").mkdir()
    for name in ("a.jsonl", "a.parquet", "wikitext/train.jsonl"):
        write(tmp_path / name, [{"text": text} for text in BLANK])
    given = {"train": "train", "dev": "train", "label": None, "source": "Salesforce/wikitext"}
    if source == "folder":
        given["root"] = str(tmp_path)
    elif source != "hub":
        given |= {"source": "files", "root": str(tmp_path), "train": (source, source), "dev": source}
    assert texts_of(Section(**given), task, tokenizer, "dev") == [(" = Title = \n",), ("a sentence",)]
    if task == "causal_lm":
        data = load(Section(**given), task, tokenizer)
        lines = ["3", "7"] if source in ("a.jsonl", "folder") else ["2", "4"]  # their places in their source
        assert [data.dev.name(row).rpartition(":")[2] for row in range(2)] == lines
        assert len(data.train) == 2 * (1 + (source[:2] == "a."))


def test_a_limit_counts_the_texts_that_are_left(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", [{"text": text} for text in [*BLANK, "more"]])
    data = load(section(tmp_path, "a.jsonl", label=None, max_dev=2), "causal_lm", tokenizer)
    assert (len(data.train), len(data.dev)) == (3, 2)


def test_lines_of_a_text_file_in_a_folder_of_hub_names(tmp_path, tokenizer):
    (tmp_path / "wikitext").mkdir()
    (tmp_path / "wikitext" / "train.txt").write_text("first\n\nsecond\n")
    given = Section(source="Salesforce/wikitext", root=str(tmp_path), dev="train", label=None)
    assert texts_of(given, "masked_lm", tokenizer) == [("first",), ("second",)]


FINE = tsv(ROWS)
REFUSALS = {
    # name: (file name, its content, settings, task, message)
    "missing file": ("b.tsv", FINE, {"train": "c.tsv"}, "classification", r"c\.tsv: got no such file.*'b\.tsv'"),
    "missing folder": ("b.tsv", FINE, {"train": "x/c.tsv"}, "classification", r"/x does not exist"),
    "extension": ("a.xlsx", FINE, {}, "classification", r"a\.xlsx: got extension '\.xlsx', expected \.tsv, \.csv"),
    "not gzip": ("a.tsv.gz", FINE, {}, "classification", r"a\.tsv\.gz: got BadGzipFile"),
    "cut gzip": ("a.tsv.gz", gzip.compress(FINE.encode())[:-9], {}, "classification", r"got EOFError"),
    "empty file": ("a.tsv", "", {}, "classification", r"a\.tsv: got an empty file"),
    "no rows": ("a.tsv", "text\tlabel\n", {}, "classification", r"a\.tsv: got no rows"),
    "empty jsonl": ("a.jsonl", "\n", {}, "classification", r"a\.jsonl: got no rows"),
    "empty txt": ("a.txt", " \n", {}, "causal_lm", r"a\.txt: got an empty file"),
    "column": ("a.tsv", FINE, {"text": ("texts",)}, "classification", r"no column 'texts', expected .* text"),
    "label of txt": ("a.txt", "words", {}, "classification", r"a\.txt: got no column 'label'"),
    "columns twice": ("a.tsv", "text\ttext\nx\ty\n", {}, "classification", r"line 1: got columns"),
    "ragged": ("a.tsv", FINE + "1\tonly\n", {}, "classification", r"a\.tsv, line 5: got 2 fields, expected 3"),
    "quotes": ("a.csv", 'text,label\n"x"y,1\n', {}, "classification", r"a\.csv, line 2: got .* expected comma"),
    "encoding": ("a.tsv", FINE.encode("latin-1"), {}, "classification", r"a\.tsv, line 4: got byte 0xfc"),
    "empty text": ("a.tsv", FINE + "1\t \tno\n", {}, "classification", r"a\.tsv, line 5: got an empty text"),
    "not json": ("a.jsonl", "{}\n{", {}, "classification", r"a\.jsonl, line 2: got Expecting"),
    "not an object": ("a.jsonl", "[1]", {}, "classification", r"a\.jsonl, line 1: got a list"),
    "not parquet": ("a.parquet", "PAR1", {}, "classification", r"a\.parquet: got .*, expected a parquet file"),
    "field left out": (
        "a.jsonl", '{"text": "a", "label": 0}\n\n{"label": 1}', {}, "classification",
        r"a\.jsonl, line 3: got no text, expected a text in column text",
    ),
    "nested field": ("a.jsonl", '{"text": {"en": "a"}, "label": 0}', {}, "causal_lm", r"line 1: got a dict in text"),
    "label left out": (
        "a.jsonl", '{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n{"text": "c"}', {}, "classification",
        r"line 3: got no label",
    ),
    "label of no class": ("a.tsv", FINE, {"labels": ("yes", "maybe")}, "classification", r"line 3: got label 'no'"),
    "index of no class": (
        "a.jsonl", '{"text": "a", "label": 0}\n{"text": "b", "label": 2}', {"labels": ("x", "y")},
        "classification", r"line 2: got label '2' in column label, expected one of the 2 classes x, y",
    ),
    "classes twice": ("a.tsv", FINE, {"labels": ("no", "no")}, "classification", r"data\.labels: .* each name once"),
    "one class": ("a.jsonl", '{"text": "a", "label": "x"}', {}, "classification", r"one class, 'x', in label"),
    "fraction as class": ("a.jsonl", '{"text": "a", "label": 0.5}', {}, "classification", r"got 0\.5 in column"),
    "no label column": ("a.tsv", FINE, {"label": None}, "classification", r"data\.label: got null"),
    "score": ("a.tsv", FINE, {}, "regression", r"a\.tsv, line 2: got label 'yes' in column label, expected a fin"),
    "score NaN": ("a.tsv", "text\tlabel\nx\tnan\n", {}, "regression", r"line 2: got label 'nan'"),
    "missing text among blanks": (
        "a.jsonl", '{"text": " "}\n{"text": "a"}\n\n{"text": null}', {}, "causal_lm", r"line 4: got no text",
    ),
    "number among blanks": ("a.jsonl", '{"text": ""}\n{"text": 5}', {}, "masked_lm", r"line 2: got a int in text"),
    "blanks alone": ("a.jsonl", '{"text": " "}\n{"text": ""}', {}, "masked_lm", r"a\.jsonl: got only blank rows in"),
    "blanks alone, tsv": ("a.tsv", "text\tid\n \t1\n", {}, "causal_lm", r"a\.tsv: got only blank .*, expected some"),
    "blank pair": (
        "a.jsonl", '{"a": "x", "b": "y"}\n{"a": "", "b": " "}', {"text": ("a", "b")}, "masked_lm",
        r"line 2: got an empty a and b",
    ),
    "blank prompt and response": (
        "a.jsonl", '{"a": "x", "b": "y"}\n{"a": "", "b": " "}', {"text": ("a", "b")}, "causal_lm",
        r"line 2: got an empty a and b",
    ),
    "blank text of a score": ("a.tsv", "text\tlabel\n \t1\n", {}, "regression", r"line 2: got an empty text"),
    "built in, regression": ("a.tsv", FINE, {"source": "docstrings"}, "regression", r"data\.source: got docstrings"),
    "built in, split": ("a.tsv", FINE, {"source": "docstrings"}, "classification", r"data\.train and data\.dev"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(tmp_path, tokenizer, case):
    name, content, settings, task, message = REFUSALS[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        given = section(tmp_path, name).model_copy(update=settings)
        read(given, task) if task in ("classification", "regression") else load(given, task, tokenizer)


def test_a_missing_column_lists_the_nearest(tmp_path, tokenizer):
    names = ["sentence1", "sentence2", *(f"x{i}" for i in range(18))]
    write(tmp_path / "train.tsv", [dict.fromkeys(names, "a")])
    with pytest.raises(UserError) as caught:
        load(section(tmp_path, text=("sentence",), label=None), "causal_lm", tokenizer)
    listed = str(caught.value).split("columns: ")[1]
    assert listed.startswith("sentence1, sentence2, x") and listed.endswith(" (nearest of 20)")
    assert listed.count(",") == 11
    with pytest.raises(UserError, match=r"columns: text, label, id$|columns: text, id, label$"):
        write(tmp_path / "train.tsv", ROWS)
        load(section(tmp_path, text=("txt",), label=None), "causal_lm", tokenizer)


def test_class_that_only_dev_has(tmp_path):
    write(tmp_path / "train.tsv", ROWS)
    write(tmp_path / "dev.tsv", [*ROWS, ROWS[0] | {"label": "maybe"}])
    with pytest.raises(UserError, match=r"dev\.tsv, line 5: got label 'maybe' .* classes no, yes"):
        read(section(tmp_path, dev="dev.tsv"), "classification")


def test_hub_set(tmp_path, monkeypatch):
    features = datasets.Features(
        sentence=datasets.Value("string"), label=datasets.ClassLabel(names=["neg", "pos"])
    )
    held = datasets.Dataset.from_dict({"sentence": ["good", "bad"], "label": [1, 0]}, features)
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs["split"]))
        return held

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    given = Section(source="nyu-mll/glue", subset="sst2", dev="validation", text=("sentence",))
    data = read(given, "classification")
    assert asked == [(("nyu-mll/glue", "sst2"), "train"), (("nyu-mll/glue", "sst2"), "validation")]
    assert (data.labels, data.train.labels, data.train.texts[0]) == (("neg", "pos"), [1, 0], ("good",))


def test_hub_offline(tmp_path):
    script = (
        "from dsdistill.config.schema import Data; from dsdistill.data.sources import read\n"
        f"read(Data(source='nyu-mll/glue', subset='sst2', cache={str(tmp_path)!r}), 'classification')"
    )
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=offline, capture_output=True, text=True)
    last = done.stderr.strip().split("\n")[-1]
    assert "UserError: data.source: got nyu-mll/glue: " in last
    assert "load_dataset('nyu-mll/glue', 'sst2', split='train') was tried" in last


@pytest.mark.parametrize(
    "task, train, dev, text, sizes, labels",
    [
        ("classification", "sst2/dev", "sst2/dev", ("text_a",), (436, 436), ("0", "1")),
        ("classification", "mrpc/train", "mrpc/dev", ("text_a", "text_b"), (3668, 204), ("0", "1")),
        ("classification", "rte/train", "rte/dev", ("text_a", "text_b"), (2490, 139), None),
        ("regression", "stsb/train", "stsb/dev", ("text_a", "text_b"), (5749, 750), ()),
        ("classification", "eprstmt/train", "eprstmt/dev", ("text_a",), (266, 305), ("Negative", "Positive")),
    ],
)
def test_real_sets(real, task, train, dev, text, sizes, labels):
    suffix = ".jsonl.gz" if (real / f"{train}.jsonl.gz").exists() else ".tsv.gz"
    data = read(
        Section(source="files", root=str(real), train=train + suffix, dev=dev + suffix, text=text), task
    )
    assert (len(data.train), len(data.dev)) == sizes
    assert labels is None or data.labels == labels


def test_a_hub_set_from_local_files(tmp_path):
    """Set, split and columns have the hub's names; the data is a folder in the layout of files.local_copy."""
    (tmp_path / "sst2").mkdir()
    rows = [{"id": str(i), "label": str(i % 2), "text_a": f"text {i}", "text_b": ""} for i in range(4)]
    write(tmp_path / "sst2" / "train.tsv.gz", rows)
    write(tmp_path / "sst2" / "dev.jsonl", rows[:2])
    settings = {"source": "nyu-mll/glue", "subset": "sst2", "root": str(tmp_path), "train": "train"}
    data = read(Section(**settings, dev="validation", text=("sentence",)), "classification")
    assert [len(data.train), len(data.dev)] == [4, 2]
    assert data.train.texts[3] == ("text 3",) and data.train.labels == [0, 1, 0, 1]
    with pytest.raises(
        UserError, match=r"sst2: got .*'dev.jsonl', 'train.tsv.gz'\], expected a file test.FORMAT"
    ):
        read(Section(**settings, dev="test"), "classification")
    with pytest.raises(UserError, match="rte: got no such folder"):
        read(Section(**settings | {"subset": "rte"}), "classification")
