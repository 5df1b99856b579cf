"""Terms that relate examples across ranks, on real ranks: `python -m tests.alignment.two_ranks RANK PORT FOLDER`."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

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
    """Sum of the ranks' raw values and mean of their gradients."""
    from tests.engine.launch import free_port

    port, environment = free_port(), os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.alignment.two_ranks"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(folder)], env=environment, cwd=ROOT, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors.decode()[-3000:]
    found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    values = {name: sum(values[name] for values, _ in found) for name in NAMES}
    return values, {name: sum(gradients[name] for _, gradients in found) / 2 for name in found[0][1]}


def _main(rank: int, port: str, folder: str) -> None:
    rig, batches = _rig()
    batches = [shares[rank] for shares in batches]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    counts = rig.counts(batches)
    dist.all_reduce(counts)
    raw = 0.0
    for batch in batches:
        loss, values = rig.module(batch, rig.teacher_trace(batch), counts)
        (loss * 2).backward()
        raw = raw + values
    gradients = {n: p.grad for n, p in rig.module.named_parameters() if p.grad is not None}
    torch.save(
        (dict(zip(rig.objective.terms, raw.tolist(), strict=True)), gradients), Path(folder, f"{rank}.pt")
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(int(sys.argv[1]), *sys.argv[2:])
