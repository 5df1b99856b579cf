"""Provide a Trainer of the transformers library whose loss is a distillation loss."""

import contextlib
import inspect
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils.generic import can_return_loss, find_labels

from dsdistill import disk
from dsdistill.alignment.objective import Objective
from dsdistill.alignment.terms import Pair, Shape
from dsdistill.config import UserError, make_config
from dsdistill.config.schema import EMBEDDING, Pooling
from dsdistill.config.terms import Terms
from dsdistill.distiller import Distiller, Output, check_heads
from dsdistill.distributed.deepspeed import DTYPES
from dsdistill.distributed.engines import is_sharded
from dsdistill.engine.teacher import shard_teacher
from dsdistill.models.tracer import Callee, Tracer

ORIGIN = "DistillTrainer"  # begins every message about an argument
# Files that a checkpoint holds besides the student: the projectors, and the layer weights that change in training.
PROJECTORS, MOVING = "distillation.safetensors", "distillation.json"
# Inputs that a Distiller or a collator reads besides those of the student's own forward pass.
INPUTS = (
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "seq_idx",
    "cu_seq_lens_q",
    "spans",
    "pair",
    "seq_lengths",
)
REFUSED = {
    "model_init": "the student itself, since a search over settings would need a new teacher and new terms too",
    "compute_loss_func": "terms, which are the loss",
}


