import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from dsdistill.config.errors import UserError
from dsdistill.config.schema import Data as Section
from dsdistill.data import docstrings
from tests.data.rig import read

SMALL = 120  # texts of a class: enough to test on, few enough to be quick


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docstrings, "PER_PACKAGE", SMALL)
        return docstrings.collect()


def of(rows, split, column):
    return [row[column] for row in rows if row["split"] == split]


def module(row):
    return row["id"].split(":")[0]


def test_classes_are_of_like_size(rows):
    sizes = Counter(row["label"] for row in rows)
    assert sorted(sizes) == sorted(docstrings.PACKAGES)
    assert set(sizes.values()) == {SMALL}
    assert set(of(rows, "dev", "label")) <= set(of(rows, "train", "label"))


def test_no_text_and_no_module_is_in_both_splits(rows):
    train, dev = ([row for row in rows if row["split"] == split] for split in ("train", "dev"))
    assert train and dev and len(train) + len(dev) == len(rows)
    assert not {module(row) for row in train} & {module(row) for row in dev}
    letters = [re.sub("[^a-z]", "", row["text"].lower()) for row in rows]
    assert len(set(letters)) == len(letters)


def test_no_package_name_in_the_texts(rows):
    written = re.compile(
        "|".join(re.escape(name.replace("_", " ")) for name in docstrings.PACKAGES), re.IGNORECASE
    )
    words = re.compile(r"\b(np|pd|plt|nx|mpl|hf|ds)\b|hugging|pytorch|pylab", re.IGNORECASE)
    for row in rows:
        assert not written.search(row["text"].replace("_", " ")), row
        assert not words.search(row["text"].replace("_", " ")), row


def test_texts_are_one_line_of_the_promised_length(rows):
    for row in rows:
        assert 40 <= len(row["text"]) <= 400 and row["text"] == " ".join(row["text"].split())


def test_order_mixes_the_classes(rows):
    assert len({row["label"] for row in rows[:60]}) >= 8


@pytest.mark.parametrize(
    "docstring, text",
    [
        ("\n  Adds\n   two :class:`~torch.Tensor` objects.\n\n  More.", "Adds two library.Tensor objects."),
        ("``np.dot`` of NumPy, PyTorch's or hf_hub's.", "library.dot of library, library's or library_hub's."),
        ("Hugging Face ds_config, plt.plot, IDs, inputs", "library library_config, library.plot, IDs, inputs"),
        ("Title\n=====\ntext a*b", "Title text a*b"),
    ],
)  # fmt: skip
def test_clean(docstring, text):
    assert docstrings.clean(docstring) == text


def test_sources_are_parsed_and_not_run(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""One."""\nraise SystemExit\nclass A:\n    "Two."\n    async def b(self):\n        """Three."""\n'
        '        def c():\n            """Not this: local."""\nx = """Nor this."""\n'
    )
    assert sorted(docstrings.docstrings_in(path)) == [("", "One."), ("A", "Two."), ("A.b", "Three.")]
    path.write_text("{{ template }} def")
    assert list(docstrings.docstrings_in(path)) == []


def test_two_processes_write_the_same_cache(tmp_path):
    script = (
        "import sys; from dsdistill.data import docstrings\n"
        "docstrings.PER_PACKAGE = 15; docstrings.table('dev', sys.argv[1])"
    )
    written = []
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / seed)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
        )
        (path,) = (tmp_path / seed).iterdir()  # and no temporary file is left
        written.append((path.name, path.read_bytes()))
    assert written[0] == written[1]


def test_cache_is_read_again(tmp_path, monkeypatch, rows):
    calls = []
    monkeypatch.setattr(docstrings, "collect", lambda: calls.append(1) or rows)
    given = Section(cache=str(tmp_path / "new" / "cache"), max_train=50)
    first, second = (read(given, "classification") for _ in range(2))
    assert first == second and len(calls) == 1
    assert first.train.texts == [(text,) for text in of(rows, "train", "text")[:50]]
    assert first.dev.ids == of(rows, "dev", "id") and first.labels == docstrings.PACKAGES
    (path,) = (tmp_path / "new" / "cache").iterdir()
    assert [json.loads(line) for line in path.open()] == rows

    monkeypatch.setattr(docstrings.importlib.metadata, "version", lambda package: "0")
    read(given, "classification")
    assert len(calls) == 2, "another version must not read this cache"


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings, "PACKAGES", ("numpy", "no_such_package"))
    with pytest.raises(UserError, match="package no_such_package is missing"):
        docstrings.table("train", str(tmp_path))
