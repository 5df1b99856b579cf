"""Estimate the memory, disk space and time of a run before anything is loaded, for `dsdistill plan`.

planner/rehearsal.py runs the step on tensors without contents. planner/zero_memory.py computes
DeepSpeed's part by formulas, and planner/host.py and planner/duration.py the rest. Architectures come from the models'
`config:` if their files are not on this machine; data, tokenizers and weights are not read.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from dsdistill.config import Config, UserError
from dsdistill.config.bounded import GIB, parse_size
from dsdistill.config.checks import check_ranks
from dsdistill.config.load import recipe_of
from dsdistill.config.schema import LANGUAGE, Stage
from dsdistill.distributed import deepspeed
from dsdistill.engine.prepare import (
    make_pair,
    objective_layers,
)
from dsdistill.engine.resolve import student_architecture
from dsdistill.engine.teacher import teacher_dtype
from dsdistill.models.build import architecture, for_task, override
from dsdistill.models.settings import setting, text_config
from dsdistill.planner import host, zero_memory
from dsdistill.planner.duration import Duration, duration, operations
from dsdistill.planner.rehearsal import ACTIVATIONS, CAPTURED, PHASES, Models, Rank, rehearse
from dsdistill.planner.sizes import size_of, trained

log = logging.getLogger("dsdistill")

# CUDA's context and libraries, NCCL's buffers and what the caching allocator cannot reuse: a guess, not measured.
RESERVE = 2 * GIB
REHEARSED = 32768
LOADING = "loading"


@dataclass(frozen=True)
class Plan:
    """A Plan holds the bytes that a run needs, mostly per rank.

    phases: bytes by owner at the highest moment of each phase of `stage`, the stage that needs the most.
    instead: bytes of activations with and without checkpointing, and of tensors that the operators avoid.
    node: bytes of a node's host memory, by moment of the run and owner (planner/host.py). disk: bytes of the run's
    folder. time: that of `stage`; None if no speed is known.
    largest: most examples of a micro-batch that fit; 0: not even one fits, which needs `least`.
    """

    stage: str
    phases: dict[str, Counter]
    instead: dict[str, int]
    reserve: int
    largest: int
    least: int  # smallest need of the micro-batches that were rehearsed
    node: dict[str, Counter]
    disk: dict[str, int]
    time: Duration | None

    @property
    def host(self) -> int:
        """Return the bytes of a node's host memory at the highest moment."""
        return peak(self.node)

    @property
    def highest(self) -> str:
        return max(self.phases, key=lambda phase: self.phases[phase].total())

    @property
    def peak(self) -> int:
        """Return the bytes of a rank at the highest moment, without the reserve."""
        return peak(self.phases)


def parse_memory(text: str, option: str = "--gpu-memory") -> int:
    """Return the bytes of a text such as 80GiB; raise UserError for anything else."""
    if (size := parse_size(text)) is None:
        raise UserError(option, repr(text), "a size such as 80GiB or 40000MiB")
    return size


class Forecast:
    """A Forecast rehearses one config on a number of ranks; it first refuses parts that do not fit together."""

    def __init__(self, config: Config, world_size: int, *, gpu: bool):
        """Check that the config's parts fit together. gpu: ranks are GPUs, else processes on CPUs."""
        if world_size < 1:
            raise UserError("--world-size", world_size, "1 or more")
        check_ranks(config.train, config.run_stages, config.data.sampler, world_size)
        deepspeed.check_settings(config, world_size)
        self.config, self.world_size, self.gpu = config, world_size, gpu
        self.models = _models(config, gpu)
        # This checks that layers and heads fit together.
        self.objectives = objective_layers(config, self.models.student, self.models.teacher)
        self.rank = _rank(config, world_size, gpu)
        self.teacher = size_of(self.models.teacher, config.task) if self.models.teacher is not None else None
        self.student = size_of(self.models.student, config.task, config.student)
        stages = zip(config.run_stages, self.objectives, strict=True)
        most = max(trained(self.student, stage, objective) for stage, objective in stages)
        self.parts = host.Parts(self.teacher, self.student, most)
        self._loading = host.loading(config, self.parts, world_size, gpu=gpu)

    def node(self, ranks: int, peak: int) -> dict[str, Counter]:
        """Return the bytes of a node's host memory, by moment of the run; peak: bytes of a rank in a step."""
        return host.node_memory(self.config, self.parts, self.rank.zero, peak, ranks, gpu=self.gpu)

    def time(self, stage: Stage, rate: float) -> Duration:
        """Return how long the steps take if all are of `stage`; rate: operations per second of a rank."""
        objective = self.objectives[[of.name for of in self.config.run_stages].index(stage.name)]
        theirs = (self.models.teacher, self.teacher) if self.teacher is not None else None
        needed = operations(self.config, theirs, (self.models.student, self.student), objective)
        return duration(self.config, needed, self.world_size, rate)

    def phases(self, stage: Stage, size: int, checkpointing: bool) -> dict[str, Counter]:
        """Return bytes by owner at the highest moment of each phase, with micro-batches of `size`."""
        log.info("rehearsing a step of stage %s with micro-batches of %d examples", stage.name, size)
        accumulates = size * self.world_size < self.config.train.batch_size
        rank = dataclasses.replace(
            self.rank, zero=dataclasses.replace(self.rank.zero, accumulates=accumulates)
        )
        ledger = rehearse(self.config, stage, self.models, rank, size, checkpointing=checkpointing)
        loading = {LOADING: self._loading} if self._loading else {}
        return loading | {phase: ledger.peaks[phase] for phase in PHASES}

    def stages(self, size: int) -> dict[str, dict[str, Counter]]:
        """Return the phases of every stage by its name, as the config says but with micro-batches of `size`."""
        checkpointing = self.config.student.gradient_checkpointing
        return {stage.name: self.phases(stage, size, checkpointing) for stage in self.config.run_stages}


