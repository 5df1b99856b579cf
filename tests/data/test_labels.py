"""Train and dev sets may spell a label differently or leave it out; each label must get the right class."""

import json

import datasets
import pytest

from dsdistill.config.data_section import Data as Section
from dsdistill.config.data_section import Part
from dsdistill.config.errors import UserError
from tests.data.rig import read

NLI = ("entailment", "neutral", "contradiction")  # as MNLI numbers them


def section(folder, train, dev=None, **more) -> Section:
    """Return a section over labels written as rows of files; a file of ints and None has a column with gaps."""
    for name, labels in (("train", train), ("dev", train if dev is None else dev)):
        rows = [
            {"text": f"{name} {i}", "label": label, "id": f"{name}-{i}"} for i, label in enumerate(labels)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return Section(source="files", root=str(folder), train="train.jsonl", dev="dev.jsonl", **more)


def tsv(path, labels):
    path.write_text("text\tlabel\n" + "".join(f"a {i}\t{label}\n" for i, label in enumerate(labels)))


def declared(path, labels, names=None):
    """Write a parquet file whose label column declares its classes, or a file of plain numbers."""
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("float64")
    features = datasets.Features(text=datasets.Value("string"), label=kind)
    rows = {"text": [f"row {i}" for i in range(len(labels))], "label": labels}
    datasets.Dataset.from_dict(rows, features).to_parquet(path)


def test_numbers_beside_names_are_refused_unless_their_order_is_given(tmp_path):
    """By sorting, contradiction would be 0, entailment 1 and neutral 2, but the dev set means another order."""
    with pytest.raises(UserError) as caught:
        read(section(tmp_path, NLI, [0, 1, 2]), "classification")
    told = str(caught.value)
    assert (
        "dev.jsonl, line 1: got label '0' in column label, expected one of the 3 classes contradiction"
        in told
    )
    assert told.endswith("(data.labels may list the names in the order of the numbers)")
    data = read(section(tmp_path, NLI, [0, 1, 2], labels=NLI), "classification")
    assert (data.train.labels, data.dev.labels) == ([0, 1, 2], [0, 1, 2])
    with pytest.raises(UserError, match=r"got label 'neutral' .* classes 0, 1, 2 \(data.labels may list"):
        read(section(tmp_path, [0, 1, 2], NLI[1:]), "classification")


def test_numbers_of_a_declared_order(tmp_path):
    declared(tmp_path / "train.parquet", [2, 0], NLI)
    given = section(tmp_path, NLI, [2, 1, "entailment"])
    data = read(given.model_copy(update={"train": "train.parquet"}), "classification")
    assert (data.labels, data.train.labels, data.dev.labels) == (NLI, [2, 0], [2, 1, 0])
    # The train set has names; the dev set has numbers for names that it declares.
    declared(tmp_path / "dev.parquet", [0, 2], NLI)
    data = read(given.model_copy(update={"train": "train.jsonl", "dev": "dev.parquet"}), "classification")
    assert (data.labels, data.dev.labels) == (("contradiction", "entailment", "neutral"), [1, 0])


def test_one_train_file_of_names_and_one_of_numbers(tmp_path):
    tsv(tmp_path / "names.tsv", ["no", "yes"])
    tsv(tmp_path / "numbers.tsv", ["1", "0"])
    given = Section(source="files", root=str(tmp_path), train=("names.tsv", "numbers.tsv"), dev="names.tsv")
    with pytest.raises(
        UserError, match=r"numbers.tsv, line 2: got label '1' .* together with names such as 'no'"
    ):
        read(given, "classification")
    parts = given.model_copy(update={"train": (Part(train="names.tsv"), Part(train="numbers.tsv"))})
    with pytest.raises(
        UserError, match=r"numbers.tsv, line 2: got label '1' .* together with names such as 'no'"
    ):
        read(parts, "classification")
    data = read(given.model_copy(update={"labels": ("yes", "no")}), "classification")
    assert data.train.labels == [1, 0, 1, 0]
    # Names that look like numbers may stand among others in one column.
    tsv(tmp_path / "mixed.tsv", ["no", "3"])
    data = read(given.model_copy(update={"train": ("mixed.tsv", "names.tsv")}), "classification")
    assert data.labels == ("3", "no", "yes")


def test_whole_numbers_with_a_point_are_the_numbers(tmp_path):
    for train, dev in ((["1.0", "0.0"], ["1", "0"]), (["1", "0"], ["1.0", "0.00"])):
        tsv(tmp_path / "train.tsv", train)
        tsv(tmp_path / "dev.tsv", dev)
        given = Section(source="files", root=str(tmp_path), train="train.tsv", dev="dev.tsv")
        data = read(given, "classification")
        assert (data.labels, data.train.labels, data.dev.labels) == (("0", "1"), [1, 0], [1, 0])
        data = read(given.model_copy(update={"labels": ("bad", "good")}), "classification")
        assert (data.train.labels, data.dev.labels) == ([1, 0], [1, 0])
    tsv(tmp_path / "train.tsv", ["1.0", "1.5", "2.0"])  # not all are whole numbers, so they are names
    data = read(given.model_copy(update={"dev": "train.tsv"}), "classification")
    assert data.labels == ("1.0", "1.5", "2.0") and data.dev.labels == [0, 1, 2]


def test_a_column_of_numbers_with_gaps(tmp_path):
    declared(tmp_path / "a.parquet", [1.0, None, 0.0])
    given = Section(
        source="files", root=str(tmp_path), train="a.parquet", dev="a.parquet", drop_unlabelled=True
    )
    data = read(given, "classification")
    assert (data.labels, data.train.labels, data.train.texts) == (
        ("0", "1"),
        [1, 0],
        [("row 0",), ("row 2",)],
    )
    with pytest.raises(UserError, match=r"a.parquet, row 2: got no label, expected a label \(data.drop"):
        read(given.model_copy(update={"drop_unlabelled": False}), "classification")


@pytest.mark.parametrize("label", [None, "", "  ", "-", -1, "-1", -1.0])
@pytest.mark.parametrize("split", ["train", "dev"])
def test_rows_without_a_label(tmp_path, split, label):
    """Ids, texts and labels of the remaining rows stay together; a limit counts only these rows."""
    labels = ["b", "a", label, "b", "a"]
    given = section(tmp_path, **{"train": ["b", "a"], split: labels}, max_train=3, max_dev=3)
    shown = r"no label" if label is None or not str(label).strip() else rf"label {label!r} in column label"
    with pytest.raises(UserError) as caught:
        read(given, "classification")
    assert f"{split}.jsonl, line 3: got {shown}, expected a label (data.drop_unlabelled: true leaves" in str(
        caught.value
    )
    data = read(given.model_copy(update={"drop_unlabelled": True}), "classification")
    rows = getattr(data, split)
    assert rows.labels == [1, 0, 1] and rows.texts[2] == (f"{split} 3",)
    assert rows.ids == [f"{split}-{i}" for i in (0, 1, 3)]


def test_rows_without_a_label_of_a_declared_class(tmp_path):
    declared(tmp_path / "a.parquet", [0, -1, 1], ["a", "b"])
    given = Section(source="files", root=str(tmp_path), train="a.parquet", dev="a.parquet")
    with pytest.raises(
        UserError, match=r"row 2: got label -1 in column label, expected a label \(.* out such rows\)$"
    ):
        read(given, "classification")
    left = {"drop_unlabelled": True, "labels": ("b", "a")}
    assert read(given.model_copy(update=left), "classification").train.labels == [1, 0]
    # It stays missing even if a class of other files is called -1.
    left["labels"] = ("-1", "a", "b")
    assert read(given.model_copy(update=left), "classification").train.labels == [1, 2]
    with pytest.raises(UserError, match=r"row 2: got label -1 in column label, expected a label"):
        read(given.model_copy(update=left | {"drop_unlabelled": False}), "classification")


def test_a_class_may_be_called_minus_one(tmp_path):
    with pytest.raises(UserError, match=r"data\.labels may name a class -1"):
        read(section(tmp_path, [-1, 1]), "classification")
    for labels in ([-1, 1, "-"], ["-1.0", "1.0", "-"]):
        given = section(tmp_path, labels, labels=("-1", "1"), drop_unlabelled=True)
        assert read(given, "classification").train.labels == [0, 1]


def test_scores_without_a_number(tmp_path):
    given = section(tmp_path, [0.5, None, -1, "-", 2], drop_unlabelled=True)
    assert read(given, "regression").train.labels == [0.5, -1, 2]
    with pytest.raises(UserError, match="line 2: got no label, expected a label"):
        read(given.model_copy(update={"drop_unlabelled": False}), "regression")


def test_rows_that_are_left_keep_their_lines(tmp_path):
    given = section(tmp_path, ["a", "b"], [None, "a", "-", "other"], drop_unlabelled=True)
    with pytest.raises(UserError, match=r"dev\.jsonl, line 4: got label 'other'"):
        read(given, "classification")


def test_no_row_with_a_label(tmp_path):
    given = section(tmp_path, ["a", "b"], [None, "-"], drop_unlabelled=True)
    with pytest.raises(
        UserError, match=r"dev\.jsonl: got no row with a label in column label, expected at least"
    ):
        read(given, "classification")
