"""Tiles in which every pair exists run without conditions; tiles without pairs do not run."""

from collections import Counter

import pytest
import torch

from dsdistill.bench import verify
from dsdistill.bench.cases import attention_tensors
from dsdistill.ops import attention_alignment, available_backends
from dsdistill.ops.attention import triton_schedule, triton_sweeps
from dsdistill.ops.gpu import Tile, interpreting

pytestmark = pytest.mark.skipif("triton" not in available_backends(), reason="Triton cannot run here")
DEVICE = verify.device_of("triton")
TOKENS, SIDE = 150, 16  # ten tiles per side, the last one partial
DOCUMENTS = torch.tensor([0] * 40 + [1] * 60 + [2] * 50)
CONDITIONS = {
    "none": {},
    "causal": {"causal": True},
    "window": {"window": 50},
    "causal window": {"causal": True, "window": 50},
    "padded right": {"mask": torch.arange(TOKENS) < 100},
    "padded left": {"mask": torch.arange(TOKENS) >= 37, "causal": True},
    "packed": {"segments": DOCUMENTS, "causal": True},
    "packed, padded": {"segments": DOCUMENTS, "mask": torch.arange(TOKENS) < 130, "window": 70},
    "interrupted": {"segments": DOCUMENTS.where(torch.arange(TOKENS) != 70, 0)},
    "scattered": {"segments": torch.arange(TOKENS) % 3},
    "nothing": {"mask": torch.zeros(TOKENS, dtype=torch.bool)},
}
# Tiles of each kind in the walk of one head's keys by 16 queries at a time, where they can be counted by hand: those in
# which all pairs exist, and the others that are looked at.
TILES = {
    "none": (9 * 9, 10 + 9),
    "causal": (9 * 8 // 2, 10 + 9),
    "padded right": (6 * 6, 7 * 7 - 6 * 6),
    "scattered": (0, 100),
    "nothing": (0, 0),
}


def given(name: str) -> dict:
    found = dict(CONDITIONS[name])
    for key in ("mask", "segments"):
        if key in found:
            found[key] = found[key].expand(1, TOKENS).to(DEVICE)
    return found


def small_tiles(monkeypatch, rows: int = SIDE, columns: int = SIDE) -> None:
    monkeypatch.setattr(triton_schedule, "tile_of", lambda kernel, tensors: Tile(rows, columns, 4, 1))


KINDS = [
    *(("kl", "merged", (16, 32), name) for name in CONDITIONS),
    *(("mse", "sweeps", (32, 16), name) for name in ("causal window", "packed, padded", "interrupted")),
    *(("score_mse", "merged", (16, 16), name) for name in ("none", "packed")),
]


@pytest.mark.parametrize(("divergence", "plan", "sides", "name"), KINDS)
def test_losses_and_gradients(divergence, plan, sides, name, monkeypatch):
    small_tiles(monkeypatch, *sides)
    monkeypatch.setattr(triton_schedule, "default_plan", plan)
    tensors = attention_tensors(batch=1, heads=2, kv=1, tokens=TOKENS, width=16)
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        inputs = {key: value.to(DEVICE, dtype) for key, value in tensors.items()}
        mine = [inputs[key].requires_grad_() for key in ("student_query", "student_key")]
        loss = attention_alignment(**inputs, **given(name), divergence=divergence, backend=backend)
        found.append([loss, *torch.autograd.grad(loss, mine)])
    for got, expected in zip(*found, strict=True):
        assert (got - expected).abs().max() <= 2e-5 * expected.abs().max() + 1e-12


@pytest.mark.skipif(not interpreting(), reason="tiles are counted in the interpreter")
@pytest.mark.parametrize("name", TILES)
def test_what_runs(name, monkeypatch):
    small_tiles(monkeypatch)
    seen = Counter()

    def counted(kind: str, function):
        return lambda *arguments: (seen.update([kind]), function(*arguments))[1]

    monkeypatch.setattr(triton_sweeps, "exists", counted("conditions", triton_sweeps.exists))
    monkeypatch.setattr(triton_sweeps, "load_block", counted("blocks", triton_sweeps.load_block))
    tensors = {
        key: value.float()
        for key, value in attention_tensors(batch=1, heads=1, tokens=TOKENS, width=16).items()
    }
    attention_alignment(**tensors, **given(name), backend="triton")
    whole, others = TILES[name]
    assert seen["conditions"] == others
    assert seen["blocks"] == 2 * (whole + others)  # for the student's and the teacher's keys


def test_reach():
    """By definition: the first and the last token of the same label, and whether none of another lies between them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 4, (5, 30), generator=generator)
    labels[0] = -1
    labels[1] = torch.arange(30) // 7
    starts, ends = triton_schedule.reach(labels, -1)
    for row, start, end in zip(labels.tolist(), starts.tolist(), ends.tolist(), strict=True):
        for place, label in enumerate(row):
            if label == -1:
                assert (start[place], end[place]) == (30, 0)
                continue
            first, last = row.index(label), 30 - row[::-1].index(label)
            whole = set(row[first:last]) == {label}
            assert (start[place], end[place]) == (first if whole else -1 - first, last)
