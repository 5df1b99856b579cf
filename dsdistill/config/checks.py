"""Check the rules between fields. Rules that need files or models are checked where those are read."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from dsdistill.config.data_checks import check_data, check_streaming
from dsdistill.config.data_section import Part
from dsdistill.config.embedding_checks import check_embedding, relates
from dsdistill.config.errors import UserError
from dsdistill.config.explain import nearest
from dsdistill.config.terms import Layered, SoftLabel, Term, Terms

if TYPE_CHECKING:  # the schema calls check
    from collections.abc import Sequence

    from dsdistill.config.schema import Config, Stage, Teacher, Train

GROUP = 4  # examples that data.sampler hard_negative keeps together: one and its neighbours

# Top-level keys that DeepSpeed 0.19 reads; it silently ignores any other (a test compares this list).
DEEPSPEED_KEYS = frozenset(
    """
    activation_checkpointing aio autotuning comet comms_logger communication_data_type
    compile compression_training csv_monitor curriculum_learning data_efficiency data_types
    dataloader_drop_last disable_allgather disable_python_gc dump_state eigenvalue
    elasticity expert_parallel flops_profiler gradient_allreduce_op gradient_predivide_factor
    graph_harvesting hybrid_engine log_level memory_breakdown pipeline prescale_gradients
    progressive_layer_drop quantize_training seq_parallel_communication_data_type sparse_attention
    sparse_gradients steps_per_print tensor_parallel tensorboard timers
    use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb weight_quantization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
    """.split()
)

# Settings of DeepSpeed that have a field in this config: two places for one setting could disagree.
OWNED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size and train.micro_batch_size",
    "managed_gradient_accumulation": "train.batch_size and train.micro_batch_size",
    "gradient_clipping": "train.clip",
    "fp16": "train.dtype",
    "bf16": "train.dtype",
    "bfloat16": "train.dtype",
    "amp": "train.dtype",
    "torch_autocast": "train.dtype",
    "optimizer": "train.learning_rate and train.weight_decay",
    "scheduler": "train.scheduler",
    # Checkpoints are checked and read only in the writer and format that are used here.
    "checkpoint": "run.save_every and run.keep",
    "datastates_ckpt": "run.save_every and run.keep",
    "nebula": "run.save_every and run.keep",
}


def check(config: Config) -> None:
    """Raise UserError for settings that contradict each other."""
    check_embedding(config)
    for index, stage in enumerate(config.stages):
        _check_terms(config, stage.terms, f"stages.{index}.terms", first=index == 0)
    if not config.stages:
        _check_terms(config, config.terms, "terms", first=True)
    if config.evaluation.rcs == 1:
        raise UserError("evaluation.rcs", 1, "2 points or more, or 0")
    if config.evaluation.rcs and config.teacher is None:  # a model that never changes gets the best score
        raise UserError(
            "evaluation.rcs",
            f"{config.evaluation.rcs} without a teacher",
            "a teacher section: the score is read together with the KL from the teacher",
        )
    if config.evaluation.generate and config.task != "causal_lm":
        raise UserError("evaluation.generate", f"task {config.task}", "causal_lm, or 0")
    names = [stage.name for stage in config.stages]
    if len(set(names)) < len(names):
        raise UserError("stages", f"names {names}", "a different name for each stage")
    if (
        config.teacher is not None
        and config.teacher.path is None
        and config.teacher.recipe is None
        and config.teacher.config is None
    ):
        raise UserError("teacher", "neither path, recipe nor config", "path, recipe or config")
    if config.run.baseline and config.teacher is None:
        raise UserError(
            "run.baseline", "true without a teacher", "false: a run without a teacher is the baseline already"
        )
    _check_student(config)
    check_data(config.data, config.task)
    check_streaming(config)
    _check_labels(config)
    _check_classes(config)
    _check_chunker(config)
    _check_domain(config)
    _check_sampler(config)
    if config.evaluation.structure and config.teacher is None:
        raise UserError("evaluation.structure", "true without a teacher", "a teacher section")
    if config.train.batch_size % config.train.micro_batch_size:
        raise UserError(
            "train.batch_size",
            config.train.batch_size,
            f"a multiple of train.micro_batch_size ({config.train.micro_batch_size})",
        )
    _check_deepspeed(config.student.deepspeed, "student")
    _check_optimizer(config)
    if config.teacher is not None:
        _check_deepspeed(config.teacher.deepspeed, "teacher")
        _check_teacher(config.teacher)


def _check_terms(config: Config, section: Terms, place: str, first: bool) -> None:
    """Check the terms of one stage, or of a run without stages."""
    terms = section.named()
    if not terms:
        raise UserError(
            place, "no term with a weight above 0", f"at least one of {', '.join(type(section).model_fields)}"
        )
    matching = [name for name, term in terms.items() if term.needs_teacher]
    if matching and config.teacher is None:
        raise UserError(f"{place}.{matching[0]}", "no teacher", f"a teacher section, or {place}.task alone")
    for name, term in terms.items():
        squared = ("forward_kl", "logit_mse")  # both are the squared difference of two scores
        if config.task == "regression" and isinstance(term, SoftLabel) and term.divergence not in squared:
            raise UserError(
                f"{place}.{name}.divergence",
                f"{term.divergence} with task regression",
                "forward_kl or logit_mse: the loss on scores is always the squared difference",
            )
        if term.needs_previous and first:
            raise UserError(f"{place}.{name}", "no stage before this one", f"{name} only in a later stage")
        if getattr(term, "layers", None) != "emd":
            if isinstance(term, Layered) and term.layer_masses != "own":
                raise UserError(
                    f"{place}.{name}.layer_masses",
                    f"shared with layers: {term.layers}",
                    "layers: emd beside it",
                )
            continue
        if not isinstance(term, Layered):
            raise UserError(
                f"{place}.{name}.layers", "emd", "uniform, skip, last, or [student, teacher] pairs"
            )
        if term.layer_weights != "uniform":
            raise UserError(
                f"{place}.{name}.layer_weights",
                f"{term.layer_weights} with layers: emd",
                "layer_weights: uniform, or other layers",
            )
    if config.train.distill_weight is not None and len({term.reads_labels for term in terms.values()}) < 2:
        raise UserError(
            "train.distill_weight", f"{place} with only {', '.join(terms)}", "terms.task and another term"
        )


def _terms(config: Config) -> list[tuple[str, Term]]:
    """Return the terms of all stages by name."""
    return [item for stage in config.run_stages for item in stage.terms.named().items()]


def _check_optimizer(config: Config) -> None:
    zero = config.student.deepspeed.get("zero_optimization", {})
    offload = isinstance(zero, dict) and zero.get("offload_optimizer")
    if offload and config.train.optimizer != "adamw":
        raise UserError("train.optimizer", f"{config.train.optimizer} with offload_optimizer", "adamw")


def _check_teacher(teacher: Teacher) -> None:
    """Refuse settings of the teacher that would have no effect."""
    if teacher.path is not None and teacher.recipe is not None:
        raise UserError("teacher", "both path and recipe", "only one of them")
    if teacher.zero_stage == 0 and teacher.deepspeed:
        raise UserError("teacher.deepspeed", "settings with teacher.zero_stage 0", "teacher.zero_stage 3")
    if teacher.zero_stage == 0 and teacher.residency != "auto":
        raise UserError(
            "teacher.residency", f"{teacher.residency} with teacher.zero_stage 0", "teacher.zero_stage 3"
        )


def _check_chunker(config: Config) -> None:
    if config.data.chunker != "builtin" and not config.needs_spans:
        raise UserError(
            "data.chunker",
            f"{config.data.chunker}, but nothing in this run reads words or phrases",
            "builtin, or a term that reads them, such as terms.trajectory",
        )


def _check_domain(config: Config) -> None:
    domain, terms = config.student.domain, _terms(config)
    mapping = [name for name, term in terms if term.needs_domain]
    if domain is None:
        if mapping:
            raise UserError(
                f"terms.{mapping[0]}", "no student.domain", "a section student.domain: {width: ...}"
            )
        return
    if domain.teacher_map == "trained":
        raise UserError(
            "student.domain.teacher_map",
            "trained: learned together, the teacher's map and the student's both collapse to 0",
            "frozen",
        )
    if not mapping:
        raise UserError("student.domain", "no terms.domain", "terms.domain, which trains the predictor")
    if smoothing := [name for name, term in terms if term.needs_previous]:
        raise UserError("student.domain", f"terms.{smoothing[0]} in the same run", "only one of the two")


def _check_sampler(config: Config) -> None:
    data, place = config.data, "data.sampler"
    if data.sampler_temperature is not None and data.sampler not in ("entropy", "domain_aware"):
        raise UserError(
            "data.sampler_temperature",
            f"a value with sampler {data.sampler}",
            "sampler entropy or domain_aware",
        )
    if data.sampler == "domain_aware" and data.domain is None:
        raise UserError(place, "domain_aware without data.domain", "data.domain and data.general")
    if data.sampler in ("entropy", "hard_negative") and config.teacher is None:
        raise UserError(place, f"{data.sampler} without a teacher", "a teacher section")
    if data.sampler == "entropy" and config.task in ("regression", "embedding"):
        raise UserError(
            place, f"entropy with task {config.task}", "task classification, causal_lm or masked_lm"
        )
    if data.sampler == "ddk":
        _check_domains(config)
    if data.mixup is not None and config.task not in ("classification", "regression"):
        raise UserError("data.mixup", f"{data.mixup} with task {config.task}", "classification or regression")
    if data.mixup is not None and config.needs_spans:
        raise UserError(
            "data.mixup", f"{data.mixup} with a term over spans", "no such term: mixed texts have no words"
        )
    if data.sampler == "hard_negative":
        if not all(
            any(term.contrasts for term in stage.terms.named().values()) for stage in config.run_stages
        ):
            raise UserError(place, "hard_negative without terms.contrastive", "this term in every stage")
        if config.train.group_by_length:
            raise UserError("train.group_by_length", "true with data.sampler hard_negative", "false")


def _check_domains(config: Config) -> None:
    """Refuse what data.sampler ddk cannot work with."""
    data, place = config.data, "data.sampler"
    parts = [part for part in data.train if isinstance(part, Part)]
    if len(parts) < 2:
        raise UserError(place, "ddk with one source", "data.train as a list of sources")
    if config.task not in ("causal_lm", "masked_lm"):
        raise UserError(place, f"ddk with task {config.task}", "causal_lm or masked_lm")
    if config.teacher is None:
        raise UserError(place, "ddk without a teacher", "a teacher section")
    for index, part in enumerate(parts):
        if part.weight != 1:
            raise UserError(f"data.train.{index}.weight", f"{part.weight} with data.sampler ddk", "no weight")
    if not config.run.evaluate_every:
        raise UserError(
            "run.evaluate_every", "0 with data.sampler ddk", "the steps of an interval, such as 1000"
        )
    for name, given in (
        ("train.group_by_length", config.train.group_by_length),
        ("teacher.overlap", config.teacher.overlap),
    ):
        if given:
            raise UserError(name, "true with data.sampler ddk", "false")


def _check_labels(config: Config) -> None:
    """Refuse settings about labels that would have no effect: only the task's loss reads labels."""
    data, train = config.data, config.train
    if data.label_noise and config.task in ("causal_lm", "masked_lm", "embedding"):
        raise UserError(
            "data.label_noise", f"task {config.task}", "classification or regression: text has no labels"
        )
    if train.label_smoothing and config.task in ("regression", "embedding"):
        raise UserError(
            "train.label_smoothing", f"task {config.task}", "task classification, causal_lm or masked_lm"
        )
    settings = {
        "data.label_noise": data.label_noise,
        "train.label_smoothing": train.label_smoothing,
        "train.class_weights": train.class_weights is not None,
    }
    reads = any(term.reads_labels for _, term in _terms(config))
    for name, is_set in settings.items():
        if is_set and not reads:
            raise UserError(name, "no term that reads labels", "terms.task with a weight above 0")


