import re

import pytest

from dsdistill.config.data_section import Data as Section
from dsdistill.config.errors import UserError
from dsdistill.data import docstring_pairs as pairs
from dsdistill.data.sources import streams

SMALL = 60  # pairs of a package: enough to test on, few enough to be quick


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "PER_PACKAGE", SMALL)
        patch.setattr(pairs, "PER_MODULE", 20)
        return pairs.collect()


def of(rows, split):
    return [row for row in rows if row["split"] == split]


def module(row):
    return row["id"].split(":")[0]


def test_every_split_has_pairs_and_no_module_is_in_two(rows):
    by_split = {split: {module(row) for row in of(rows, split)} for split in pairs.SPLITS}
    assert all(by_split.values()) and sum(map(len, by_split.values())) == len({module(row) for row in rows})
    packages = {
        name: {row["id"].split(".")[0].split(":")[0] for row in of(rows, name)} for name in pairs.SPLITS
    }
    assert packages["unseen"] == set(pairs.UNSEEN) and not packages["train"] & packages["unseen"]
    assert packages["dev"] <= packages["train"]
    assert {"torch", "transformers", "numpy"} <= packages["train"]


def test_no_text_comes_twice(rows):
    texts = [re.sub("[^a-z]", "", row[name].lower()) for row in rows for name in ("query", "document")]
    cut = [text for text in texts if len(text) < 300]  # longer texts may differ only in what is cut off
    assert len(set(cut)) == len(cut)


def test_lengths_and_lines(rows):
    for row in rows:
        assert 20 <= len(row["query"]) <= 200 and 80 <= len(row["document"]) <= 1000
        for text in (row["query"], row["document"]):
            assert text == " ".join(text.split())


def test_no_package_name_in_the_texts(rows):
    names = re.compile(
        r"numpy|scipy|pandas|pytorch|networkx|matplotlib|sympy|transformers|\b(np|pd|plt|nx)\b", re.I
    )
    for row in rows:
        assert not names.search(row["query"] + " " + row["document"]), row


def test_a_docstring_is_divided_after_its_first_paragraph():
    text = """Return the sum
    of SciPy arrays.

    Parameters
    ----------
    x : numpy.ndarray

    >>> np.sum(x)
    """
    assert pairs.divided(text) == (
        "Return the sum of library arrays.",
        "Parameters x : library.ndarray >>> library.sum(x)",
    )
    assert pairs.divided("One line.") == ("One line.", "")


def test_they_are_read_as_columns(rows, monkeypatch, tmp_path):
    monkeypatch.setattr(pairs, "collect", lambda: rows)
    section = Section(text=("query", "document"), label=None, train="unseen", cache=str(tmp_path))
    (stream,) = streams(section, section.train, "embedding")
    found = [row for _, row in stream.rows()]
    assert [row["query"] for row in found] == [row["query"] for row in of(rows, "unseen")]
    alone = section.model_copy(update={"text": ("document",)})  # only one column of the same rows
    (stream,) = streams(alone, "unseen", "embedding")
    assert [row["document"] for _, row in stream.rows()] == [row["document"] for row in of(rows, "unseen")]
    with pytest.raises(
        UserError, match=r"got 'test' with pairs of source docstrings, expected train, dev, unseen"
    ):
        pairs.table("test", str(tmp_path))
