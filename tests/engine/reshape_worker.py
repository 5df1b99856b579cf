"""Save small engines and load them in other ZeRO stages, on real ranks.

deepspeed --num_gpus 2 reshape_worker.py FOLDER CONFIG.yaml[@STEP] ...
Prints one line of JSON for each case: what differs in the state after loading it and saving it again. Then does
what worker.py does, in the same processes.
"""

import json
import os

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dsdistill.config.load import make_config
from dsdistill.distributed import deepspeed, engines
from dsdistill.distributed.leave import leave
from dsdistill.distributed.shards import Shards
from tests.engine.worker import run_all, start

# Optimizer, dtype, ZeRO stage before, ZeRO stage after.
CASES = [
    ("adamw", "bf16", 1, 3),
    ("adamw", "bf16", 2, 3),
    ("adamw", "bf16", 3, 2),
    ("sgd", "fp32", 3, 1),
    ("adagrad", "fp32", 2, 3),
    ("adam", "fp32", 1, 2),
]

SOME_STAY_WHOLE = {"stage3_param_persistence_threshold": 6}  # elements; else the module would stay whole


class Module(nn.Module):
    """Module has odd sizes (ZeRO-3 pads them), a weight under two names, a frozen weight, a buffer that changes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(7, 5), nn.Linear(5, 7)
        self.frozen = nn.Linear(7, 3).requires_grad_(False)
        self.term = nn.Linear(3, 1)
        self.tied = nn.Linear(7, 5, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x):
        self.seen += 1
        x = self.second(torch.tanh(self.first(x)))
        return self.term(self.frozen(x)).float().square().mean() + self.tied(x).float().square().mean()


def engine_of(optimizer: str, dtype: str, stage: int, ranks, seed: int):
    torch.manual_seed(seed)
    module = Module()
    settings = {
        "student": {"path": "any", "zero_stage": stage, "deepspeed": {"zero_optimization": SOME_STAY_WHOLE}},
        "train": {"optimizer": optimizer, "dtype": dtype, "batch_size": ranks.world_size, "clip": 0.1}
        | {"micro_batch_size": 1, "projector_learning_rate": 0.03, "weight_decay": 0.1},
    }
    return engines.student_engine(
        module,
        list(module.term.parameters()),
        make_config(settings),
        0.01,
        ranks,
        lambda made: LambdaLR(made, lambda step: 0.9**step),
    )


def train(engine, dtype: str, ranks, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        torch.manual_seed(100 * step + ranks.rank)
        loss = engine(torch.randn(4, 7).to(deepspeed.DTYPES[dtype]))
        engine.backward(loss)
        engine.step()
        losses.append(float(ranks.sum(loss.detach().double())))
    return losses


def save(engine, folder: str, tag: str, ranks) -> Shards:
    engine.save_checkpoint(folder, tag=tag, save_latest=False, exclude_frozen_parameters=False)
    ranks.barrier()
    return deepspeed.read_shards(os.path.join(folder, tag))


def differences(left: Shards, right: Shards) -> list[str]:
    assert left.moments == right.moments and set(left.names) == set(right.names)
    found = [name for name in left.names if not torch.equal(left.weight(name), right.weight(name))]
    found += [
        f"{name}: {key}"
        for name in left.names
        if left.trained(name)
        for key in left.moments
        if not torch.equal(left.moment(name, key), right.moment(name, key))
    ]
    found += ["counts"] if left.counts != right.counts else []
    found += ["settings"] if left.settings != right.settings else []
    found += ["schedule"] if left.common["lr_scheduler"] != right.common["lr_scheduler"] else []
    return found


def reshape(folder: str, ranks) -> None:
    for optimizer, dtype, before, after in CASES:
        place = f"{optimizer}-{dtype}-{before}"
        engine = engine_of(optimizer, dtype, before, ranks, seed=0)
        train(engine, dtype, ranks, 3)
        saved = save(engine, folder, place, ranks)
        goes_on = train(engine, dtype, ranks, 3)
        other = engine_of(optimizer, dtype, after, ranks, seed=1)
        deepspeed.load_reshaped(other, os.path.join(folder, place))
        again = save(other, folder, f"{place}-{after}", ranks)
        result = {
            "case": [optimizer, dtype, before, after],
            "stages": [saved.stage, again.stage],
            "optimizer": type(engine.basic_optimizer).__name__,
            "moments": saved.moments,
            "bucket": engine.optimizer.reduce_bucket_size,
            "differences": differences(saved, again),
            "losses": [goes_on, train(other, dtype, ranks, 3)],
        }
        if ranks.first:
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    (folder, *configs), ranks = start()
    try:
        reshape(folder, ranks)
        run_all(configs, ranks)
    finally:
        deepspeed.stop()
    leave()