class _Student(Distiller):
    """Be the module that a Trainer trains: a Distiller that looks like its student to the Trainer."""

    accepts_loss_kwargs = True  # so that a Trainer does not divide the loss by the number of micro-batches

    def __init__(self, teacher: Any, student: PreTrainedModel, terms: Any, **given: Any):
        super().__init__(teacher, student, terms, **given)
        self.distance = (
            None if self.teacher is None else _distance(self.objective.task, self.teacher, self.model)
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_tracers" not in self.__dict__:  # it is still being built
                raise
            return getattr(self._tracers[0].model, name)

    # Engines wrap only a module's forward, so this one method returns the three results that a Trainer needs.
    def forward(self, batch: Mapping[str, Any], counts: Tensor | None = None, wanted: str = "loss") -> Any:
        """Return a batch's loss, the student's own outputs, or the sums of an evaluation, as `wanted` says."""
        if wanted == "outputs":
            return self.model(**batch)
        if wanted == "sums":
            return self._sums(batch)
        return super().forward(batch, counts)

    def _sums(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return (2, parts) float64: each part's sum over the batch, and its divisor.

        The parts are those of all terms and, if there is a distance, the KL to the teacher.
        """
        batch = self._batch(inputs)
        with self.traces(batch) as (teacher, previous):
            student = self.trace(batch, teacher)
            student.previous = previous
            objectives = [part for part in (self.distance, self.objective) if part is not None]
            counts = [part.counts(batch, self.geometry) for part in objectives]
            sums = [
                part(student, teacher, batch, torch.ones_like(count)).raw
                for part, count in zip(objectives, counts, strict=True)
            ]
        return torch.stack([torch.cat(sums[::-1]).double(), torch.cat(counts[::-1])])

    def values(self, sums: Tensor, counts: Tensor) -> dict[str, float]:
        """Return the unweighted value of each term over a set, and `kl` if there is a distance."""
        parts = (sums / counts.masked_fill(counts == 0, math.nan)).float()
        own = sum(term.parts for term in self.objective.terms.values())
        found = {name: float(value[0]) for name, value in self.objective.values(parts[:own]).items()}
        return found if self.distance is None else found | {"kl": float(parts[own])}


def _distance(task: str, teacher: Tracer, student: PreTrainedModel) -> Objective | None:
    """Return the objective that measures KL(teacher‖student) in nats; None if a model has no head for it."""
    if task == EMBEDDING:
        return None
    terms = make_config(
        {
            "task": task,
            "student": {"config": {}},
            "teacher": {"config": {}},
            "terms": {"soft_label": {"temperature": 1.0}},
        },
        ORIGIN,
    ).terms
    shapes = Shape.of(student.config), Shape.of(teacher.model.config)
    made = Objective(terms, Pair(*shapes, task, "auto", min(shape.vocabulary for shape in shapes)))
    try:
        check_heads(made, student, teacher.model)
    except UserError:
        return None
    return made


class _Steps(TrainerCallback):
    """Tell layer weights when training begins and when an optimizer step ends."""

    def __init__(self, trainer: "DistillTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin_training(state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.end_step()


class DistillTrainer(Trainer):
    """Train a student against a teacher, by the Trainer of the transformers library.

        trainer = DistillTrainer(
            student,
            TrainingArguments("out", gradient_accumulation_steps=4, bf16=True),
            teacher=teacher,
            terms={"task": {}, "soft_label": {"temperature": 1.0}, "hidden": {}},
            train_dataset=..., eval_dataset=..., processing_class=tokenizer,
        )
        trainer.train()
        trainer.save_model("student")  # a plain model for from_pretrained

    The loss is that of a `Distiller`: every term divides by counts over all micro-batches and ranks of an optimizer
    step, so that accumulation and data parallelism do not change it. The value of each term is logged under its name.
    Evaluation adds two kinds of metrics to a Trainer's own: `eval_TERM`, each term's value over the set, and `eval_kl`,
    the mean KL(teacher‖student) in nats, per example or token. A sampler may repeat samples to give all ranks the same
    number; these metrics leave the repeated samples out.

    Data sets and collators are those of a Trainer; `data.inputs.as_batch` lists what a Distiller reads. Chat sets with
    masked labels and batches without padding (`position_ids` that restart at 0) need no change.

    DeepSpeed: create TrainingArguments(deepspeed=...) before the student, as for any Trainer. A teacher that is loaded
    after arguments with ZeRO-3 is sharded like the student; `dsdistill.shard_teacher` shards a teacher with any
    arguments. FSDP is refused, because it has not been tried.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        args: TrainingArguments | None = None,
        *,
        teacher: PreTrainedModel | Callee | None,
        terms: Mapping[str, Any] | Terms,
        task: str | None = None,
        distill_weight: float | None = None,
        backend: str = "auto",
        pooling: tuple[Pooling, Pooling] = ("mean", "mean"),
        **trainer: Any,
    ):
        """Join student and teacher, and set the Trainer up.

        Args:
            student: a transformers model; `save_model` writes it.
            args: as for a Trainer.
            teacher, terms, task, distill_weight, backend, pooling: as for a Distiller.
            trainer: everything else that a Trainer takes: train_dataset, eval_dataset, data_collator,
                processing_class, compute_metrics, callbacks, optimizers, preprocess_logits_for_metrics and so on.

        Raises:
            UserError: one line for the first thing that does not fit.
        """
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else args
        _check(args, trainer)
        own = student  # only this is compiled, if requested: the operators are compiled already
        if args.torch_compile:
            own = torch.compile(student, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        module = _Student(
            _gathering(teacher),
            own,
            terms,
            task=task,
            distill_weight=distill_weight,
            backend=backend,
            pooling=pooling,
        )
        self.distiller = module
        self._accepts = _accepts_loss_kwargs(student)
        self._outputs: list[Output] = []  # of the current step
        self._terms: dict[str, Tensor] = {}  # summed since the last log
        self._steps = 0
        self._seen: Tensor | None = None  # sums and counts of the current evaluation
        self._restored: dict[str, dict] | None = None
        super().__init__(module, args, **trainer)
        self.add_callback(_Steps(self))
        self.can_return_loss = can_return_loss(type(student))
        if args.label_names is None:
            self.label_names = find_labels(type(student))

    # --- the loss ---------------------------------------------------------------------------------------------

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        return super()._build_accelerator_args(**kwargs) | {"dynamo_plugin": TorchDynamoPlugin(backend="no")}

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            of_model = inspect.signature(type(self.distiller.model).forward).parameters
            names = [*of_model, *INPUTS, "label", "label_ids", *self.label_names]
            self._signature_columns = list(dict.fromkeys(names))

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | None]:
        """Return a step's micro-batches, and the divisors of the terms' sums in place of a number of tokens."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return samples, self.distiller.counts(samples) if samples else None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the distillation loss in training, the student's own loss in evaluation."""
        if isinstance(model, _Outputs):
            return self._own_loss(model, inputs, return_outputs, num_items_in_batch)
        made = model(inputs, counts=num_items_in_batch)
        self._outputs.append(Output(made.loss.detach(), made.terms))
        return (made.loss, made) if return_outputs else made.loss

    def _own_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, items: Any) -> Any:
        """Return the loss that a plain Trainer computes for the student."""
        ours, self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs, self._accepts
        try:
            return super().compute_loss(model, inputs, return_outputs, items)
        finally:
            self.model_accepts_loss_kwargs = ours

    def begin_training(self, steps: int) -> None:
        """Prepare changing layer weights for `steps` optimizer steps, or restore those of a checkpoint."""
        objective = self.distiller.objective
        objective.begin(steps)
        if self._restored is not None:
            objective.restore(self._restored)
        self._restored, self._outputs, self._terms, self._steps = None, [], {}, 0

    def end_step(self) -> None:
        """Update layer weights after a step, and keep its terms for the log."""
        self.distiller.update(self._outputs)
        for made in self._outputs:
            for name, value in made.terms.items():
                self._terms[name] = self._terms.get(name, 0.0) + value.raw
        self._outputs, self._steps = [], self._steps + 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as a Trainer does; add each term's unweighted value to a training loss."""
        if "loss" in logs and self._steps:
            values = torch.stack([value.double() for value in self._terms.values()]) / self._steps
            if _ranks() > 1:
                dist.all_reduce(values)
            logs |= dict(zip(self._terms, (values / _ranks()).tolist(), strict=True))
            self._terms, self._steps = {}, 0
        super().log(logs, start_time)

    # --- evaluation -------------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the student's loss, logits and labels as a Trainer does, and keep the sums of the terms."""
        inputs = self._prepare_inputs(inputs)
        if self._labelled(inputs):
            with self.compute_loss_context_manager(), torch.no_grad():
                sums = model(self._own_samples(inputs), wanted="sums")
            self._seen = sums if self._seen is None else self._seen + sums
        return super().prediction_step(_Outputs(model), inputs, prediction_loss_only, ignore_keys)

    def _labelled(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether the terms can be computed. Some need labels, which a set may lack."""
        objective = self.distiller.objective
        given = any(inputs.get(name) is not None for name in ("labels", "label"))
        return given or objective.task == "causal_lm" or not objective.needs("labels")

    def _own_samples(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the batch with filler for samples that a sampler repeats to give all ranks the same number."""
        state, rows = self.accelerator.gradient_state, len(inputs["input_ids"])
        if not state.end_of_dataloader or state.remainder <= 0 or _ranks() == 1:
            return inputs
        keep = min(max(state.remainder - self.accelerator.process_index * rows, 0), rows)
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask.clone()
        mask[keep:] = 0
        labels = {name: inputs[name].clone() for name in ("labels", "label") if inputs.get(name) is not None}
        for values in labels.values():
            values[keep:] = -100
        return {**inputs, "attention_mask": mask, **labels}

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Return the result of a Trainer; its metrics also hold each term's value over the whole set."""
        self._seen = None
        found = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        seen, self._seen = self._seen, None
        if seen is None:
            return found
        if _ranks() > 1:
            dist.all_reduce(seen)
        values = self.distiller.values(*seen)
        found.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in values.items()})
        return found

    # --- what is saved ----------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the plain student; a Trainer's own checkpoints also hold projectors and layer weights."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call or not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if not self.is_deepspeed_enabled:  # its checkpoints hold every parameter
            safetensors.torch.save_file(self._projectors(), folder / PROJECTORS)
        disk.save_json(folder / MOVING, self.distiller.objective.state())

    def _projectors(self) -> dict[str, Tensor]:
        held = self.distiller.objective.state_dict()
        return {name: value.detach().cpu().contiguous() for name, value in held.items()}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        student = self.distiller.model
        if state_dict:
            state_dict = _of_student(self.distiller, student, state_dict)
        with self._as_model(student):
            super()._save(output_dir, state_dict)

    @contextlib.contextmanager
    def _as_model(self, model: nn.Module) -> Iterator[None]:
        """Let a Trainer's methods find another model than the one that it trains."""
        trained, self.model = self.model, model
        try:
            yield
        finally:
            self.model = trained

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        for name in (PROJECTORS, MOVING):
            if not (folder / name).is_file():
                raise UserError(f"{folder}", f"no {name}", f"a checkpoint of a {ORIGIN}")
        super()._load_from_checkpoint(resume_from_checkpoint, self.distiller.model)
        projectors = safetensors.torch.load_file(folder / PROJECTORS)
        try:
            self.distiller.objective.load_state_dict(projectors)
        except RuntimeError:
            got = f"projectors {', '.join(sorted(projectors)) or 'none'}"
            expected = f"those of these terms: {', '.join(sorted(self._projectors())) or 'none'}"
            raise UserError(f"{folder / PROJECTORS}", got, expected) from None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._restored = json.loads((Path(checkpoint) / MOVING).read_text(encoding="utf-8"))

    def _load_best_model(self) -> None:
        with contextlib.nullcontext() if self.is_deepspeed_enabled else self._as_model(self.distiller.model):
            super()._load_best_model()


