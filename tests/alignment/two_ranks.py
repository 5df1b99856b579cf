"""Terms that relate examples across ranks, on two real ones; run as a module, the second: PORT FILE."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dsdistill.distributed.leave import leave
from tests.alignment.rig import Rig, make_batch, rows, with_filler

TERMS = {"contrastive": {}, "sp": {}, "rkd": {}, "cka": {}, "pkt": {"weight": 10.0}}
NAMES = list(TERMS)
STUDENT = {"hidden_size": 24, "num_hidden_layers": 2}
LENGTHS = (14, 9, 3, 1, 12, 7, 8, 8, 5)
SHARES = [[[0, 1, 2, 3], [4, 5]], [[6, 7, 8], []]]  # of each micro-batch, the rows of each rank
ROOT = Path(__file__).parents[2]


def _rig() -> tuple[Rig, list]:
    rig, batch = Rig("bert", terms=TERMS, student=STUDENT), make_batch("classification", LENGTHS)
    filler = rows(with_filler(batch, 1), [0])
    return rig, [[rows(batch, share) if share else filler for share in shares] for shares in SHARES]


def whole() -> tuple[dict, dict]:
    """Raw values and gradients of one rank whose micro-batches hold the rows of both."""
    rig, _ = _rig()
    batch = make_batch("classification", LENGTHS)
    _, values, gradients = rig.step(*(rows(batch, left + right) for left, right in SHARES))
    return values, gradients


def average_over_two_ranks(folder: Path) -> tuple[dict, dict]:
    """Sum of the ranks' raw values and mean of their gradients; this process is rank 0."""
    from tests.engine.launch import free_port

    port, environment = str(free_port()), os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.alignment.two_ranks", port, str(folder / "1.pt")]
    other = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE)
    try:
        own = _rank(0, port)
        _, errors = other.communicate(timeout=120)
        assert other.returncode == 0, errors.decode()[-3000:]
    finally:
        other.kill()
    found = [own, torch.load(folder / "1.pt")]
    values = {name: sum(values[name] for values, _ in found) for name in NAMES}
    return values, {name: sum(gradients[name] for _, gradients in found) / 2 for name in found[0][1]}


def _rank(rank: int, port: str) -> tuple[dict, dict]:
    """Raw values and gradients of one rank of two."""
    rig, batches = _rig()
    batches = [shares[rank] for shares in batches]
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=100),
    )
    try:
        counts = rig.counts(batches)
        dist.all_reduce(counts)
        raw = 0.0
        for batch in batches:
            loss, values = rig.loss(batch, counts)
            (loss * 2).backward()
            raw = raw + values
    finally:
        dist.destroy_process_group()
    gradients = {n: p.grad for n, p in rig.module.named_parameters() if p.grad is not None}
    return dict(zip(rig.objective.terms, raw.tolist(), strict=True)), gradients


if __name__ == "__main__":
    torch.save(_rank(1, sys.argv[1]), sys.argv[2])
    leave()
