"""DSDISTILL_TUNE=1 times the tiles of a call and keeps the fastest, which later calls use."""

import json

import pytest
import torch

from dsdistill.bench.cases import attention_tensors
from dsdistill.ops import attention_alignment, available_backends, clock, records
from dsdistill.ops.attention import triton_schedule, triton_tiles, tuning
from dsdistill.ops.gpu import Tile, interpreting

pytestmark = pytest.mark.skipif("triton" not in available_backends(), reason="Triton cannot run here")
SLOW, FAST, WRONG = Tile(32, 64, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 4, 1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder of records, read anew before and after; the clock says that FAST is the fastest."""
    monkeypatch.setenv("DSDISTILL_RECORDS", str(tmp_path))
    monkeypatch.setattr(triton_schedule, "default_plan", "merged")
    monkeypatch.setattr(tuning, "REPEATS", 1)
    monkeypatch.setattr(clock, "between", lambda begin, end: 1.0)
    monkeypatch.setattr(tuning, "_done", set())
    records.read_again()
    yield tmp_path
    records.read_again()


def call(tokens: int = 40) -> list[torch.Tensor]:
    device = "cpu" if interpreting() else "cuda"
    tensors = attention_tensors(batch=1, heads=1, tokens=tokens, width=16)
    tensors = {key: value.float().to(device) for key, value in tensors.items()}
    mine = [tensors[key].requires_grad_() for key in ("student_query", "student_key")]
    loss = attention_alignment(**tensors, backend="triton")
    return [loss.detach(), *torch.autograd.grad(loss, mine)]


def test_the_winner_is_recorded_and_taken(folder, monkeypatch):
    before = call()
    monkeypatch.setattr(tuning, "candidates", lambda kernel, tensors: [SLOW, FAST, WRONG])
    times = {SLOW: 2.0, FAST: 1.0, WRONG: 0.5}
    tried = []
    original = tuning._time

    def timed(kernel, tile, *rest):
        if tile == WRONG:
            raise AssertionError("off")
        assert original(kernel, tile, *rest) >= 1.0  # at least one launch of this kernel
        tried.append((kernel, tile))
        return times[tile]

    monkeypatch.setattr(tuning, "_time", timed)
    monkeypatch.setenv("DSDISTILL_TUNE", "1")
    after = call()
    assert tried == [(kernel, tile) for kernel in ("statistics", "merged") for tile in (SLOW, FAST)]
    (path,) = folder.glob("tiles-*.json")
    record = json.loads(path.read_text())
    assert {"gpu", "capability", "date", "torch", "triton"} <= record.keys() and record["rows"] == []
    assert [(row["kernel"], Tile(*row["tile"])) for row in record["tiles"]] == [
        ("statistics", FAST),
        ("merged", FAST),
    ]
    assert record["tiles"][0]["failed"] == {"16x16x4x1": "AssertionError: off"}
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(old, new)
    taken = []
    monkeypatch.setattr(
        triton_schedule, "tile_of", lambda *given: taken.append(triton_tiles.tile_of(*given)) or FAST
    )
    call(41)
    assert taken == [FAST, FAST] and len(tried) == 4  # 41 tokens are near 40


def test_a_tile_with_other_results_is_none(folder, monkeypatch):
    q = torch.zeros(1, 1, 40, 16)
    results = iter([torch.ones(3), 2 * torch.ones(3)])
    monkeypatch.setattr(tuning, "candidates", lambda kernel, tensors: [SLOW])

    def wrong():
        triton_schedule.tile_of("rows", [q])
        return [next(results)]

    assert list(tuning.try_tiles([wrong], [q])) == []


def test_records_of_other_gpus_and_kinds_do_not_count(folder):
    row = {"kernel": "merged", "dtype": "bfloat16", "width": 64, "tokens": 4096, "tile": [16, 16, 4, 1]}
    near = row | {"tokens": 512, "tile": [32, 16, 4, 1]}
    (folder / "a.json").write_text(json.dumps({"capability": [9, 0], "rows": [], "tiles": [row, near]}))
    records.read_again()
    wanted = ("merged", "bfloat16", 64)
    assert records.recorded_tile(*wanted, 3000, (9, 0)) == (16, 16, 4, 1)
    assert records.recorded_tile(*wanted, 100, (9, 0)) == (32, 16, 4, 1)
    assert records.recorded_tile(*wanted, 4096, (8, 0)) is None
    assert records.recorded_tile("rows", *wanted[1:], 4096, (9, 0)) is None
    assert records.recorded_tile("merged", "bfloat16", 128, 4096, (9, 0)) is None


def test_a_record_of_tiles_alone_says_nothing_of_backends():
    wanted = {"operator": "x", "variant": "kl", "dtype": "bfloat16"}
    row = wanted | {"backend": "triton", "tokens": 64, "checked": True, "vs_chunked": 2.0}
    known = [{"capability": [9, 0], "rows": [], "tiles": [{}]}, {"capability": [8, 0], "rows": [row]}]
    given = {"tokens": 64, "candidates": ["triton"], "check": lambda name: True}
    assert records.fastest(known, (9, 0), **wanted, **given) == "triton"


def test_tuning_wants_a_folder(monkeypatch):
    monkeypatch.setenv("DSDISTILL_TUNE", "1")
    monkeypatch.delenv("DSDISTILL_RECORDS", raising=False)
    with pytest.raises(ValueError, match="DSDISTILL_RECORDS, expected a folder"):
        call()


def test_candidates_are_many_and_the_table_first():
    tensors = [torch.empty(1, 1, 4096, 64, dtype=torch.bfloat16)] * 4
    if interpreting():
        assert tuning.candidates("rows", tensors)[0] == triton_tiles.INTERPRETER
    assert all(len(set(tiles)) == len(tiles) >= 3 for tiles in tuning.CANDIDATES.values())
    assert tuning.CANDIDATES.keys() == triton_tiles.TILES.keys()
