"""Distil in other people's loops: plain, DDP, DeepSpeed, Accelerate and FSDP2, all with the same micro-batches.

Run by ranks: loops.py OUT LOOP... . Each loop writes OUT/LOOP.pt, the student's and projectors' weights after training.
"""

import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from dsdistill import Distiller, shard_teacher
from tests.models.families import FAMILIES, peaked

STEPS, MICRO, RATE = 3, 4, 0.02
TERMS = {
    "task": {},
    "soft_label": {"temperature": 2.0},
    "hidden": {"divergence": "cosine", "embedding": True},
    "attention": {"heads": "mean"},
    "pairwise": {"layers": "uniform"},
}
MOVING = TERMS | {
    "hidden": TERMS["hidden"] | {"layers": "emd"},
    "pairwise": TERMS["pairwise"] | {"layer_weights": "dynamic"},
}
LOOPS = (  # with several ranks
    "ddp",
    "ddp-checkpointing",
    "ddp-compiled",
    "ddp-moving",
    "zero1",
    "zero1-checkpointing",
    "zero2",
    "zero2-checkpointing",
    "zero2-compiled",
    "zero3",
    "zero3-checkpointing",
    "zero3-sharded",
    "accelerate",
    "accelerate-checkpointing",
    "fsdp2",
    "fsdp2-checkpointing",
)


def student(option: str = ""):
    torch.manual_seed(1)
    config = AutoConfig.for_model("llama", **FAMILIES["llama"] | {"hidden_size": 24, "num_hidden_layers": 2})
    model = peaked(AutoModelForCausalLM.from_config(config), 3.0).train()
    if option == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return torch.compile(model, backend="eager") if option == "compiled" else model


def teacher():
    torch.manual_seed(2)
    return peaked(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **FAMILIES["llama"])), 3.0)


def distiller(guide=None, model=None, terms=TERMS) -> Distiller:
    guide = teacher() if guide is None else guide
    model = student() if model is None else model
    torch.manual_seed(3)  # for the projectors
    return Distiller(guide, model, terms)


def micro_batches(step: int) -> list[dict]:
    """Return MICRO batches of rows of unequal lengths, padded on the left; counts differ between batches and ranks."""
    generator = torch.Generator().manual_seed(step)
    batches = []
    for index in range(MICRO):
        lengths = torch.randint(2, 9 + 3 * index, (2 + index % 2,), generator=generator)
        width = int(lengths.max())
        mask = (torch.arange(width) >= width - lengths[:, None]).long()
        ids = torch.randint(2, 60, mask.shape, generator=generator) * mask
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return batches


def own(step: int) -> list[dict]:
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return micro_batches(step)[rank::size]


def weights(module: Distiller) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def descend(module: torch.nn.Module, made: Distiller) -> dict:
    """Train `made`, or a wrapper of it (`module`), by the loop that the class's docstring shows."""
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    for step in range(STEPS):
        counts = made.counts(own(step))
        outputs = []
        for batch in own(step):  # DDP requires one's backward pass before the next forward pass
            outputs.append(module(batch, counts=counts))
            outputs[-1].loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        made.update(outputs)  # for layer weights that change, if there are any
    means = getattr(made.objective.terms["pairwise"].weighting, "mean", [])  # losses that the weights follow
    return weights(made) | ({"means": torch.tensor(means)} if means else {})


def plain(option: str) -> dict:
    made = distiller(terms=MOVING if option == "moving" else TERMS)
    return descend(made, made)


def ddp(option: str) -> dict:
    made = distiller(model=student(option), terms=MOVING if option == "moving" else TERMS)
    return descend(torch.nn.parallel.DistributedDataParallel(made), made)


def zero(stage: int, option: str) -> dict:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled for a minute
    guide = None
    if option == "sharded":
        guide = shard_teacher(lambda: AutoModelForCausalLM.from_pretrained(TEACHER), dtype="fp32")
    made = distiller(guide, student(option))
    batches = len(own(0))
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": batches,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # its default is 1
    }
    optimizer = torch.optim.SGD(made.parameters(), lr=RATE)
    engine, *_ = deepspeed.initialize(model=made, optimizer=optimizer, config=settings)
    for step in range(STEPS):
        counts = made.counts(own(step))
        for batch in own(step):
            engine.backward(batches * engine(batch, counts=counts).loss)
            engine.step()
    with deepspeed.zero.GatheredParameters(list(made.parameters()), enabled=stage == 3):
        return weights(made)


def accelerate(option: str) -> dict:
    from accelerate import Accelerator

    batches = len(own(0))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=batches)
    made = distiller(model=student(option))
    wrapped, optimizer = accelerator.prepare(made, torch.optim.SGD(made.parameters(), lr=RATE))
    for step in range(STEPS):
        counts = made.counts(own(step))
        for batch in own(step):
            with accelerator.accumulate(wrapped):
                accelerator.backward(batches * wrapped(batch, counts=counts).loss)
                optimizer.step()
                optimizer.zero_grad()
    return weights(made)


def fsdp2(option: str) -> dict:
    """Shard the layers; embeddings, head and projectors are whole, and the loop averages their gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = student(option)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    made = distiller(model=model)
    whole = [parameter for parameter in made.parameters() if not isinstance(parameter, DTensor)]
    optimizer = torch.optim.SGD(made.parameters(), lr=RATE, foreach=False)
    for step in range(STEPS):
        counts = made.counts(own(step))
        for batch in own(step):
            made(batch, counts=counts).loss.backward()
        for parameter in whole:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
    values = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in made.named_parameters()}
    return {name: value.detach().clone() for name, value in values.items()}


def run(name: str) -> dict:
    kind, _, option = name.partition("-")
    if kind.startswith("zero"):
        return zero(int(kind[4:]), option)
    return {"plain": plain, "ddp": ddp, "fsdp2": fsdp2, "accelerate": accelerate}[kind](option)


if __name__ == "__main__":
    from dsdistill.distributed.leave import leave

    out, *loops = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    TEACHER = str(Path(out, "teacher"))  # the test wrote it: sharded, it would get other random weights
    dist.init_process_group("gloo")
    for name in loops:
        found = copy.deepcopy(run(name))
        if dist.get_rank() == 0:
            torch.save(found, Path(out, f"{name}.pt"))
            print(name, "done", flush=True)
    dist.destroy_process_group()
    sys.stdout.flush()
    leave(0 if os.environ else 1)
