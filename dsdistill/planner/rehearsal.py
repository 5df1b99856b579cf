"""One training step, rehearsed on tensors without contents: what a rank holds in each of its phases."""

import contextlib
import functools
from collections.abc import Iterable, Iterator
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
from dsdistill.config.schema import LANGUAGE, Stage
from dsdistill.data.batch import PHRASE, WORD, Batch
from dsdistill.engine.module import StudentModule
from dsdistill.engine.prepare import frozen
from dsdistill.engine.teacher import count_parameters
from dsdistill.models.build import Headless, build
from dsdistill.models.capture import Capture, layer_list
from dsdistill.models.domain_fusion import DomainFusion
from dsdistill.models.forward import trace
from dsdistill.models.trace import Trace
from dsdistill.planner import zero_memory
from dsdistill.planner.ledger import Ledger

TEACHER, RESIDENT = "teacher, weights", "teacher, gathered layers"
TEACHER_ACTIVATIONS, TEACHER_CAPTURED = "teacher, activations", "captured, teacher's"
BEFORE = "student of the stage before"
ACTIVATIONS, CAPTURED = "student, activations", "captured, student's"
OPERATORS, BACKWARD = "operators", "backward, in passing"
PHASES = ("teacher", "forward", "terms", "backward", "reduce", "step")


@dataclass(frozen=True)
class Models:
    """What a stage trains and learns from, by architecture."""

    student: PretrainedConfig
    teacher: PretrainedConfig | None
    pair: Pair


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    world_size: int
    dtype: torch.dtype
    gpu: bool
    zero: zero_memory.Settings  # of the student's engine
    teacher_offloaded: bool = False
    overlap: bool = False  # of a sharded teacher's layers


class Frozen:
    """A model that leaves traces and learns nothing."""

    def __init__(
        self, architecture: PretrainedConfig, task: str, place: str, dtype, hidden, attention=(), values=False
    ):
        model = build(architecture, None, task, place, needs_head=False)
        model.config.use_cache = False
        self.model, self.language = model, task in LANGUAGE
        self.call = Headless(model, place) if self.language else model
        _cast(self.call.eval().requires_grad_(False), dtype)
        self.capture = Capture(model, hidden, attention, values)

    def trace(self, batch: Batch) -> Trace:
        with torch.no_grad():
            found = trace(self.call, self.model, self.capture, batch)
        if self.language:
            head = self.model.get_output_embeddings()
            found.head, found.head_bias = head.weight, head.bias
        return found


def _pretence(gpu: bool) -> list:
    """Patches under which tensors without contents pass for a GPU's, where the difference is one of memory.

    A torch without CUDA cannot make them. Heads in half precision are multiplied as they are, and attention draws
    its dropout again in backward; on a CPU it leaves the fused kernel for it.
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
    config: Config, stage: Stage, models: Models, place: Place, batch_size: int, *, checkpointing: bool
) -> Ledger:
    """What a rank holds in each phase of an optimizer step of `stage`, with micro-batches of batch_size examples.

    Every sequence is taken to be data.max_length long.
    """
    ledger = Ledger((batch_size, config.data.max_length))
    with ledger.fake:
        objective = Objective(stage.terms, models.pair, config.train.distill_weight)
        batch = _batch(config, objective, batch_size)
        teacher = previous = None
        if objective.needs_teacher:
            layers = objective.layers("teacher_hidden"), objective.layers("teacher_attention")
            values = objective.needs_values
            teacher = Frozen(models.teacher, config.task, "teacher", place.dtype, *layers, values)
        if objective.needs_previous:
            layers = objective.layers("student_hidden")
            previous = Frozen(models.student, config.task, "student", place.dtype, layers)
        module = _student(config, stage, models, objective, place.dtype, checkpointing)
        counts = torch.ones(sum(term.parts for term in objective.terms.values()), dtype=torch.float64)
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = _groups(trainable, objective)
    student = zero_memory.StudentZero(
        ledger, place.zero, groups, count_parameters(module) - sum(map(_size, trainable))
    )
    _rest(ledger, config, models, previous, place)
    student.follow(trainable)
    with contextlib.ExitStack() as stack:
        for each in [ledger.running(), *_pretence(place.gpu)]:
            stack.enter_context(each)
        held, found, before = 0, None, None
        ledger.enter("teacher", TEACHER_ACTIVATIONS)
        if teacher is not None:
            with _gathering(ledger, teacher, config, place) as held:
                found = teacher.trace(batch)
            ledger.give(_tensors(found), TEACHER_CAPTURED)
        if previous is not None:
            before = previous.trace(batch)
            ledger.give(_tensors(before), BEFORE)
        student.gather()
        ledger.add(RESIDENT, held)
        ledger.enter("forward", ACTIVATIONS)
        loss = _forward(ledger, module, batch, found, before, counts)
        del found, before
        ledger.add(RESIDENT, -held)
        student.arrived()
        ledger.enter("backward", BACKWARD)
        loss.backward()
        del loss
        ledger.enter("reduce", BACKWARD)
        student.reduce(trainable)
        ledger.enter("step", BACKWARD)
        student.step()
    return ledger


def _forward(ledger, module, batch, found, before, counts) -> Tensor:
    """The loss; the terms are a phase of their own, which begins when the module calls its objective."""

    def begins(_, inputs):
        ledger.give(_tensors(inputs[0]), CAPTURED)
        ledger.enter("terms", OPERATORS)

    hook = module.objective.register_forward_pre_hook(begins)
    try:
        loss, _ = module(batch, found, counts, before)
    finally:
        hook.remove()
    return loss


def _rest(ledger: Ledger, config: Config, models: Models, previous: Frozen | None, place: Place) -> None:
    """What lies there all the time beside what the student's engine holds."""
    if models.teacher is not None:
        with torch.device("meta"):
            size = count_parameters(build(models.teacher, None, config.task, "teacher", needs_head=False))
        sharded = config.teacher.zero_stage == 3
        ledger.add(
            TEACHER,
            0
            if place.teacher_offloaded
            else place.dtype.itemsize * size / (place.world_size if sharded else 1),
        )
    if previous is not None:
        ledger.add(BEFORE, place.dtype.itemsize * count_parameters(previous.model))


