"""Load teachers and students sharded, and print what differs from what plain transformers loads.

deepspeed --num_gpus 2 loading_worker.py FOLDER NAME@DTYPE ...

NAME: a folder with a causal language model; DTYPE: of the run. Prints one line of JSON for each.
"""

import json
import os
import sys

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM

from dsdistill.alignment.objective import Objective
from dsdistill.config.load import make_config
from dsdistill.distributed import deepspeed, engines
from dsdistill.distributed.leave import leave
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.first_weights import read_student
from dsdistill.engine.module import StudentModule
from dsdistill.engine.prepare import make_pair
from dsdistill.engine.teacher import LazyTeacher
from dsdistill.models.build import architecture, build_model

IDS = torch.tensor([[5, 9, 7, 3, 8, 2]])


def whole(model, read) -> dict[str, torch.Tensor]:
    """Return all parameters by name, each as `read` has it when it is whole."""
    found = {}
    for name, parameter in model.named_parameters():
        with engines.gathered([parameter]):
            found[name] = read(parameter).detach().clone()
    return found


def differences(found: dict, expected: dict) -> list[str]:
    assert found.keys() == expected.keys()
    return [
        name
        for name, value in found.items()
        if value.dtype != expected[name].dtype or not torch.equal(value, expected[name])
    ]


def check(path: str, dtype: str, ranks: Ranks) -> dict:
    """Return what is wrong with the teacher and the student that a run reads from a folder."""
    train = {"dtype": dtype, "batch_size": ranks.world_size, "micro_batch_size": 1, "weight_decay": 0.1}
    config = make_config(
        {
            "task": "causal_lm",
            "teacher": {"path": path, "zero_stage": 3},
            "student": {"path": path, "zero_stage": 3},
            "train": train,
        }
    )
    made = architecture(path, None, "student")
    stored = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    exact = {name: value.detach() for name, value in stored.named_parameters()}
    rounded = {name: value.to(deepspeed.DTYPES[dtype]) for name, value in exact.items()}
    teacher = LazyTeacher(config, made, (), ranks, judged=True).callee
    found = {"teacher": differences(whole(teacher.model, lambda p: p), rounded)}
    with torch.no_grad():
        logits = teacher.call(whole=True, input_ids=IDS).logits
        expected = stored.to(deepspeed.DTYPES[dtype])(input_ids=IDS).logits
    found["logits"] = (logits.float() - expected.float()).abs().max().item() / expected.std().item()

    def make(kind: torch.dtype) -> StudentModule:
        model = build_model(made, path, "causal_lm", "student", needs_head=True, dtype=kind)
        objective = Objective(config.terms, make_pair(config, made, None, made.vocab_size))
        return StudentModule(model, objective, objective)

    module = read_student(make, config, made, path, ranks)
    found["sharded"] = all(engines.is_sharded(p) for p in module.model.parameters())
    engine = engines.student_engine(module, [], config, 0.1, ranks, lambda o: LambdaLR(o, lambda _: 1.0))
    found["weights"] = differences(whole(module.model, lambda p: p), rounded)
    masters = {name: safe_get_full_fp32_param(p) for name, p in module.model.named_parameters()}
    found["masters"] = differences(masters, exact)
    found["decays"] = [group["weight_decay"] for group in engine.optimizer.param_groups]
    return found


if __name__ == "__main__":
    folder, *cases = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    ranks = deepspeed.start()
    try:
        for case in cases:
            name, _, dtype = case.partition("@")
            everyone = ranks.gather(check(os.path.join(folder, name), dtype, ranks))
            if ranks.first:
                print(json.dumps({case: everyone}), flush=True)
    finally:
        deepspeed.stop()
    leave()
