"""Load the frozen teacher: whole on every rank, or sharded by ZeRO-3."""

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dsdistill.alignment.objective import Objective
from dsdistill.config import Config, UserError
from dsdistill.distributed import allocator, deepspeed, engines
from dsdistill.distributed.ranks import Ranks
from dsdistill.models.build import build_model, plain_model, task_of
from dsdistill.models.capture import layer_list
from dsdistill.models.tracer import Callee, Tracer, callee, count_parameters, freeze
from dsdistill.models.weights import mapped_dtype


class LazyTeacher:
    """A LazyTeacher loads the teacher of a run once, when it is first needed and before the first stage trains.

    Loading it sets torch's seed to run.seed, so code that draws random numbers later must set a seed again, as Trainer
    does. Its forward passes draw none, since dropout is off.
    """

    def __init__(
        self,
        config: Config,
        architecture: PretrainedConfig,
        objectives: Sequence[Objective],
        ranks: Ranks,
        judged: bool = False,
    ):
        """Note what to load. judged: evaluation reads its head too."""
        self.config, self.architecture, self.ranks = config, architecture, ranks
        self.needs_head = judged or any(objective.needs("head") for objective in objectives)

    @functools.cached_property
    def callee(self) -> Callee:
        """Return the model and how it is called; this rank holds all of it, or its shard."""
        section, task, device = self.config.teacher, self.config.task, self.ranks.device
        name = teacher_dtype(self.config)
        dtype = deepspeed.DTYPES[name]
        with allocator.loading(device):
            if section.zero_stage == 3:
                stored = mapped_dtype(section.path, self.architecture, task, "teacher")
                stored = self.ranks.gather(stored)[0]  # all ranks must take the same branch
                # If DeepSpeed makes the shards while loading, its settings determine their dtype.
                return _sharded(
                    functools.partial(self._load, stored or torch.float32),
                    task,
                    name,
                    section.residency,
                    section.deepspeed,
                    device,
                    mapped=stored is not None,
                )
            made = callee(self._load(dtype, device), task, "teacher")
            freeze(made.module, dtype, device)
        return made

    def _load(self, dtype: torch.dtype, device: torch.device | None = None) -> PreTrainedModel:
        torch.manual_seed(self.config.run.seed)  # matters only to a teacher without weights
        return build_model(
            self.architecture,
            self.config.teacher.path,
            self.config.task,
            "teacher",
            needs_head=self.needs_head,
            attention=self.config.teacher.attn_implementation,
            dtype=dtype,
            device=device,
        )

    def tracer(self, objectives: Sequence[Objective], hidden: Iterable[int] = ()) -> Tracer:
        """Return the tracer of the layers that the objectives read, and of the hidden states of layers `hidden`."""
        seen, attention = (
            frozenset().union(*(objective.layers(kind) for objective in objectives))
            for kind in ("teacher_hidden", "teacher_attention")
        )
        values = any(objective.needs("values") for objective in objectives)
        unrotated = any(objective.needs("unrotated") for objective in objectives)
        return Tracer(self.callee, seen.union(hidden), attention, values, unrotated)


def teacher_dtype(config: Config) -> str:
    """Return the name of the dtype that a run's teacher computes in."""
    return config.teacher.dtype or config.train.dtype


def shard_teacher(
    load: Callable[[], PreTrainedModel],
    *,
    dtype: str = "bf16",
    residency: str = "auto",
    settings: dict | None = None,
) -> Callee:
    """Return a teacher sharded over all ranks by DeepSpeed's ZeRO-3, for a Distiller in any training loop.

    Each of W ranks holds 1/W of the weights, and whole layers only while they run. Every rank must call this, and run
    the Distiller equally often. This initialises torch.distributed from the launcher's variables if nothing else has.
    If the student is under ZeRO-3 too, the parameters that it prefetches stay in memory while the teacher runs.

    Args:
        load: makes the model, such as lambda: AutoModelForCausalLM.from_pretrained(path). The weights are sharded
            while they are read.
        dtype: dtype that the teacher computes in: fp32, bf16 or fp16.
        residency: tight: a rank holds one layer besides its shard; overlap: it holds two, so that one is gathered
            while the other computes; auto: overlap on a GPU, else tight.
        settings: further settings of its DeepSpeed engine.

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
    mapped: bool = False,
) -> Callee:
    whole = None

    def make() -> nn.Module:
        nonlocal whole
        model = plain_model(load(), "teacher")
        whole = callee(model, task or task_of(model, "teacher"), "teacher")
        return whole.module

    def settings(largest: int) -> dict:
        return deepspeed.teacher_settings(dtype, residency, further, largest, device)

    parts = (deepspeed.DTYPES[dtype], device) if mapped else None
    engine = engines.shard(make, settings, largest_layer, parts)
    return Callee(whole.model, engine.module, engine, engines.gathered)


def largest_layer(module: nn.Module) -> int:
    """Return the parameter count of the largest block, sharded or not; the model's if it has no list of blocks."""
    model = getattr(module, "model", module)
    model = model if isinstance(model, PreTrainedModel) else module
    return max(map(count_parameters, layer_list(model) or [model]))
