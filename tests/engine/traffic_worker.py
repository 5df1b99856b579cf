"""Count what every rank sends in one optimizer step, by caller and collective.

deepspeed --num_gpus 2 traffic_worker.py OUT.json CONFIG.yaml ...
"""

# ruff: noqa: E402

import contextlib
import functools
import json
import sys
import time

import torch
import torch.distributed as dist

# Name of a collective → which argument holds the whole: what all ranks' parts are gathered into or scattered from.
COLLECTIVES = {
    "all_reduce": 0,
    "all_gather": 0,
    "all_gather_into_tensor": 0,
    "reduce_scatter": 1,
    "reduce_scatter_tensor": 1,
    "broadcast": 0,
    "reduce": 0,
    "all_to_all_single": 0,
}
phase, inside, sent = "student", False, {}


def counted(name, function):
    @functools.wraps(function)
    def call(*arguments, **options):
        global inside
        if inside:  # some collectives call others
            return function(*arguments, **options)
        tensors = [*arguments, *options.values()][COLLECTIVES[name]]
        size = sum(t.nbytes for t in (tensors if isinstance(tensors, list) else [tensors]))
        sent.setdefault(f"{phase} {name}", []).append(size)
        inside = True
        try:
            return function(*arguments, **options)
        finally:
            inside = False

    return call


for collective in COLLECTIVES:  # before deepspeed is imported: it keeps the functions it finds
    setattr(dist, collective, counted(collective, getattr(dist, collective)))

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from dsdistill.config import load
from dsdistill.distiller import Distillation
from dsdistill.distributed import deepspeed
from dsdistill.distributed.leave import leave
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.prepare import prepare
from dsdistill.engine.teacher import LazyTeacher
from dsdistill.engine.train import Trainer
from dsdistill.models.tracer import count_parameters


@contextlib.contextmanager
def during(name):
    global phase
    before, phase = phase, name
    try:
        yield
    finally:
        phase = before


def measure(path: str, ranks: Ranks) -> dict:
    config = load([path])
    prepared = prepare(config, ranks.world_size)
    loaded = LazyTeacher(prepared.config, prepared.teacher, prepared.objectives, ranks)
    teacher = loaded.tracer(prepared.objectives)
    trainer = Trainer(prepared, 0, config.student.path, None, teacher, None, ranks)
    trainer.engine.train()
    trainer._saved = time.monotonic()  # else a checkpoint would be due
    gathers, beside = teacher.frozen, []

    @contextlib.contextmanager
    def trace(batch, made=None):
        if config.student.zero_stage == 3:  # weights that are gathered or being gathered
            parameters = trainer.module.parameters()
            beside.append(sum(p.ds_numel for p in parameters if p.ds_status != ZeroParamStatus.NOT_AVAILABLE))
        with contextlib.ExitStack() as stack:
            with during("teacher"):
                found = stack.enter_context(gathers(batch))
            yield found

    teacher.frozen = trace
    for step in range(2):  # in the first step ZeRO-3 learns the order of the layers
        sent.clear()
        trainer._timed_step(trainer.loader.step(0, step))
    sizes = {
        "teacher": count_parameters(teacher.model),
        "student": count_parameters(trainer.module),
        "head": sum(parameter.ds_numel for parameter in teacher.head),
    }
    found = {name: list(sizes) for name, sizes in sent.items()}
    return {
        "sent": found,
        "sizes": sizes,
        "beside": beside,
        "parts": sum(t.parts for t in trainer.module.objective.terms.values()),
    }


if __name__ == "__main__":
    out, *paths = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    group = deepspeed.start()
    Ranks.sum = during("ours")(Ranks.sum)
    Distillation.counts = during("ours")(Distillation.counts)
    try:
        everything = [measure(path, group) for path in paths]
        if group.first:
            with open(out, "w") as file:
                json.dump(everything, file)
        torch.distributed.barrier()
    finally:
        deepspeed.stop()
    leave()
