"""Compute the loss of a batch from teacher, student and terms, for `dsdistill train` and for other training loops."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from dsdistill.alignment.objective import BackendError, Loss, Objective
from dsdistill.alignment.probing import check_pair
from dsdistill.alignment.terms import Pair, Shape
from dsdistill.config import Config, UserError, make_config
from dsdistill.config.schema import EMBEDDING, LANGUAGE, AttentionName, Pooling
from dsdistill.config.terms import Hidden, Terms
from dsdistill.data.batch import Batch
from dsdistill.data.inputs import as_batch
from dsdistill.models.build import NEEDED, plain_model, task_of
from dsdistill.models.settings import check_shape, setting, text_config
from dsdistill.models.trace import Geometry, Trace
from dsdistill.models.tracer import Callee, Tracer, callee, check_checkpointing

ORIGIN = "Distiller"  # begins every message about an argument
TASKS = ("classification", "regression", "causal_lm", "masked_lm", EMBEDDING)


class TermValue(NamedTuple):
    """Hold one term's value in a batch as detached tensors, so that only reading a value waits for the device."""

    raw: Tensor  # before multiplication by its weight
    weighted: Tensor
    parts: Tensor  # (parts,), one value for each mapped layer or other part, before any weight


class Output(NamedTuple):
    """Hold the result of a Distiller for a batch. It is a tuple because engines look for tensors in tuples."""

    loss: Tensor  # scalar with gradients
    terms: dict[str, TermValue]


class Distillation(nn.Module):
    """Join a student under capture, the models from which it learns, and the objective between them.

    Everything trainable is in this one module, so that the same hooks gather and save every parameter. The teacher and
    the student of the stage before are not submodules, because they are neither trained nor saved.
    """

    def __init__(
        self,
        student: Tracer,
        teacher: Tracer | None,
        objective: Objective,
        geometry: dict[int, Geometry],
        previous: Tracer | None = None,
    ):
        """Register the student and the objective.

        geometry: the geometry of each of the student's attention layers, for the counts. previous: the student as the
            stage before left it.
        """
        super().__init__()
        self.body = student.callee.module
        self.objective = objective
        self.geometry = geometry
        self._tracers = (student, teacher, previous)  # in a tuple: `body` has registered the student already
        self.register_forward_pre_hook(_tell_zero)  # runs before DeepSpeed's own hooks

    @property
    def student(self) -> Tracer:
        """Return the tracer of the student."""
        return self._tracers[0]

    @property
    def teacher(self) -> Tracer | None:
        """Return the tracer of the teacher; None if no term needs one."""
        return self._tracers[1]

    @property
    def previous(self) -> Tracer | None:
        """Return the tracer of the student as the stage before left it; None if there is none."""
        return self._tracers[2]

    @property
    def model(self) -> PreTrainedModel:
        """Return the student's transformers model."""
        return self.student.model

    def own_counts(self, batches: Sequence[Batch]) -> Tensor:
        """Return (parts of all terms,) float64: the share of this rank's micro-batches in the counts of a step."""
        return torch.stack([self.objective.counts(batch, self.geometry) for batch in batches]).sum(0)

    def counts(self, batches: Sequence[Batch]) -> Tensor:
        """Return (parts of all terms,) float64: the divisors of a step's sums, added up over the ranks.

        batches: all micro-batches of this rank's step.
        """
        counts = self.own_counts(batches)
        if _world_size() > 1:
            dist.all_reduce(counts)
        return counts

    def trace(self, batch: Batch, teacher: Trace | None = None) -> Trace:
        """Return the student's trace; `teacher` is for students whose forward pass reads the teacher."""
        return self.student(batch)

    def traces(
        self, batch: Batch, teacher: Trace | None = None
    ) -> AbstractContextManager[tuple[Trace | None, Trace | None]]:
        """Return a context that yields the traces of the teacher and of the student of the stage before.

        teacher: the teacher's trace, if it exists already.
        """
        return _traces(self.teacher, self.previous, batch, teacher)

    def loss(
        self, batch: Batch, teacher: Trace | None, counts: Tensor, previous: Trace | None = None
    ) -> Loss:
        """Return the loss of one micro-batch, divided by the `counts` of its whole step."""
        student = self.trace(batch, teacher)
        self.seen(student, batch)
        student.previous = previous
        loss = self.objective(student, teacher, batch, counts)
        # This connects the loss to the model's output: with ZeRO-3 and checkpointing, backward crashes if a loss
        # depends only on captured tensors. Only one value of each row is summed, so that fp16 cannot overflow.
        end = student.logits
        if end is None:
            assert student.output is not None  # a language model's trace has it instead of logits
            end = student.output[:, 0]
        return Loss(loss.total + 0.0 * end[:, 0].float().sum(), loss.raw)

    def seen(self, student: Trace, batch: Batch) -> None:
        """Let subclasses look at the student's trace before the terms read it; here this does nothing."""

    def forward(self, batch: Batch, counts: Tensor) -> Loss:
        """Return the loss of one micro-batch; these losses add up over all micro-batches and ranks of a step."""
        with self.traces(batch) as (teacher, previous):
            return self.loss(batch, teacher, counts, previous)


