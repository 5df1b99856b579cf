"""The frozen teacher: whole on every rank, or sharded by ZeRO-3."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dsdistill.alignment.objective import Objective
from dsdistill.config import Config, UserError
from dsdistill.distributed import deepspeed
from dsdistill.distributed.ranks import Ranks
from dsdistill.models.build import build_model, plain_model, task_of
from dsdistill.models.capture import layer_list
from dsdistill.models.tracer import Callee, Tracer, callee, count_parameters, freeze


def load_teacher(
    config: Config,
    architecture: PretrainedConfig,
    objectives: Sequence[Objective],
    ranks: Ranks,
    hidden: Iterable[int] = (),
    judged: bool = False,
) -> Tracer:
    """Return the teacher of a run; it draws no random number (dropout is off).

    hidden: layers to trace beside those that the objectives read. judged: its head is read by evaluation too.
    """
    needs_head = judged or any(objective.needs("head") for objective in objectives)

    def load() -> PreTrainedModel:
        torch.manual_seed(config.run.seed)  # matters only to a teacher without weights
        return build_model(
            architecture,
            config.teacher.path,
            config.task,
            "teacher",
            needs_head=needs_head,
            attention=config.teacher.attn_implementation,
        )

    if config.teacher.zero_stage == 3:
        section = config.teacher
        made = _sharded(
            load, config.task, config.train.dtype, section.residency, section.deepspeed, ranks.device
        )
    else:
        made = callee(load(), config.task, "teacher")
        freeze(made.module, deepspeed.DTYPES[config.train.dtype], ranks.device)
    seen, attention = (
        frozenset().union(*(objective.layers(kind) for objective in objectives))
        for kind in ("teacher_hidden", "teacher_attention")
    )
    values = any(objective.needs("values") for objective in objectives)
    unrotated = any(objective.needs("unrotated") for objective in objectives)
    return Tracer(made, seen.union(hidden), attention, values, unrotated)


def shard_teacher(
    load: Callable[[], PreTrainedModel],
    *,
    dtype: str = "bf16",
    residency: str = "auto",
    settings: dict | None = None,
) -> Callee:
    """Return a teacher sharded over all ranks by DeepSpeed's ZeRO-3, for a Distiller in any training loop.

    Each rank holds 1/W of the weights, and whole layers only while they run. Every rank must call this, and run
    the Distiller equally often. Where torch.distributed is not up yet it is started, as the launcher's variables say.
    Beside a student under ZeRO-3 a Distiller's teacher runs while what the student prefetches is there.

    Args:
        load: makes the model, such as lambda: AutoModelForCausalLM.from_pretrained(path). The weights are sharded
            while they are read.
        dtype: fp32, bf16 or fp16, what the teacher computes in.
        residency: tight, a rank holds one layer beside its shard; overlap, two, so that gathering hides behind
            compute; auto, overlap on a GPU.
        settings: further ones of its DeepSpeed engine.

    Raises:
        UserError: a setting that does not exist, or a model that is not one of transformers.
    """
    for name, value, known in (
        ("dtype", dtype, tuple(deepspeed.DTYPES)),
        ("residency", residency, ("auto", "tight", "overlap")),
    ):
        if value not in known:
            raise UserError(f"shard_teacher: {name}", value, ", ".join(known))
    return _sharded(load, None, dtype, residency, settings or {}, deepspeed.join())


def _sharded(
    load: Callable[[], PreTrainedModel],
    task: str | None,
    dtype: str,
    residency: str,
    further: dict,
    device: torch.device,
) -> Callee:
    whole = None

    def make() -> nn.Module:
        nonlocal whole
        model = plain_model(load(), "teacher")
        whole = callee(model, task or task_of(model, "teacher"), "teacher")
        return whole.module

    def settings(largest: int) -> dict:
        return deepspeed.teacher_settings(dtype, residency, further, largest, device)

    engine = deepspeed.shard(make, settings, largest_layer)
    return Callee(whole.model, engine.module, engine, deepspeed.gathered)


def largest_layer(module: nn.Module) -> int:
    """Return the parameters of the largest block, sharded or not; of the model where it has no list of them."""
    model = getattr(module, "model", module)
    model = model if isinstance(model, PreTrainedModel) else module
    return max(map(count_parameters, layer_list(model) or [model]))
