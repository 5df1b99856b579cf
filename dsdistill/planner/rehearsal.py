"""Rehearse one training step on tensors without contents, to find what a rank holds in each of its phases."""

import contextlib
import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers import PretrainedConfig

from dsdistill.alignment.objective import Objective
from dsdistill.alignment.terms import Pair
from dsdistill.config import Config
from dsdistill.config.schema import EMBEDDING, LANGUAGE, Lora, Stage
from dsdistill.data.batch import PHRASE, WORD, Batch
from dsdistill.distributed.groups import parameter_groups
from dsdistill.engine.module import make_student
from dsdistill.models.adapters import add_adapters
from dsdistill.models.build import build_model
from dsdistill.models.capture import layer_list
from dsdistill.models.probe import Keyed, keyed
from dsdistill.models.trace import Trace
from dsdistill.models.tracer import Tracer, callee, cast_parameters, count_parameters, freeze
from dsdistill.ops.common import ends_alone
from dsdistill.planner import zero_memory
from dsdistill.planner.host import TEACHER
from dsdistill.planner.ledger import Ledger
from dsdistill.planner.stand_in import few_layers

RESIDENT = "teacher, gathered layers"
TEACHER_ACTIVATIONS, TEACHER_CAPTURED = "teacher, activations", "captured, teacher's"
BEFORE = "student of the stage before"
ACTIVATIONS, CAPTURED = "student, activations", "captured, student's"
OPERATORS, BACKWARD = "operators", "backward, in passing"
PHASES = ("teacher", "forward", "terms", "backward", "reduce", "step")


@dataclass(frozen=True)
class Models:
    """Models holds the architectures of student and teacher."""

    student: PretrainedConfig
    teacher: PretrainedConfig | None
    pair: Pair
    teacher_size: int = 0  # number of its parameters


@dataclass(frozen=True)
class Rank:
    """A Rank describes a rank and what its engines hold."""

    world_size: int
    dtype: torch.dtype
    gpu: bool
    zero: zero_memory.Settings  # of the student's engine
    teacher_dtype: torch.dtype
    teacher_offloaded: bool = False
    overlap: bool = False  # a sharded teacher gathers the next layer ahead


@functools.lru_cache(maxsize=2)  # a plan rehearses with several sizes of micro-batches
def _frozen(
    architecture: Keyed,
    task: str,
    place: str,
    dtype: torch.dtype,
    implementation: str,
    hidden: frozenset[int],
    attention: frozenset[int] = frozenset(),
    values: bool = False,
    unrotated: bool = False,
    lora: Lora | None = None,
) -> Tracer:
    """Return a frozen model that makes traces."""
    config = copy.deepcopy(architecture.config)  # transformers writes into a model's config
    model = build_model(config, None, task, place, needs_head=False, attention=implementation)
    if lora is not None:
        add_adapters(model, lora, task, 0)
    made = callee(model, task, place)
    freeze(made.module, dtype, torch.device("cpu"))
    return Tracer(made, hidden, attention, values, unrotated)


def _pretence(gpu: bool) -> list:
    """Return patches that make tensors without contents look like a GPU's where that changes memory.

    A torch without CUDA cannot make tensors on a GPU. On a GPU heads in half precision are multiplied without a cast,
    and fused attention draws its dropout again in backward; on a CPU attention with dropout is not fused.
    """
    if not gpu:
        return []
    fused = functools.partial(_without_dropout, F.scaled_dot_product_attention)
    return [
        mock.patch.object(FakeTensor, "is_cuda", True),
        mock.patch.object(F, "scaled_dot_product_attention", fused),
    ]


def _without_dropout(attention, *args, **options) -> Tensor:
    return attention(*args, **options | {"dropout_p": 0.0})


def rehearse(
    config: Config,
    stage: Stage,
    models: Models,
    rank: Rank,
    batch_size: int,
    *,
    checkpointing: bool,
    whole: bool = False,
) -> Ledger:
    """Return what a rank holds in each phase of an optimizer step, with micro-batches of batch_size examples.

    Every sequence is assumed to have data.max_length tokens. whole: run all layers of deep models, and all blocks of
    operators; else a few stand for the others (planner/stand_in.py, ops/common.py).
    """
    ledger = Ledger((batch_size * config.rows, config.data.max_length))
    with ledger.fake:
        objective = Objective(stage.terms, models.pair, config.train.distill_weight)
        batch = _batch(config, batch_size)
        teacher = previous = None
        if objective.needs("teacher"):
            layers = objective.layers("teacher_hidden"), objective.layers("teacher_attention")
            kept = bool(objective.needs("values")), bool(objective.needs("unrotated"))
            used = config.teacher.attn_implementation
            teacher = _frozen(
                keyed(models.teacher), config.task, "teacher", rank.teacher_dtype, used, *layers, *kept
            )
        if objective.needs("previous"):
            layers = objective.layers("student_hidden")
            used = config.student.attn_implementation
            previous = _frozen(
                keyed(models.student),
                config.task,
                "student",
                rank.dtype,
                used,
                layers,
                lora=config.student.lora,
            )
        module = make_student(
            config,
            stage,
            models.student,
            None,
            models.pair,
            objective,
            objective,
            objective.fused,
            checkpointing=checkpointing,
        )
        cast_parameters(module, rank.dtype)
        module.train()
        counts = torch.ones(sum(term.parts for term in objective.terms.values()), dtype=torch.float64)
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        group["params"]
        for group in parameter_groups(module, objective.parameters(), config, config.train.learning_rate)
    ]
    student = zero_memory.StudentZero(
        ledger, rank.zero, groups, count_parameters(module) - sum(map(_size, trainable))
    )
    _rest(ledger, config, models, previous, rank)
    student.follow(trainable)
    with contextlib.ExitStack() as stack:
        for each in [ledger.running(), *_pretence(rank.gpu)]:
            stack.enter_context(each)
        if not whole:
            stack.enter_context(ends_alone())
            for tracer in (module.student, teacher, previous):
                if tracer is not None:
                    stack.enter_context(few_layers(ledger, tracer.model, tracer.capture))
        held, teacher_trace, before, following = 0, None, None, None
        ledger.enter("teacher", TEACHER_ACTIVATIONS)
        if teacher is not None:
            with _gathering(ledger, teacher, config, rank) as held, teacher.frozen(batch) as teacher_trace:
                pass
            ledger.give(teacher_trace.tensors(), TEACHER_CAPTURED)
            if config.teacher.overlap:
                following = _ahead(ledger, teacher, batch, rank)
        if previous is not None:
            with previous.frozen(batch) as before:
                pass
            ledger.give(before.tensors(), BEFORE)
        student.gather()
        ledger.add(RESIDENT, held)
        ledger.enter("forward", ACTIVATIONS)
        loss = _forward(ledger, module, batch, teacher_trace, before, counts)
        del teacher_trace, before
        ledger.add(RESIDENT, -held)
        student.arrived()
        ledger.enter("backward", BACKWARD)
        loss.backward()
        del loss
        ledger.enter("reduce", BACKWARD)
        student.reduce(trainable)
        ledger.enter("step", BACKWARD)
        student.step()
        del following
    return ledger