def _check_classes(config: Config) -> None:
    """Refuse settings about classes for tasks without classes; the classes themselves depend on the data."""
    positive, weights = config.evaluation.positive_class, config.train.class_weights
    if positive is not None and config.task != "classification":
        raise UserError("evaluation.positive_class", f"{positive} with task {config.task}", "classification")
    if weights is not None and config.task != "classification":
        raise UserError("train.class_weights", f"weights with task {config.task}", "classification")


def _check_student(config: Config) -> None:
    student = config.student
    if student.from_teacher is not None and config.teacher is None:
        raise UserError("student.from_teacher", "no teacher", "a teacher section")
    if student.path is None and student.config is None and student.from_teacher is None:
        raise UserError("student", "neither path, config nor from_teacher", "at least one of them")
    if student.path is not None and student.from_teacher is not None:
        raise UserError("student", "both path and from_teacher", "one of them")
    if student.lora is not None:
        check_peft()


def check_peft() -> None:
    """Raise UserError, which says what to install, if the package for adapters is missing."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("student.lora", "no package peft", "pip install 'dsdistill[adapters]'")


def _check_deepspeed(settings: dict, model: str) -> None:
    place = f"{model}.deepspeed"
    for key in settings:
        if key in OWNED:
            raise UserError(f"{place}.{key}", "a key that dsdistill sets itself", f"{OWNED[key]} instead")
        if key not in DEEPSPEED_KEYS:
            raise UserError(
                f"{place}.{key}", "an unknown DeepSpeed key", "a known one" + nearest(key, DEEPSPEED_KEYS)
            )
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f"{place}.zero_optimization", type(zero).__name__, "a mapping")
    if "stage" in zero:
        raise UserError(f"{place}.zero_optimization.stage", zero["stage"], f"{model}.zero_stage instead")


def check_ranks(
    train: Train, stages: Sequence[Stage], sampler: str, world_size: int, task: str = "classification"
) -> None:
    """Refuse batch sizes that `world_size` ranks cannot share, or that leave a term no examples to compare."""
    at_once = train.micro_batch_size * world_size
    if train.batch_size % at_once:
        raise UserError(
            "train.batch_size",
            train.batch_size,
            f"a multiple of train.micro_batch_size × ranks = {train.micro_batch_size} × {world_size}",
        )
    for name, term in (item for stage in stages for item in stage.terms.named().items()):
        if at_once == 1 and relates(term, task):
            raise UserError(
                f"terms.{name}",
                "one example at a time (train.micro_batch_size 1 on 1 rank)",
                "at least 2: the term compares the examples of a micro-batch with each other",
            )
    if sampler == "hard_negative" and at_once % GROUP:
        raise UserError(
            "train.micro_batch_size",
            f"{at_once} examples at a time on {world_size} rank(s)",
            f"a multiple of {GROUP}: hard_negative keeps an example and its neighbours together",
        )