def _student(config, stage, models, objective, dtype, checkpointing: bool) -> StudentModule:
    model = build(models.student, None, config.task, "student", needs_head=False)
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fusion = None
    if config.student.domain is not None:
        mapped = objective.terms["domain"].mapped if "domain" in objective.terms else ()
        fusion = DomainFusion(
            config.student.domain.width, models.pair.student.width, models.pair.teacher.width, mapped
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen(name, stage.freeze))
    represents = bool(config.evaluation.rcs)
    module = StudentModule(model, objective, objective, represents=represents, domain=fusion)
    _cast(module, dtype)
    return module.train()


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """As model.to(dtype), which wants to swap parameters and cannot where they have no contents."""
    cast: dict[int, nn.Parameter] = {}  # tied ones stay one
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(p) not in cast:
                cast[id(p)] = nn.Parameter(p.detach().to(dtype), requires_grad=p.requires_grad)
            setattr(module, name, cast[id(p)])


def _groups(trainable: list[nn.Parameter], objective: Objective) -> list[list[nn.Parameter]]:
    """As engine.deepspeed.student_engine makes them."""
    terms = {id(parameter) for parameter in objective.parameters()}
    groups = [
        [p for p in trainable if (id(p) in terms) == own and (p.dim() > 1) == matrices]
        for own in (False, True)
        for matrices in (True, False)
    ]
    return [group for group in groups if group]


def _batch(config: Config, objective: Objective, size: int) -> Batch:
    tokens = config.data.max_length
    ids = torch.ones(size, tokens, dtype=torch.int64)
    if config.task in LANGUAGE:
        labels = ids
    elif config.task == "regression":
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
    )


@contextlib.contextmanager
def _gathering(ledger: Ledger, teacher: Frozen, config: Config, place: Place) -> Iterator[int]:
    """A sharded teacher's modules are whole while they run; yields the bytes of a head that stays so for the terms."""
    if config.teacher.zero_stage != 3:
        yield 0
        return
    width = place.dtype.itemsize
    blocks = layer_list(teacher.model) or [teacher.model]
    least = 2 * max(map(count_parameters, blocks)) if place.overlap else 0
    hooks = []

    def arrive(size: int) -> None:
        copies = size * place.zero.copies
        ledger.add(RESIDENT, size + copies)
        ledger.add(RESIDENT, -copies)

    for module in teacher.model.modules():
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if own:
            size = width * max(own, least)
            hooks.append(module.register_forward_pre_hook(lambda *_, n=size: arrive(n)))
            hooks.append(module.register_forward_hook(lambda *_, n=size: ledger.add(RESIDENT, -n)))
    head = 0
    if teacher.language:
        output = teacher.model.get_output_embeddings()
        head = width * count_parameters(output)
    try:
        yield head
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(found: Trace | None) -> Iterable[Tensor]:
    if found is None:
        return
    yield from found.hidden.values()
    for layer in found.attention.values():
        yield from (x for x in (layer.query, layer.key, layer.value) if x is not None)
    yield from (x for x in (found.logits, found.output) if x is not None)


def _size(parameter: nn.Parameter) -> int:
    return parameter.numel()
