"""Train with a DistillTrainer on one rank and on several, and with the plain loop that it must agree with.

Run by ranks: trainers.py OUT WAY... . Each way writes OUT/WAY.pt: the weights after training, and what was logged.
"""

import copy
import functools
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import SequentialSampler
from transformers import LlamaForCausalLM, TrainingArguments

from dsdistill import shard_teacher
from dsdistill.integrations import DistillTrainer
from tests.distiller import loops

STEPS, MICRO, ROWS = 3, 4, 2  # micro-batches of a step over all ranks, and rows of each
WAYS = ("ddp", "ddp-checkpointing", "ddp-compiled", "ddp-moving", "zero1", "zero2", "zero3", "zero3-sharded")


class InOrder(DistillTrainer):
    """A Trainer that takes the examples in their order."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def examples(count: int = STEPS * MICRO * ROWS) -> list[dict]:
    """Return rows of unequal lengths; the first token of some is a prompt without a label."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(count):
        ids = torch.randint(2, 60, (int(torch.randint(3, 12, (), generator=generator)),), generator=generator)
        prompt = int(torch.randint(0, 2, (), generator=generator))
        made.append({"input_ids": ids.tolist(), "labels": [-100] * prompt + ids.tolist()[prompt:]})
    return made


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    pads = [width - len(row["input_ids"]) for row in rows]
    return {
        "input_ids": torch.tensor([[0] * p + row["input_ids"] for p, row in zip(pads, rows, strict=True)]),
        "attention_mask": torch.tensor([[0] * p + [1] * (width - p) for p in pads]),
        "labels": torch.tensor([[-100] * p + row["labels"] for p, row in zip(pads, rows, strict=True)]),
    }


def expected(terms: dict, steps: int = STEPS) -> tuple[dict, list[dict]]:
    """Return weights and each step's losses of one process that takes the same rows by a Distiller's own recipe.

    Where layer weights move, "means" is what they follow.
    """
    made = loops.distiller(terms=terms)
    made.objective.begin(steps)
    optimizer = torch.optim.SGD(made.parameters(), lr=loops.RATE)
    rows, told = examples(), []
    for step in range(steps):
        first = step * MICRO * ROWS
        batches = [collate(rows[first + i * ROWS :][:ROWS]) for i in range(MICRO)]
        counts = made.counts(batches)
        outputs = [made(batch, counts=counts) for batch in batches]
        torch.stack([out.loss for out in outputs]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        made.update(outputs)
        told.append({name: float(sum(out.terms[name].raw for out in outputs)) for name in terms})
        told[-1]["loss"] = float(sum(out.loss.detach() for out in outputs))
    means = getattr(made.objective.terms["pairwise"].weighting, "mean", None)
    return loops.weights(made) | ({} if means is None else {"means": torch.tensor(means)}), told


def trainer(out: Path, terms: dict = loops.TERMS, guide=None, model=None, made=None, **given) -> InOrder:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    settings = {
        "gradient_accumulation_steps": MICRO // ranks,
        "per_device_train_batch_size": ROWS,
        "per_device_eval_batch_size": ROWS,
        "max_steps": STEPS,
        "learning_rate": loops.RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    extra = {
        name: given.pop(name) for name in ("eval_dataset", "callbacks", "compute_metrics") if name in given
    }
    args = made or TrainingArguments(str(out), **settings | given)
    guide = guide() if isinstance(guide, functools.partial) else guide or loops.teacher()
    student = (model or loops.student)()
    torch.manual_seed(3)  # for the projectors
    return InOrder(
        student, args, teacher=guide, terms=terms, train_dataset=examples(), data_collator=collate, **extra
    )


def load(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def run(way: str, out: Path) -> dict:
    kind, _, option = way.partition("-")
    given = {
        "checkpointing": {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        },
        "compiled": {"torch_compile_backend": "eager"},
    }.get(option, {})
    guide, model, stage = None, None, 0
    if kind.startswith("zero"):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled for a minute
        stage = int(kind[4:])
        given["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": 0.0,
            "zero_optimization": {
                "stage": stage,
                "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": True,  # as for any Trainer
            },
            "zero_allow_untested_optimizer": True,
        }
    if stage == 3:  # a sharded model cannot get the same random weights
        model = functools.partial(load, out / "student")
        guide = shard_teacher(functools.partial(load, out / "teacher"), dtype="fp32") if option else None
        guide = guide or functools.partial(load, out / "teacher")
    made = trainer(out / way, loops.MOVING if option == "moving" else loops.TERMS, guide, model, **given)
    made.train()
    made.save_model(str(out / way / "saved"))
    found = loops.weights(made.distiller)
    if kind == "zero3":
        with deepspeed.zero.GatheredParameters(list(made.distiller.parameters())):
            found = loops.weights(made.distiller)
    scores = made.evaluate(examples(7))
    state = made.distiller.objective.state()
    return {"weights": found, "log": made.state.log_history, "scores": scores, "state": state}


if __name__ == "__main__":
    from dsdistill.distributed.leave import leave

    folder, *ways = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    dist.init_process_group("gloo")
    for way in ways:
        found = copy.deepcopy(run(way, Path(folder)))
        if dist.get_rank() == 0:
            torch.save(found, Path(folder, f"{way}.pt"))
            print(way, "done", flush=True)
    dist.destroy_process_group()
    sys.stdout.flush()
    leave(0 if os.environ else 1)