@contextlib.contextmanager
def _traces(
    teacher: Tracer | None, previous: Tracer | None, batch: Batch, made: Trace | None
) -> Iterator[tuple[Trace | None, Trace | None]]:
    with contextlib.ExitStack() as stack:
        before, guide = (
            stack.enter_context(tracer.frozen(batch, trace)) if tracer is not None else None
            for tracer, trace in ((previous, None), (teacher, made))
        )
        yield guide, before


class Distiller(Distillation):
    """Compute the distillation loss of a batch in any training loop.

        distiller = Distiller(teacher, student, terms={"task": {}, "soft_label": {"temperature": 1.0}})
        optimizer = torch.optim.AdamW(distiller.parameters())
        for batch in loader:
            out = distiller(batch)
            out.loss.backward(); optimizer.step(); optimizer.zero_grad()

    The loss is Σ_k weight_k · Σ_parts sum / count. `count` is the number of items in the part's sum (valid tokens,
    rows, predicted tokens or pairs) over all micro-batches and ranks of an optimizer step. An average of averages would
    give a token of a short batch more weight than one of a long batch. So the counts are computed first:

        counts = distiller.counts(batches)            # all micro-batches of this rank's step; the ranks add up
        for batch in batches:
            distiller(batch, counts=counts).loss.backward()

    `out.loss` is this micro-batch's share of the step's loss times the number of ranks W. Its gradient, added up over
    the micro-batches and averaged over the ranks, is the gradient of the step's loss. Plain loops, DDP and FSDP add up
    and average in this way. DeepSpeed and Accelerate also divide by the number A of micro-batches in a step, so
    multiply by A:

        engine.backward(A * distiller_engine(batch, counts=counts).loss)

    Teacher and student must not share weights. The teacher is not a submodule, but `.to()` moves it, too. `detach()`
    removes the capture from both models.

    Without `counts` a batch is a whole step. In training this step includes the batches of the other ranks; in
    evaluation (`distiller.eval()`) it does not, so that one rank may evaluate alone.
    """

    def __init__(
        self,
        teacher: PreTrainedModel | Callee | None,
        student: PreTrainedModel,
        terms: Mapping[str, Any] | Terms,
        *,
        task: str | None = None,
        distill_weight: float | None = None,
        backend: str = "auto",
        pooling: tuple[Pooling, Pooling] = ("mean", "mean"),
    ):
        """Check that the models and terms fit together, and put the student under capture.

        Args:
            teacher: a transformers model, the result of `shard_teacher`, or None if no term needs one. It is frozen
                (evaluation mode, no gradients); its type does not change.
            student: a transformers model of the same task, on its device, before it is wrapped (DDP, DeepSpeed, FSDP
                of the whole); layers may be sharded already.
            terms: settings by term name, as in a config: dicts, or objects of dsdistill.terms.
            task: classification, regression, causal_lm, masked_lm or embedding; by default it follows from the models'
                classes, except for those without a head.
            distill_weight: w; the task's weight is multiplied by 1 − w, every other term's by w.
            backend: operator backend, as train.backend.
            pooling: for the task embedding, the pooling of student and of teacher: mean, cls or last, as
                student.pooling in a config.

        Raises:
            UserError: one line for the first thing that does not fit; in this case nothing has been changed.
        """
        given = plain_model(student, f"{ORIGIN}: student")
        guide = teacher.model if isinstance(teacher, Callee) else teacher
        if guide is not None:
            guide = plain_model(guide, f"{ORIGIN}: teacher")
        task = _same_task(given, guide, task)
        config = _config(task, terms, guide is not None, distill_weight, backend)
        theirs = guide.config if guide is not None else None
        try:
            pair = replace(_pair(config, given.config, theirs), pooling=_pooling(pooling))
            objective = Objective(config.terms, pair, distill_weight)
            check_heads(objective, given, guide)
            models = {"student": given} | ({"teacher": guide} if guide is not None else {})
            implementations = {place: _attention(model) for place, model in models.items()}
            geometry = check_pair(task, given.config, theirs, (objective,), implementations=implementations)
            run = callee(student, task, "student")
        except UserError as error:
            raise error.within(ORIGIN) from None
        if not objective.needs("teacher"):
            teacher = guide = None
        if guide is not None:
            _check_apart(given, guide)
        target = next(given.parameters())
        if target.device.type != "meta":
            objective.to(target.device, target.dtype)
        student_tracer = Tracer(
            replace(run, pad=_pad(given.config)),
            objective.layers("student_hidden"),
            objective.layers("student_attention"),
            unrotated=bool(objective.needs("unrotated")),
        )
        teacher_tracer = None
        if guide is not None:
            guide.eval().requires_grad_(False)
            theirs_run = teacher if isinstance(teacher, Callee) else callee(teacher, task, "teacher")
            teacher_tracer = Tracer(
                replace(theirs_run, pad=_pad(guide.config)),
                objective.layers("teacher_hidden"),
                objective.layers("teacher_attention"),
                bool(objective.needs("values")),
                bool(objective.needs("unrotated")),
            )
        super().__init__(student_tracer, teacher_tracer, objective, geometry)

    def counts(self, batches: Sequence[Batch | Mapping[str, Any]]) -> Tensor:
        """Return (parts of all terms,) float64: the divisors of a step's sums.

        If torch.distributed is initialised, they are added up over the ranks, so every rank must call this.

        Args:
            batches: all micro-batches of this rank's step, as `forward` takes them.

        Raises:
            UserError: not a list, an empty list, or a batch that `forward` would refuse.
        """
        if isinstance(batches, Mapping | Batch) or not isinstance(batches, Sequence) or not batches:
            raise UserError(f"{ORIGIN}: counts", type(batches).__name__, "a list of a step's micro-batches")
        return super().counts([self._batch(batch) for batch in batches])

    # This returns more than Distillation.forward, so that the caller's loop can log each term.
    def forward(  # type: ignore[override]
        self, batch: Batch | Mapping[str, Any], counts: Tensor | None = None
    ) -> Output:
        """Return the loss of one micro-batch, and its terms.

        Args:
            batch: input_ids, attention_mask, labels, token_type_ids, position_ids as collators give them; see
                data.inputs.as_batch. It is moved to the student's device.
            counts: the step's counts; see the class. None: the batch is a whole step.

        Raises:
            UserError: an input has another form, or the terms need an input that is missing.
        """
        batch = self._batch(batch)
        if self.training:
            check_checkpointing(self.model, f"{ORIGIN}: student")
        everywhere = counts is not None or self.training
        if counts is None:
            counts = super().counts([batch]) if everywhere else self.own_counts([batch])
        try:
            loss = super().forward(batch, counts)
        except BackendError as error:  # some backends fail only at the first call
            raise UserError(
                f"{ORIGIN}: backend", str(error), "auto, or a backend that runs every term"
            ) from None
        ranks = _world_size() if everywhere else 1
        values = self.objective.values(ranks * loss.raw)
        return Output(ranks * loss.total, {name: TermValue(*pair) for name, pair in values.items()})

    def update(self, outputs: Sequence[Output]) -> None:
        """Update layer weights that change in training (`layer_weights: dynamic`, `layers: emd`) from a step's losses.

        Call it after each optimizer step, on every rank, with the results of `forward` for the step's micro-batches. If
        no layer weight changes in training, it does nothing. `distiller.objective.begin(steps)` sets the length of
        training; `distiller.objective.state()` and `.restore()` keep the weights over a restart.
        """
        if not self.objective.moves:
            return
        raw = torch.stack([torch.cat([term.parts for term in out.terms.values()]) for out in outputs]).sum(0)
        if _world_size() > 1:
            dist.all_reduce(raw)
            raw = raw / _world_size()
        self.objective.update(raw)

    def detach(self) -> None:
        """Remove the capture from both models. After this the Distiller makes no traces."""
        for tracer in (self.student, self.teacher):
            if tracer is not None:
                tracer.capture.detach()

    def _batch(self, batch: Batch | Mapping[str, Any]) -> Batch:
        made = as_batch(batch, self.objective.task).to(self.model.device)
        if made.labels is None and (name := self.objective.needs("labels")):
            raise UserError("batch", "no labels", f"labels, which terms.{name} reads")
        if made.pair is None and self.objective.task == EMBEDDING and "task" in self.objective.terms:
            raise UserError("batch", "no pair", "pair (B,), the number of each row's example, for terms.task")
        if made.spans is None and (name := self.objective.needs("spans")):
            raise UserError("batch", "no spans", f"spans (S, 4), which terms.{name} reads")
        return made

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if self.teacher is None:
            return self
        device, model = next(self.parameters()).device, self.teacher.model
        sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
        if not sharded and model.device != device:
            model.to(device)  # type: ignore[arg-type]  # the decorator of the library hides the arguments
        return self