class _Outputs(nn.Module):
    """Call the trained module for the student's own outputs; evaluation uses this as the student."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(inputs, wanted="outputs")


def _check(args: TrainingArguments, trainer: Mapping[str, Any]) -> None:
    for name, expected in REFUSED.items():
        if trainer.get(name) is not None:
            raise UserError(f"{ORIGIN}: {name}", "one", expected)
    if args.label_smoothing_factor:
        raise UserError(f"{ORIGIN}: args.label_smoothing_factor", args.label_smoothing_factor, "0")
    if args.fsdp:
        raise UserError(f"{ORIGIN}: args.fsdp", args.fsdp, "DeepSpeed or data parallel ranks")
    if args.n_gpu > 1:
        got = f"one process with {args.n_gpu} GPUs"
        raise UserError(
            ORIGIN, got, "one process per GPU, started by torchrun, accelerate launch or deepspeed"
        )


def _gathering(teacher: PreTrainedModel | Callee | None) -> PreTrainedModel | Callee | None:
    """Return the teacher; if it was loaded sharded without an engine, add an engine that gathers its layers.

    Transformers loads every model sharded once TrainingArguments with ZeRO-3 exist.
    """
    if not isinstance(teacher, PreTrainedModel) or not any(map(is_sharded, teacher.parameters())):
        return teacher
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    return shard_teacher(lambda: teacher, dtype=dtypes[next(teacher.parameters()).dtype])


def _accepts_loss_kwargs(student: PreTrainedModel) -> bool:
    """Return whether the student's own loss takes a number of items, by a Trainer's rule."""
    if hasattr(student, "accepts_loss_kwargs"):
        return bool(student.accepts_loss_kwargs)
    parameters = inspect.signature(student.forward).parameters.values()
    return any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)


def _of_student(module: Distiller, student: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the student's part of the whole module's state, under the student's own names."""
    prefix = next(f"{name}." for name, part in module.named_modules() if part is student)
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
