"""Make the module that a run trains: the distillation of one stage, and what evaluation asks of the student."""

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
from dsdistill.models.build import build_model
from dsdistill.models.domain_fusion import DomainFusion
from dsdistill.models.settings import text_config
from dsdistill.models.trace import Geometry, Trace
from dsdistill.models.tracer import Tracer, callee


class StudentModule(Distillation):
    """Add to a Distillation what a run asks of its student: domain fusion, scores, and representations of texts."""

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
        """Put the model under capture.

        evaluation: what evaluate() measures; it holds no parameters. represents: the last layer is kept for it.

        domain: what to put before the model's first layer. geometry: of the student's attention layers.
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
        self.watch: SourceLosses | None = None  # of the sources of a mixture, in steps that are logged
        self.domain = domain
        if domain is not None:
            domain.attach(model)  # after the capture: layer 0 is what comes before the fusion

    def trace(self, batch: Batch, teacher: Trace | None = None) -> Trace:
        """Return the student's trace; while training its fusion may take what the teacher knows."""
        if self.domain is None:
            return super().trace(batch)
        targets = self.domain.prepare(teacher, batch.token_chance)
        made = super().trace(batch)
        made.domain = self.domain.trace(targets, batch.mask.shape)
        return made

    def seen(self, student: Trace, batch: Batch) -> None:
        """Add up the losses of the sources, where somebody asked."""
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
        """Return the loss of a micro-batch with `counts` and `traces`; without counts what `ask` names.

        scores: (B, C) logits of classifiers and regressors; (B, D) normalised vectors of texts; (terms,) sums of the
            evaluation objective for language models, with the teacher's trace its terms too.
        mean: (B, D), packed (S, D), mean of the last layer's states over an example's tokens.
        states: (B, N, D), the states themselves.
        """
        if counts is not None:
            return self.loss(batch, teacher, counts, previous)
        student = self.trace(batch, teacher)
        if ask == "states":
            return student.hidden[self._last]
        if ask == "mean":
            return pooled(student.hidden[self._last], batch)
        if self.objective.task == EMBEDDING:
            assert student.output is not None  # a model without a head has it
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

    init: where the first weights lie (None: random). layers: of the teacher, that the student's fusion maps.
    dtype: of the weights of init. parts: teacher, previous and geometry of the StudentModule.
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
    if checkpointing:
        # Newer transformers have another name for it, 5.17 knows this one alone.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fusion = make_fusion(config, pair, layers)
    module = StudentModule(
        model, objective, evaluation, represents=bool(config.evaluation.rcs), domain=fusion, **parts
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen(name, stage.freeze))
    return module


def brings_head(config: Config) -> bool:
    """Return whether the student's weights must bring its head: new classes are usual, new words must be asked for."""
    return config.task in LANGUAGE and not config.student.new_head


def make_fusion(config: Config, pair: Pair, layers: tuple[int, ...]) -> DomainFusion | None:
    """Return the student's domain fusion as training begins with it, its maps not yet fitted; None without one."""
    domain = config.student.domain
    if domain is None:
        return None
    return DomainFusion(domain.width, pair.student.width, pair.teacher.width, layers)


def frozen(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a stage leaves this parameter of the student as it is."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def fused_layers(objectives: Iterable[Objective]) -> tuple[int, ...]:
    """Return the teacher layers that the fusion of a student maps in some stage."""
    return tuple(sorted({layer for objective in objectives for layer in objective.fused}))
