"""Make the module that a run trains: the distillation of one stage, with the outputs that evaluation reads."""

import fnmatch
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from dsdistill.alignment.by_source import SourceLosses
from dsdistill.alignment.objective import Objective
from dsdistill.alignment.terms import Pair
from dsdistill.alignment.units import pooled, unit_vectors
from dsdistill.config import Config
from dsdistill.config.schema import EMBEDDING, LANGUAGE, Stage
from dsdistill.data.batch import Batch
from dsdistill.distiller import Distillation
from dsdistill.models.adapters import add_adapters, check_names
from dsdistill.models.build import build_model
from dsdistill.models.domain_fusion import DomainFusion
from dsdistill.models.settings import text_config
from dsdistill.models.trace import Geometry, Trace
from dsdistill.models.tracer import Tracer, callee


class StudentModule(Distillation):
    """A StudentModule is a Distillation with what a run adds: domain fusion, scores, and representations of texts."""

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        evaluation: Objective,
        *,
        teacher: Tracer | None = None,
        previous: Tracer | None = None,
        geometry: dict[int, Geometry] | None = None,
        represents: bool = False,
        domain: DomainFusion | None = None,
    ):
        """Wrap the model in a Tracer, which captures the states that the terms read.

        evaluation: the objective that evaluate() measures; it has no parameters. represents: keep the last layer's
        states for it. domain: the fusion before the model's first layer. geometry: of its attention layers.
        """
        self._last = text_config(model.config).num_hidden_layers
        hidden = objective.layers("student_hidden") | ({self._last} if represents else set())
        student = Tracer(
            callee(model, objective.task, "student"),
            hidden,
            objective.layers("student_attention"),
            unrotated=bool(objective.needs("unrotated")),
        )
        super().__init__(student, teacher, objective, geometry or {}, previous)
        self.evaluation = evaluation
        self.base: frozenset[str] = (
            frozenset()
        )  # weights below adapters: they are not trained, and not saved in checkpoints
        self.watch: SourceLosses | None = None  # losses of a mixture's sources, in steps that are logged
        self.domain = domain
        if domain is not None:
            domain.attach(model)  # after the capture, so that layer 0's states are those before the fusion

    def trace(self, batch: Batch, teacher: Trace | None = None) -> Trace:
        """Return the student's trace; during training its domain fusion may read the teacher's trace."""
        if self.domain is None:
            return super().trace(batch)
        targets = self.domain.prepare(teacher, batch.token_chance)
        made = super().trace(batch)
        made.domain = self.domain.trace(targets, batch.mask.shape)
        return made

    def seen(self, student: Trace, batch: Batch) -> None:
        """Add up the losses of the sources if the step is logged."""
        if self.watch is not None:
            self.watch.add(student, batch)

    def forward(
        self,
        batch: Batch,
        counts: Tensor | None = None,
        teacher: Trace | None = None,
        previous: Trace | None = None,
        ask: str = "scores",
    ):
        """Return the loss of a micro-batch if `counts` is given, else what `ask` names.

        scores: (B, C) logits of classifiers and regressors; (B, D) normalised vectors of texts; for language models
            (terms,) sums of the evaluation objective, including terms that need the teacher's trace if it is given.
        mean: (B, D), packed (S, D), mean of the last layer's states over an example's tokens.
        states: (B, N, D), the last layer's states.
        """
        if counts is not None:
            return self.loss(batch, teacher, counts, previous)
        student = self.trace(batch, teacher)
        if ask == "states":
            return student.hidden[self._last]
        if ask == "mean":
            return pooled(student.hidden[self._last], batch)
        if self.objective.task == EMBEDDING:
            assert student.output is not None  # models without a head have it
            return unit_vectors(student.output, batch, self.objective.pooling[0])
        return student.logits if student.logits is not None else self.evaluation.sums(student, teacher, batch)


def make_student(
    config: Config,
    stage: Stage,
    architecture: PretrainedConfig,
    init: str | None,
    pair: Pair,
    objective: Objective,
    evaluation: Objective,
    layers: tuple[int, ...],
    *,
    checkpointing: bool,
    dtype: torch.dtype = torch.float32,
    **parts,
) -> StudentModule:
    """Return the module that a stage trains, on the CPU; run and planner both make it here.

    init: path of the first weights (None: random). layers: teacher layers that the student's fusion maps.
    dtype: dtype of the weights of init. parts: teacher, previous and geometry of the StudentModule.
    """
    model = build_model(
        architecture,
        init,
        config.task,
        "student",
        needs_head=brings_head(config),
        attention=config.student.attn_implementation,
        dtype=dtype,
    )
    base = adapt(model, config)
    if checkpointing:
        # Newer transformers have another name for it; 5.17 knows only this one.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fusion = make_fusion(config, pair, layers)
    module = StudentModule(
        model, objective, evaluation, represents=bool(config.evaluation.rcs), domain=fusion, **parts
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in base and not frozen(name, stage.freeze))
    prefix = _prefix(config.task)
    module.base = frozenset(f"{prefix}{name}" for name in base)
    return module


def adapt(model: PreTrainedModel, config: Config) -> frozenset[str]:
    """Put adapters into a student if its config asks for them; return the names of the weights that never train."""
    if config.student.lora is None:
        return frozenset()
    student, seed = config.student, config.run.seed
    return add_adapters(model, student.lora, config.task, seed, new_head=student.new_head)


def restore(
    config: Config, architecture: PretrainedConfig, init: str | None, saved: dict[str, Tensor], place: str
) -> PreTrainedModel:
    """Return the student, in float32 on the CPU, with the weights that a StudentModule had.

    init: path of the first weights, from which the weights below adapters come; it is not read without adapters.
    saved: the StudentModule's weights by name. place: where they are from, for messages.
    """
    adapted, task = config.student.lora is not None, config.task
    model = build_model(
        architecture,
        init if adapted else None,
        task,
        "student",
        needs_head=False,
        attention=config.student.attn_implementation,
    )
    base = adapt(model, config)
    weights = within(saved, _prefix(task))
    if adapted:
        check_names(model, weights, base, place)
    model.load_state_dict(weights, strict=not adapted)
    return model


def _prefix(task: str) -> str:
    """Return the prefix of the names of the model's weights in a StudentModule."""
    return "body.model." if task in LANGUAGE else "body."


def within(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights whose names begin with the prefix, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def brings_head(config: Config) -> bool:
    """Return whether the student's files must contain its head: for language models, unless student.new_head."""
    return config.task in LANGUAGE and not config.student.new_head


def make_fusion(config: Config, pair: Pair, layers: tuple[int, ...]) -> DomainFusion | None:
    """Return the student's domain fusion before its maps are fitted; None without one."""
    domain = config.student.domain
    if domain is None:
        return None
    return DomainFusion(domain.width, pair.student.width, pair.teacher.width, layers)


def frozen(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a stage freezes this parameter of the student."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def fused_layers(objectives: Iterable[Objective]) -> tuple[int, ...]:
    """Return the teacher layers that the fusion of a student maps in some stage."""
    return tuple(sorted({layer for objective in objectives for layer in objective.fused}))