def check_heads(objective: Objective, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
    """Refuse classifiers that do not fit each other or the task, so that the first batch does not fail."""
    if objective.task in LANGUAGE:
        return
    models = {"student": student} | ({"teacher": teacher} if teacher is not None else {})
    headed = set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())
    reads = {"student": objective.needs("logits"), "teacher": objective.needs("head")}
    for place, model in models.items():
        has_head = type(model).__name__ in headed
        if reads[place] and not has_head:
            got = f"class {type(model).__name__}, which has no head for terms.{reads[place]}"
            raise UserError(place, got, "a model for sequence classification")
        if has_head and setting(text_config(model.config), "pad_token_id") is None:
            raise UserError(place, "a classifier without pad_token_id", "a classifier whose config has it")
    if teacher is None or objective.task != "classification" or not objective.needs("head"):
        return
    mine, theirs = student.config.num_labels, teacher.config.num_labels
    if mine != theirs:
        raise UserError("teacher", f"{theirs} classes", f"the student's {mine}")


def _check_apart(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a teacher that shares weights with the student: freezing it would freeze the student."""
    own = {id(parameter) for parameter in student.parameters()}
    for name, parameter in teacher.named_parameters():
        if id(parameter) in own:
            got = f"one that shares {name} with the student"
            raise UserError(f"{ORIGIN}: teacher", got, "a separate model, such as copy.deepcopy(student)")


def _attention(model: PreTrainedModel) -> str:
    """Return a model's attention implementation by its name in a config; auto if a config has no name for it."""
    used = text_config(model.config)._attn_implementation
    return used if used in get_args(AttentionName) else "auto"


def _pad(config: PretrainedConfig) -> int | None:
    """Return the padding token; None if the config names none, or names one outside the vocabulary."""
    pad = setting(text_config(config), "pad_token_id")
    return pad if isinstance(pad, int) and 0 <= pad < text_config(config).vocab_size else None


def _tell_zero(module: Distillation, _) -> None:
    """Tell ZeRO-3, as a forward pre-hook, which parameters are used outside the submodule that holds them.

    DeepSpeed itself detects most such uses when they first occur, but this code does not rely on that.
    """
    unknown = [parameter for parameter in module.student.head if hasattr(parameter, "ds_id")]
    if unknown:
        from dsdistill.distributed.engines import register_external

        register_external(module, unknown)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _same_task(student: PreTrainedModel, teacher: PreTrainedModel | None, given: str | None) -> str:
    if given is not None and given not in TASKS:
        raise UserError(f"{ORIGIN}: task", given, ", ".join(TASKS))
    models = {"student": student} | ({"teacher": teacher} if teacher is not None else {})
    tasks = [task_of(model, f"{ORIGIN}: {place}", given) for place, model in models.items()]
    if len(set(tasks)) > 1:
        raise UserError(
            f"{ORIGIN}: teacher", f"a model for {tasks[1]}", f"a model for {tasks[0]}, as the student is"
        )
    return tasks[0]


def _config(
    task: str, terms: Mapping[str, Any] | Terms, teacher: bool, distill_weight: float | None, backend: str
) -> Config:
    """Validate the arguments in the same way as a config."""
    given = terms.named() if isinstance(terms, Terms) else terms
    if not isinstance(given, Mapping):
        raise UserError(f"{ORIGIN}: terms", type(terms).__name__, "a dict of terms by name")
    models: dict[str, Any] = {"student": {"config": {}}} | ({"teacher": {"config": {}}} if teacher else {})
    train = {"distill_weight": distill_weight, "backend": backend}
    # The names of columns do not matter here, because a batch itself says whether its texts are pairs.
    data = {"data": {"text": ["query", "document"]}} if task == EMBEDDING else {}
    made = make_config({"task": task, **models, **data, "terms": dict(given), "train": train}, ORIGIN)
    for name, term in made.terms.named().items():
        if isinstance(term, Hidden) and term.components is not None:
            raise UserError(
                f"{ORIGIN}: terms.{name}.components",
                f"{term.components}, which are fitted on a train set before training",
                "none, or `dsdistill train`",
            )
        if getattr(term, "layers", None) == "cka_offline":
            raise UserError(
                f"{ORIGIN}: terms.{name}.layers",
                "cka_offline, which compares the models on a train set before training",
                "[student, teacher] pairs, uniform, skip or last",
            )
    return made


def _pooling(pooling: Any) -> tuple[str, str]:
    known = get_args(Pooling)
    if not isinstance(pooling, tuple) or len(pooling) != 2 or not all(way in known for way in pooling):
        raise UserError("pooling", pooling, f"two of {', '.join(known)}, of student and teacher")
    return pooling


def _pair(config: Config, student: PretrainedConfig, teacher: PretrainedConfig | None) -> Pair:
    for place, model in (("student", student), ("teacher", teacher)):
        if model is not None:
            check_shape(model, NEEDED, place)
    shapes = [Shape.of(model) for model in (student, teacher) if model is not None]
    return Pair(
        shapes[0],
        shapes[1] if teacher is not None else None,
        config.task,
        config.train.backend,
        min(shape.vocabulary for shape in shapes),
    )