def _ahead(ledger: Ledger, teacher: Tracer, batch: Batch, rank: Rank) -> Trace:
    """Return the teacher's trace of the next micro-batch; a GPU computes it while the student learns."""
    highest = ledger.peaks["teacher"]
    with torch.no_grad():
        made = teacher(batch)
    ledger.give(made.tensors(), TEACHER_CAPTURED)
    for owner in (TEACHER_ACTIVATIONS, RESIDENT) if rank.gpu else ():
        ledger.add(owner, highest[owner])
    return made


def _forward(ledger, module, batch, teacher_trace, before, counts) -> Tensor:
    """Return the loss; the terms are a separate phase, which begins when the module calls its objective."""

    def begins(_, inputs):
        ledger.give(inputs[0].tensors(), CAPTURED)
        ledger.enter("terms", OPERATORS)

    hook = module.objective.register_forward_pre_hook(begins)
    try:
        loss, _ = module.loss(batch, teacher_trace, counts, before)
    finally:
        hook.remove()
    return loss


def _rest(ledger: Ledger, config: Config, models: Models, previous: Tracer | None, rank: Rank) -> None:
    """Add what a rank always holds besides the student's engine."""
    if models.teacher is not None:
        size = rank.teacher_dtype.itemsize * models.teacher_size
        sharded = config.teacher.zero_stage == 3
        ledger.add(TEACHER, 0 if rank.teacher_offloaded else size / (rank.world_size if sharded else 1))
    if previous is not None:
        ledger.add(BEFORE, rank.dtype.itemsize * count_parameters(previous.model))


def _batch(config: Config, size: int) -> Batch:
    tokens, pair = config.data.max_length, None
    if config.rows == 2:
        pair, size = torch.arange(2 * size) // 2, 2 * size
    ids, counted = torch.ones(size, tokens, dtype=torch.int64), None
    if config.task in LANGUAGE:
        labels = ids
        places = torch.arange(size * tokens).view(size, tokens)
        counted = (places[:, 1:] if config.task == "causal_lm" else places).flatten()
    elif config.task in ("regression", EMBEDDING):
        labels = torch.zeros(size)
    else:
        labels = torch.zeros(size, dtype=torch.int64)
    spans = None
    if config.needs_spans:
        spans = torch.tensor([[0, 0, 2, WORD], [0, 0, 2, PHRASE]]).repeat(size * max(1, tokens // 2) // 2, 1)
    return Batch(
        ids,
        torch.ones(size, tokens, dtype=torch.bool),
        labels,
        token_types=torch.zeros_like(ids),
        spans=spans,
        chance=torch.zeros(size),
        draw=torch.zeros(size, dtype=torch.int64),
        counted=counted,
        pair=pair,
    )


@contextlib.contextmanager
def _gathering(ledger: Ledger, teacher: Tracer, config: Config, rank: Rank) -> Iterator[int]:
    """Count a sharded teacher's modules as whole while they run; yield the bytes of a head kept whole for the terms."""
    if config.teacher.zero_stage != 3:
        yield 0
        return
    width = rank.teacher_dtype.itemsize
    blocks = layer_list(teacher.model) or [teacher.model]
    least = 2 * max(map(count_parameters, blocks)) if rank.overlap else 0
    hooks = []

    def arrive(size: int) -> None:
        copies = size * rank.zero.copies
        ledger.add(RESIDENT, size + copies)
        ledger.add(RESIDENT, -copies)

    for module in teacher.model.modules():
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if own:
            size = width * max(own, least)
            hooks.append(module.register_forward_pre_hook(lambda *_, n=size: arrive(n)))
            hooks.append(module.register_forward_hook(lambda *_, n=size: ledger.add(RESIDENT, -n)))
    head = width * sum(map(_size, teacher.head))
    try:
        yield head
    finally:
        for hook in hooks:
            hook.remove()


def _size(parameter: nn.Parameter) -> int:
    return parameter.numel()