def peak(phases: dict[Hashable, Counter]) -> int:
    return max(phase.total() for phase in phases.values())


def make_plan(
    config: Config,
    world_size: int,
    memory: int,
    *,
    gpu: bool = True,
    ranks_per_node: int | None = None,
    rate: float | None = None,
) -> Plan:
    """Return the plan of a config.

    memory: bytes that a rank may take. ranks_per_node: by default all, but at most 8. rate: operations per second that
    a rank achieves; None: not known. Raises UserError for a config whose parts do not fit together.
    """
    forecast = Forecast(config, world_size, gpu=gpu)
    ranks = min(world_size, 8) if ranks_per_node is None else ranks_per_node
    if not 1 <= ranks <= world_size:
        raise UserError("--ranks-per-node", ranks, f"1 to {world_size}")
    size, checkpointing = config.train.micro_batch_size, config.student.gradient_checkpointing
    stages = forecast.stages(size)
    stage = max(config.run_stages, key=lambda stage: peak(stages[stage.name]))
    phases = stages[stage.name]
    reserve = RESERVE if gpu else 0
    kept = {checkpointing: _kept(phases)}
    kept[not checkpointing] = _kept(forecast.phases(stage, size, not checkpointing))
    instead = {
        "student, activations without checkpointing": kept[False],
        "student, activations with checkpointing": kept[True],
        **_materialised(config, forecast.models, stage, size),
    }
    at = {size: stages}

    def need(batch: int) -> dict[tuple[str, str], Counter]:
        """Return bytes by stage and phase: which stage needs the most may change with the batch."""
        if batch not in at:
            at[batch] = forecast.stages(batch)
        return {
            (name, phase): held for name, by_phase in at[batch].items() for phase, held in by_phase.items()
        }

    largest = _largest(need, size, memory - reserve, config.data.max_length)
    least = min(peak(need(batch)) for batch in (list(at) if largest else [1]))
    return Plan(
        stage.name,
        phases,
        instead,
        reserve,
        largest,
        least + reserve,
        forecast.node(ranks, peak(phases)),
        host.disk_space(config, forecast.parts, forecast.rank.zero),
        forecast.time(stage, rate) if rate is not None else None,
    )


def _models(config: Config, gpu: bool) -> Models:
    teacher = None
    if config.teacher is not None:
        teacher = _teacher(config)
    student = student_architecture(config.student, teacher)
    labels = config.data.labels or ("0", "1")  # the data has the true number, which hardly matters here
    for model in (student, teacher):
        if model is not None:
            for_task(model, config.task, labels, setting(text_config(model), "pad_token_id") or 0)
    tokens = min(text_config(model).vocab_size for model in (student, teacher) if model is not None)
    pair = make_pair(config, student, teacher, tokens)
    if gpu:  # `auto` uses it on GPUs without measurements; no kernel needs more memory
        pair = dataclasses.replace(pair, backend="chunked")
    size = size_of(teacher, config.task).total if teacher is not None else 0
    return Models(student, teacher, pair, size)


