"""Define the base class of every term of the loss."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PretrainedConfig

from dsdistill.alignment.weighting import Dynamic, EarthMover, Uniform
from dsdistill.config import UserError
from dsdistill.config.terms import Layered
from dsdistill.config.terms import Term as TermConfig
from dsdistill.data.batch import Batch
from dsdistill.models.domain_fusion import TeacherMap
from dsdistill.models.settings import attention_layers, setting, text_config
from dsdistill.models.trace import Geometry, Trace
from dsdistill.ops import HEAD_BACKENDS, VocabularyLosses, Weight


@dataclass(frozen=True)
class Shape:
    """Hold what a term must know about one model before it sees a trace."""

    depth: int  # layers
    width: int  # of the hidden states
    heads: int  # of the queries
    key_heads: int  # of keys and values
    head_width: int
    vocabulary: int
    attention_layers: tuple[int, ...] | None = None  # for hybrids, counted from 1; None: all have attention

    @property
    def attending(self) -> tuple[int, ...]:
        """Return the layers that have attention, counted from 1."""
        return tuple(range(1, self.depth + 1)) if self.attention_layers is None else self.attention_layers

    @classmethod
    def of(cls, model: PretrainedConfig) -> "Shape":
        """Return the shape of an architecture."""
        model = text_config(model)
        heads = model.num_attention_heads
        return cls(
            depth=model.num_hidden_layers,
            width=model.hidden_size,
            heads=heads,
            key_heads=setting(model, "num_key_value_heads") or heads,
            head_width=setting(model, "head_dim") or model.hidden_size // heads,
            vocabulary=model.vocab_size,
            attention_layers=attention_layers(model),
        )


@dataclass(frozen=True)
class Pair:
    """Describe the student and teacher of one run, as the terms see them."""

    student: Shape
    teacher: Shape | None
    task: str  # as in the config
    backend: str  # of the operators
    tokens: int = 0  # entries of the tokenizer
    domain_width: int = 0  # d', the feature width of a student with domain fusion
    smoothing: float = 0.0  # share of a label's probability that is spread over all classes, or entries
    class_weights: tuple[float, ...] = ()  # of the classes in the task's loss; (): each weighs 1
    pooling: tuple[str, str] = ("mean", "mean")  # how student and teacher turn states into a text's vector

    @property
    def shapes(self) -> tuple[Shape, Shape]:
        """Return the shapes of student and teacher, for a term that needs a teacher."""
        assert self.teacher is not None  # a config without a teacher has no term that needs one
        return self.student, self.teacher

    @property
    def logit_backend(self) -> str:
        """Return the backend of the operators over a vocabulary; "auto" if they lack the requested one."""
        return self.backend if self.backend in HEAD_BACKENDS else "auto"


class AlignmentTerm(nn.Module, ABC):
    """Compute one summand of the loss: a sum for each part (mapped layer), and the count that divides it.

    Sum and count are separate because the loss divides by counts over all ranks and accumulation steps. So the same
    global batch gives the same loss for any split.
    """

    name: str  # in a config
    weight: float
    parts: int = 1  # sums and counts that the term returns
    factor: float = 1.0  # multiplies the sum of the parts: 1/parts for a mean over layers
    student_hidden: frozenset[int] = (
        frozenset()
    )  # layers the traces must hold, counted from 1, 0 = embeddings
    teacher_hidden: frozenset[int] = frozenset()
    student_attention: frozenset[int] = frozenset()
    teacher_attention: frozenset[int] = frozenset()
    needs_values: bool = False  # the values of the captured attention, too
    needs_unrotated: bool = False  # queries and keys before their rotation by position
    needs_teacher: bool = True
    needs_head: bool = False  # the teacher's head, trained for the task
    needs_logits: bool = False  # the logits of a classifier or regressor
    needs_lens: bool = False  # the head reads hidden states of any layer as if they were the last
    needs_labels: bool = False  # Batch.labels
    needs_spans: bool = False  # Batch.spans
    needs_previous: bool = False  # the student as the stage before left it, as Trace.previous
    joins: str | None = None  # the term whose sums `sums_with` computes with this one's, at less cost
    supervised: bool = False  # only labels supervise it: train.distill_weight weighs it against all others
    fused: tuple[int, ...] = ()  # teacher layers that the student's domain fusion maps

    def __init__(self, config: TermConfig, pair: Pair):
        super().__init__()
        self.config, self.pair, self.weight = config, pair, config.weight
        self.weighting: Uniform = Uniform(self.parts)

    @property
    def needs_final(self) -> bool:
        """Return whether the term reads a last layer's states after the final norm."""
        own = (self.student_hidden, self.pair.student), (self.teacher_hidden, self.pair.teacher)
        reads = any(shape is not None and shape.depth in layers for layers, shape in own)
        return reads and getattr(self.config, "final_norm", "before") == "after"

    @property
    def teacher_maps(self) -> Mapping[int, TeacherMap]:
        """Return the term's frozen maps of teacher layers, one for each layer; they are fitted before training."""
        return {}

    def state(self, trace: Trace, layer: int) -> Tensor:
        """Return a layer's states, (B, N, D). `final_norm` sets if the last layer's are before or after the norm."""
        return trace.state(layer, after=getattr(self.config, "final_norm", "before") == "after")

    def check_models(self, seen: Sequence[dict[int, Geometry]], hidden_rotation: dict[str, str]) -> None:
        """Raise UserError for models that the term cannot compare.

        seen: which keys each attention layer of student and teacher sees. hidden_rotation: the model types by place
        (student, teacher) of those models whose queries and keys cannot be captured before their rotation by position.
        """

    @abstractmethod
    def counts(self, batch: Batch, geometry: dict[int, Geometry]) -> Tensor:
        """Return (parts,) float64: each sum's divisor, from the batch alone. `batch.documents` marks the examples.

        geometry: of the student's attention layers, by layer.
        """

    @abstractmethod
    def sums(self, student: Trace, teacher: Trace | None, batch: Batch) -> Tensor:
        """Return (parts,) float32 with gradients to the student: the sums, not divided and not weighted.

        Rows of a causal language model may be packed. So a term that relates or pools the tokens of an example must not
        treat a row as one example: alignment/units.py lays out states like the rows of `batch.unpacked`, or pools them.
        """

    def sums_with(
        self,
        other: "AlignmentTerm",
        student: Trace,
        teacher: Trace,
        batch: Batch,
        weights: tuple[Weight, Weight] = (1.0, 1.0),
    ) -> VocabularyLosses:
        """Return the sums of `other`, the term that this one joins, and of this one. weights: their weights in `total`.

        A term that sets `joins` must implement this; it is not called on others.
        """
        raise TypeError(f"term {self.name}: got joins = {self.joins!r} alone, expected sums_with beside it")

    def _map_layers(
        self, config: Layered, pairs: tuple[tuple[int, int], ...], depths: Sequence[int] | None = None
    ) -> None:
        """Use these (student, teacher) pairs as the parts, weighted as the config says.

        depths: how many layers of student and teacher are mapped; by default all.
        """
        self.layers = pairs
        self.parts = len(pairs)
        if config.layers == "emd":
            depths = depths or [shape.depth for shape in self.pair.shapes]
            before, shared = self.parts - depths[0] * depths[1], config.layer_masses == "shared"
            self.weighting = EarthMover(depths[0], depths[1], before, shared)
            return
        self.factor = 1 / self.parts if config.layer_agg == "mean" else 1.0
        weights = config.layer_weights
        if weights == "dynamic":
            self.weighting = Dynamic(self.parts)
        else:
            self.weighting = Uniform(self.parts)
        if isinstance(weights, tuple):
            if len(weights) != self.parts:
                raise UserError(
                    f"terms.{self.name}.layer_weights",
                    f"{len(weights)} weights",
                    f"{self.parts}, one a mapped layer",
                )
            self.weighting.values, self.factor = list(weights), 1.0
