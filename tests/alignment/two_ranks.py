"""Run terms that relate examples on two real ranks. As a module this is the second rank: PORT FILE FORM."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dsdistill.data.batch import Batch
from dsdistill.data.packing import Document, packed_batch
from dsdistill.distributed.leave import leave
from tests.alignment.rig import Rig, make_batch, rows, with_filler

TERMS = {"contrastive": {}, "sp": {}, "rkd": {}, "cka": {}, "pkt": {"weight": 10.0}}
NAMES = list(TERMS)
PAIR_TERMS = TERMS | {"task": {}, "embedding": {"dims": [8]}, "feature": {"layers": "last"}}
STUDENT = {"hidden_size": 24, "num_hidden_layers": 2}
LENGTHS = (14, 9, 3, 1, 12, 7, 8, 8, 5)
SHARES = [[[0, 1, 2, 3], [4, 5]], [[6, 7, 8], []]]  # for each micro-batch, the rows of each rank
ROOT = Path(__file__).parents[2]


def _rig(form: str) -> tuple[Rig, Callable[[list[int]], Batch]]:
    """Return the rig, and a function that makes a batch of examples:

    `rows` (a row each), `packed` (all in one) or `pairs`.
    """
    if form == "pairs":
        batch = make_batch("regression", LENGTHS + LENGTHS)
        rig = Rig("bert", "embedding", PAIR_TERMS, STUDENT, pooling=("mean", "cls"))
        return rig, lambda share: _paired(batch, share)
    if form == "rows":
        batch = make_batch("classification", LENGTHS)
        filler = rows(with_filler(batch, 1), [0])
        rig = Rig("bert", terms=TERMS, student=STUDENT)
        return rig, lambda share: rows(batch, share) if share else filler
    batch = make_batch("causal_lm", LENGTHS)
    documents = [Document(ids[:length].numpy()) for ids, length in zip(batch.input_ids, LENGTHS, strict=True)]
    rig = Rig("llama", "causal_lm", TERMS, STUDENT | {"num_attention_heads": 2})
    return rig, lambda share: packed_batch([[documents[row] for row in share]], 0)


def _paired(batch: Batch, share: list[int]) -> Batch:
    """Return example i as the texts i and i + 9, all first texts before all second ones."""
    if not share:
        return replace(rows(with_filler(batch, 1), [0]), pair=torch.tensor([-1]))
    own = rows(batch, share + [row + len(LENGTHS) for row in share])
    return replace(own, pair=torch.arange(len(share)).repeat(2))


def whole(form: str) -> tuple[dict, dict]:
    """Return raw values and gradients of one rank whose micro-batches hold the examples of both ranks."""
    rig, batch = _rig(form)
    _, values, gradients = rig.step(*(batch(left + right) for left, right in SHARES))
    return values, gradients


def average_over_two_ranks(folder: Path, form: str) -> tuple[dict, dict]:
    """Return the sum of the ranks' raw values and the mean of their gradients; this process is rank 0."""
    from tests.engine.launch import free_port

    port, environment = str(free_port()), os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.alignment.two_ranks", port, str(folder / "1.pt"), form]
    other = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE)
    try:
        own = _rank(0, port, form)
        _, errors = other.communicate(timeout=120)
        assert other.returncode == 0, errors.decode()[-3000:]
    finally:
        other.kill()
    found = [own, torch.load(folder / "1.pt")]
    values = {name: sum(values[name] for values, _ in found) for name in own[0]}
    return values, {name: sum(gradients[name] for _, gradients in found) / 2 for name in found[0][1]}


def _rank(rank: int, port: str, form: str) -> tuple[dict, dict]:
    """Return raw values and gradients of one rank of two."""
    rig, batch = _rig(form)
    batches = [batch(shares[rank]) for shares in SHARES]
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
    torch.save(_rank(1, sys.argv[1], sys.argv[3]), sys.argv[2])
    leave()