def _teacher(config: Config) -> PretrainedConfig:
    given = config.teacher.config
    if (
        config.teacher.path is None
        and config.teacher.recipe is not None
        and "model_type" not in (given or {})
    ):
        recipe = recipe_of(config)
        return override(student_architecture(recipe.student, None), given or {}, "teacher")
    return architecture(config.teacher.path, given, "teacher")


def _rank(config: Config, world_size: int, gpu: bool) -> Rank:
    dtype = deepspeed.DTYPES[config.train.dtype]
    device = torch.device("cuda" if gpu else "cpu")
    student = deepspeed.zero_section(deepspeed.student_settings(config, world_size))
    teacher = None
    if config.teacher is not None and config.teacher.zero_stage == 3:
        teacher = deepspeed.zero_section(
            deepspeed.teacher_settings(
                teacher_dtype(config), config.teacher.residency, config.teacher.deepspeed, 1, device
            )
        )
    return Rank(
        world_size=world_size,
        dtype=dtype,
        gpu=gpu,
        zero=zero_memory.Settings(
            stage=int(student.stage),
            world_size=world_size,
            width=dtype.itemsize,
            optimizer=config.train.optimizer,
            bucket=student.reduce_bucket_size,
            # At stage 3 reduction and backward share one bucket.
            buffers=2 if student.overlap_comm and student.stage < 3 else 1,
            live=student.max_live_parameters,
            prefetch=student.prefetch_bucket_size,
            offloaded=_offloaded(student.offload_optimizer),
            accumulates=False,  # `phases` sets this for each size of micro-batch
            lazy=not gpu,
        ),
        teacher_dtype=deepspeed.DTYPES[teacher_dtype(config)] if config.teacher is not None else dtype,
        teacher_offloaded=teacher is not None and _offloaded(teacher.offload_param),
        overlap=teacher is not None and teacher.max_live_parameters > 0,
    )


def _offloaded(section) -> bool:
    return section is not None and section.device != "none"


def _kept(phases: dict[str, Counter]) -> int:
    """Return the bytes that a forward pass leaves for backward and the terms."""
    return phases["terms"][ACTIVATIONS] + phases["terms"][CAPTURED]


def _materialised(config: Config, models: Models, stage: Stage, size: int) -> dict[str, int]:
    """Return the bytes of one copy, in train.dtype, of each tensor that the operators avoid."""
    width, tokens = deepspeed.DTYPES[config.train.dtype].itemsize, config.data.max_length
    pair, sizes = models.pair, {}
    (objective,) = objective_layers(
        config.model_copy(update={"stages": (stage,)}), models.student, models.teacher
    )
    maps = sum(
        len(objective.layers(f"{name}_attention")) * shape.heads
        for name, shape in (("student", pair.student), ("teacher", pair.teacher))
        if shape is not None
    )
    if maps:
        sizes["attention maps of the mapped layers"] = width * size * config.rows * maps * tokens**2
    if config.task in LANGUAGE:
        entries = sum(shape.vocabulary for shape in (pair.student, pair.teacher) if shape is not None)
        sizes["logits"] = width * size * tokens * entries
    return sizes


def _largest(need: Callable[[int], dict[tuple[str, str], Counter]], size: int, room: int, tokens: int) -> int:
    """Return the largest micro-batch that fits, 0 if none; size: the first to try, tokens: of a sequence.

    Beyond REHEARSED tokens, where rehearsing takes minutes, memory is extrapolated as a straight line with the slope of
    the phase that grows fastest there. In small batches, the constant part would hide that growth.
    """
    high = max(2 * size, REHEARSED // tokens)
    low = max(size, high // 2)
    if peak(need(size)) > room:
        if size == 1 or peak(need(1)) > room:
            return 0
        low, high = 1, size
    elif peak(need(high)) <= room:
        small, large = need(low), need(high)
        slope = max(large[key].total() - small[key].total() for key in large) / (high - low)
        return high + int((room - peak(large)) / slope)
    elif peak(need(low)) > room:
        low, high = size, low
    while high - low > 1:
        rise = (peak(need(high)) - peak(need(low))) / (high - low)
        guess = low + int((room - peak(need(low))) / rise)
        guess = min(max(guess, low + 1), high - 1)
        for batch in (guess, guess + 1):  # growth is almost linear, so the next size often ends the search
            if batch < high and peak(need(batch)) <= room:
                low = batch
            else:
                high = batch
                break
    return low
