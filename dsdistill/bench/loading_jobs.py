"""Load one thing for the benchmark of loading, as one of several ranks: python -m dsdistill.bench.loading_jobs JOB.

A rank imports everything, meets the other ranks, prints `ready`, waits for a line, loads, and writes how long loading
took. The process that started it watches its memory from outside.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from dsdistill import disk
from dsdistill.alignment.objective import Objective
from dsdistill.config import Config
from dsdistill.distributed import deepspeed
from dsdistill.distributed.leave import leave
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.first_weights import read_student
from dsdistill.engine.module import StudentModule
from dsdistill.engine.prepare import make_pair
from dsdistill.engine.teacher import LazyTeacher
from dsdistill.models.build import architecture, build_model
from dsdistill.models.cut import cut_architecture
from dsdistill.models.slices import cut_files


def make(folder: str, settings: dict[str, Any], shards: int) -> None:
    """Save a random model in bfloat16, in about `shards` files."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=deepspeed.DTYPES["bf16"])
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=-(-size // shards))


def _config(job: dict[str, Any], path: str, stage: int) -> Config:
    return Config.model_validate(
        {
            "task": "causal_lm",
            "teacher": {"path": job["teacher"], "zero_stage": stage},
            "student": {"path": path, "zero_stage": 3},
            "train": {"dtype": "bf16", "batch_size": 2, "micro_batch_size": 1},
        }
    )


def _teacher(job: dict[str, Any], ranks: Ranks, stage: int) -> Any:
    found = architecture(job["teacher"], None, "teacher")
    return LazyTeacher(_config(job, job["teacher"], stage), found, (), ranks, judged=True).callee


def sharded(job: dict[str, Any], ranks: Ranks) -> Any:
    """Load a teacher that ZeRO-3 shards over the ranks."""
    return _teacher(job, ranks, 3)


def replicated(job: dict[str, Any], ranks: Ranks) -> Any:
    """Load a whole teacher on every rank."""
    return _teacher(job, ranks, 0)


def cut(job: dict[str, Any], ranks: Ranks) -> None:
    """Cut a student out of the teacher's files."""
    teacher, student = _student(job)
    cut_files(job["teacher"], job["student"], student, teacher, tuple(job["layers"]), "causal_lm", {})


def student(job: dict[str, Any], ranks: Ranks) -> Any:
    """Read the student that `cut` made, sharded by ZeRO-3."""
    config, init, made = _config(job, job["student"], 3), job["student"], _student(job)[1]

    def make(dtype: torch.dtype) -> StudentModule:
        model = build_model(made, init, "causal_lm", "student", needs_head=True, dtype=dtype)
        return StudentModule(
            model, *(2 * [Objective(config.terms, make_pair(config, made, None, made.vocab_size))])
        )

    return read_student(make, config, made, init, ranks)


def _student(job: dict[str, Any]) -> tuple[PretrainedConfig, PretrainedConfig]:
    teacher = architecture(job["teacher"], None, "teacher")
    return teacher, cut_architecture(teacher, tuple(job["layers"]), None, "student")


LOADS = {work.__name__: work for work in (sharded, replicated, cut, student)}


def main() -> None:
    """Run the job that the command line names."""
    job = json.loads(sys.argv[1])
    if job["kind"] == "make":
        make(job["teacher"], job["settings"], job["shards"])
        return
    ranks = deepspeed.start()
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    kept = LOADS[job["kind"]](job, ranks)
    seconds = time.perf_counter() - started
    with disk.writing(Path(job["found"]) / f"{ranks.rank}.json") as file:
        json.dump(seconds, file)
    sys.stdin.readline()  # what it keeps is measured before it ends
    del kept
    deepspeed.stop()
    leave()


if __name__ == "__main__":
    main()
