"""Which documents share a block is saved beside the stores, once for all processes."""

import os
from pathlib import Path

import numpy as np
import pytest

from dsdistill.data import blocks
from dsdistill.data.blocks import packed
from dsdistill.data.examples import cut
from tests.data.rig import made

ROWS = [
    [1, 2],
    [3, 4, 5, 6],
    [7, 8, 9, 10, 11, 12],
    [13] * 5,
    [14] * 3,
]


def held(found):
    return [found.of(block) for block in range(len(found))]


def forbid(monkeypatch):
    def best_fit(*arguments):
        raise AssertionError("the blocks are made again")

    monkeypatch.setattr(blocks, "best_fit", best_fit)


def test_a_second_start_makes_no_blocks(tmp_path, monkeypatch):
    first = packed(made(ROWS), 7, tmp_path, None)
    # 6 alone; 5 with 2; 4 with 3.
    assert held(first) == [[0, 3], [1, 4], [2]] and first.lengths.tolist() == [7, 7, 6]
    forbid(monkeypatch)
    second = packed(made(ROWS), 7, tmp_path, None)
    assert held(second) == held(first) and second.lengths.tolist() == [7, 7, 6]
    assert second.take([2, 0]).lengths.tolist() == [6, 7]


@pytest.mark.parametrize("other", [{"length": 9}, {"drawn": 0.5}, {"rows": ROWS[:4]}])
def test_other_blocks_have_a_name_of_their_own(tmp_path, other):
    packed(made(ROWS), 7, tmp_path, None)
    packed(made(other.get("rows", ROWS)), other.get("length", 7), tmp_path, other.get("drawn"))
    assert len(list(tmp_path.glob("blocks-*/"))) == 2


@pytest.mark.parametrize("name", ["order", "bounds", "sizes"])
@pytest.mark.parametrize("damage", ["shorter", "gone", "other"])
def test_damaged_blocks_are_made_again(tmp_path, caplog, name, damage):
    first = held(packed(made(ROWS), 7, tmp_path, None))
    (folder,) = tmp_path.glob("blocks-*/")
    file = folder / f"{name}.npy"
    if damage == "shorter":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "gone":
        file.unlink()
    else:
        np.save(file, np.arange(2))
    assert held(packed(made(ROWS), 7, tmp_path, None)) == first
    assert "made again" in caplog.text
    caplog.clear()
    assert held(packed(made(ROWS), 7, tmp_path, None)) == first and not caplog.text


def test_a_cache_that_cannot_be_written_costs_time_alone(tmp_path, caplog):
    place = tmp_path / "a file"
    place.touch()
    assert held(packed(made(ROWS), 7, Path(place), None)) == [[0, 3], [1, 4], [2]]
    assert "made again at every start" in caplog.text


def test_long_documents_are_split_in_their_places():
    rows = [[i] * n for i, n in enumerate([3, 9, 4, 8, 1, 13, 2])]
    found = cut(made(rows).documents, 4, "split")
    parts = [(i, n) for i, row in enumerate(rows) for n in (*[4] * (len(row) // 4), len(row) % 4) if n > 1]
    assert [(int(found.tokens(k)[0]), len(found.tokens(k))) for k in range(len(found))] == parts
    assert all(len(set(found.tokens(k).tolist())) == 1 for k in range(len(found)))
    assert found.lost.dropped == 3  # the remainders of one token, and the document of one token
