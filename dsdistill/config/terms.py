"""Define the settings of the loss terms.

Layers are counted from 1; layer 0 is the output of the embeddings, as in the papers of the losses.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError

from dsdistill.config.explain import explain
from dsdistill.config.section import NonNegative, Positive, Section

LayerPair = Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], Field(strict=False)]
LayerPairs = Annotated[tuple[LayerPair, ...], Field(strict=False, min_length=1)]
# How student layers are mapped to teacher layers; an explicit map lists [student, teacher] pairs.
LayerMap = Literal["uniform", "skip", "last", "emd", "cka_offline"] | LayerPairs
LayerWeights = (
    Literal["uniform", "dynamic"] | Annotated[tuple[NonNegative, ...], Field(strict=False, min_length=1)]
)

Relation = Literal["query_key", "query_query", "key_key", "value_value"]


class ConstructedSection(Section):
    """A ConstructedSection may also be made by code; a mistake then raises the same UserError as in a config."""

    def __init__(self, /, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise explain(error.errors(), type(self), within=_place(type(self))) from None

    # Within a config pydantic validates this section itself, and reports mistakes by their place in that config.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # a function takes any attribute


class Term(ConstructedSection):
    """A Term has what every term has: a weight, and properties that say what the term needs from a run."""

    weight: NonNegative = Field(default=1.0, description="factor of this term in the loss")

    @property
    def relates(self) -> bool:
        """Return whether the value depends on which examples share a micro-batch."""
        return False

    @property
    def contrasts(self) -> bool:
        """Return whether the term contrasts the examples of a micro-batch, as data.sampler hard_negative needs."""
        return False

    @property
    def needs_teacher(self) -> bool:
        """Return whether the term compares the student with a teacher."""
        return True

    @property
    def needs_head(self) -> bool:
        """Return whether the term reads the teacher's logits, so that the teacher's head must be trained."""
        return False

    @property
    def needs_previous(self) -> bool:
        """Return whether the term compares the student with the student at the end of the previous stage."""
        return False

    @property
    def needs_domain(self) -> bool:
        """Return whether the term trains the fusion that student.domain describes."""
        return False

    @property
    def reads_spans(self) -> bool:
        """Return whether the term compares words and phrases, which data.chunker finds."""
        return False

    @property
    def reads_labels(self) -> bool:
        """Return whether the term reads the data's labels: train.distill_weight weighs all other terms against it."""
        return False


class Task(Term):
    """Cross-entropy against the labels (squared error for regression; embedding: contrast in the batch).

    Task embedding needs pairs without scores for it: each query must find its document among those of all pairs that
    meet in a micro-batch, on all ranks together (van den Oord et al. 2018, InfoNCE).
    """

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=0.05, description="embedding: τ, divides the cosines of queries and documents"
    )

    @property
    def needs_teacher(self) -> bool:
        return False

    @property
    def reads_labels(self) -> bool:
        return True


class Embedding(Term):
    """Vectors of texts, projected to the teacher's width where the widths differ (task embedding alone)."""

    divergence: Literal["cosine", "mse"] = Field(
        default="cosine",
        description="cosine: 1 − cosine of the two vectors; mse: a value of the pooled vectors before they are "
        "normalised (of unit vectors it would be the cosine again)",
    )
    dims: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None,
        description="Matryoshka: so many first values of the student's vector are compared as vectors of their own, "
        "such as [384, 256, 128], and the mean is taken; default: all values alone",
    )
    projector: Literal["auto", "linear"] = Field(
        default="auto", description="auto: none at equal width, else linear; linear: always, bias-free"
    )


class SoftLabel(Term):
    """Divergence of the output distributions at temperature τ (squared difference for regression)."""

    temperature: Annotated[float, Field(gt=0)] = Field(
        default=2.0, description="τ, divides the logits of both"
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd"] = Field(
        default="forward_kl",
        description="forward_kl: KL(teacher‖student); reverse_kl, jsd (generalised), skew_kl: nats too; "
        "tvd: total variation, 0 to 1",
    )
    beta: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="teacher's share in jsd's mixture"
    )
    alpha: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="teacher's share in skew_kl's mixture"
    )
    scale_tau2: bool = Field(
        default=True, description="multiply by τ², so that gradients keep their size (Hinton 2015)"
    )

    @property
    def needs_head(self) -> bool:
        return True


class Layered(Term):
    layers: LayerMap = Field(
        default="uniform",
        description="uniform, skip, last, [student, teacher] pairs; emd: every pair, weighted anew each step; "
        "cka_offline: the most similar layers in order, found before training",
    )
    layer_agg: Literal["mean", "sum"] = Field(default="mean", description="over the mapped layers")
    layer_weights: LayerWeights = Field(
        default="uniform",
        description="dynamic: layers that lag behind gain weight while training; a list: λ of each mapped layer in "
        "order (the embeddings first), summed, in place of layer_agg",
    )


class States(Term):
    """States holds what terms over hidden states have in common."""

    final_norm: Literal["after", "before"] = Field(
        default="after",
        description="the last layer's states: after the final norm, as transformers' hidden_states[-1] and other "
        "libraries have them, or before it; one and the same for models without such a norm (BERT)",
    )


class Hidden(Layered, States):
    """Hidden states, projected to the teacher's width where the widths differ."""

    divergence: Literal["mse", "cosine"] = Field(
        default="mse", description="mse: a value of a token's state; cosine: 1 − cosine of a token's states"
    )
    embedding: bool = Field(
        default=True, description="also match the embeddings' output (layer 0 with layer 0)"
    )
    projector: Literal["auto", "linear"] = Field(
        default="auto", description="auto: none at equal width, else linear; linear: always, bias-free"
    )


class Feature(Hidden):
    """A second term over hidden states, by direction where `hidden` goes by value."""

    divergence: Literal["mse", "cosine"] = Field(
        default="cosine",
        description="mse: a value of a token's state; cosine: 1 − cosine of a token's states",
    )
    embedding: bool = Field(
        default=False, description="also match the embeddings' output (layer 0 with layer 0)"
    )


class RelationHeads(Section):
    """Heads that queries, keys and values are split into, where the numbers differ."""

    query: Positive | None = Field(default=None, description="for query_query, and for query_key")
    key: Positive | None = Field(default=None, description="for key_key")
    value: Positive | None = Field(default=None, description="for value_value")


class Attention(Layered):
    """Attention and its kin, the relations of queries, keys or values among themselves; never as a whole matrix."""

    divergence: Literal["kl", "mse", "score_mse"] = Field(
        default="kl",
        description="kl: of each row of probabilities, nats (MiniLM); mse: of probabilities; score_mse: of the "
        "scores before softmax (TinyBERT)",
    )
    heads: Literal["match", "mean", "group"] = Field(
        default="match",
        description="for unequal counts: mean, probabilities averaged over all heads of each model; group, each "
        "student head against the average of as many teacher heads as there are to each, in their order",
    )
    relations: Annotated[tuple[Relation, ...], Field(strict=False, min_length=1)] = Field(
        default=("query_key",),
        description="what is related to what, summed; query_key is attention itself; MiniLM: + value_value; "
        "MiniLMv2: query_query, key_key, value_value",
    )
    relation_heads: Literal["auto"] | Positive | RelationHeads | None = Field(
        default=None,
        description="heads joined and split anew into this many (MiniLMv2): a number, one for each of query, key and "
        "value, or auto, as many as the student has or the next fewer that divide both widths; default: as they are",
    )
    rows: Positive | None = Field(
        default=None,
        description="rows (queries) of a sequence, or of a packed row, that training compares, drawn anew each step, "
        "one from each part of it; such as 256; evaluation compares all; default: all",
    )


class Pairwise(Layered, States):
    """Structure: how the tokens of a sequence relate to each other."""

    layers: LayerMap = Field(default="last", description="uniform, skip, last, or [student, teacher] pairs")
    relation: Literal["cosine", "dot", "distance"] = Field(
        default="cosine",
        description="of two tokens' states; distance is relative to the sequence's mean (RKD)",
    )
    center: bool = Field(
        default=False, description="take the mean of a sequence's tokens off first, of both models (L_struct)"
    )
    rows: Positive | None = Field(
        default=None,
        description="tokens of a sequence that training relates to all of it, drawn anew each step as those of "
        "attention; not with distance; default: all",
    )


class Related(Layered, States):
    """Terms that relate the examples of a micro-batch, those of all ranks together, by their mean-pooled states.

    What they compare depends on which examples meet, so a split of the batch changes their value.
    """

    layers: LayerMap = Field(default="last", description="uniform, skip, last, or [student, teacher] pairs")

    @property
    def relates(self) -> bool:
        return True


class Contrastive(Related):
    """An example's two vectors must find each other among those of the others."""

    temperature: Annotated[float, Field(gt=0)] = Field(default=0.07, description="divides the cosines")
    projector: Literal["auto", "linear"] = Field(
        default="auto", description="auto: none at equal width, else linear; linear: always, bias-free"
    )

    @property
    def contrasts(self) -> bool:
        return True


class SimilarityPreserving(Related):
    """Rows of the matrix of inner products, normalised (SP)."""


class RelationalKD(Related):
    """Distances and angles between examples (RKD)."""

    distance: NonNegative = Field(default=1.0, description="factor of the distances' loss")
    angle: NonNegative = Field(default=2.0, description="factor of the angles' loss")
    triples: Positive = Field(
        default=32768,
        description="most angles compared; where there are more, so many drawn with a fixed seed",
    )


class KernelAlignment(Related):
    """1 − linear centred kernel alignment (CKA)."""


class ProbabilisticTransfer(Related):
    """Which examples are neighbours, as probabilities from cosines (PKT)."""


class Trajectory(States):
    """How words and phrases lie to each other, layer by layer (MTA): data.chunker finds them."""

    word_layers: Annotated[tuple[LayerPair, ...], Field(strict=False)] = Field(
        default=(), description="[student, teacher] pairs that are compared over words, the lower ones"
    )
    phrase_layers: Annotated[tuple[LayerPair, ...], Field(strict=False)] = Field(
        default=(), description="[student, teacher] pairs that are compared over phrases, the upper ones"
    )
    structure: NonNegative = Field(
        default=2.0, description="λ_DSA: of the spans' pairwise cosines, mean over layers"
    )
    hidden: NonNegative = Field(
        default=0.2, description="λ_Hid: of the spans' tokens, projected, 1 − cosine, sum over layers"
    )
    pairs: Literal["ordered", "upper"] = Field(
        default="ordered", description="pairs of spans that are summed: both ways round, or once"
    )

    @property
    def reads_spans(self) -> bool:
        return True


class FeatureDynamics(Term):
    """What a language model would predict from its middle layers, and how that changes on the way up (FDD)."""

    layers: Literal["uniform"] | LayerPairs = Field(
        default="uniform", description="uniform, or [student, teacher] pairs from below upwards"
    )
    levels: NonNegative = Field(default=1.0, description="of the predictions' KL, summed over layers")
    changes: NonNegative = Field(
        default=1.0, description="of 1 − cosine of their change from one layer to the next, summed"
    )


class DomainMapping(Term):
    """Domain structural mapping: with student.domain, whose features hidden states are compared in."""

    layers: LayerMap = Field(
        default="uniform", description="mapped layers: uniform, skip, last, or [student, teacher] pairs"
    )
    hidden: NonNegative = Field(default=1.0, description="of the mapped layers' states in d' features")
    tokens: NonNegative = Field(default=1.0, description="of how the tokens of a sequence lie to each other")
    phrases: NonNegative = Field(default=1.0, description="of how its phrases do")
    sequences: NonNegative = Field(
        default=1.0, description="of how the examples that meet in a micro-batch do"
    )
    predictor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=1.0, description="of what the student predicts of the teacher"
    )

    @property
    def relates(self) -> bool:
        return self.sequences > 0

    @property
    def needs_domain(self) -> bool:
        return True

    @property
    def reads_spans(self) -> bool:
        return True


class Smooth(States):
    """How far the student's last layer has moved since the end of the stage before."""

    weight: NonNegative = Field(default=0.1, description="factor of this term in the loss")

    @property
    def needs_teacher(self) -> bool:
        return False

    @property
    def needs_previous(self) -> bool:
        return True


class Terms(ConstructedSection):
    """The loss: a weighted sum of the terms that are named."""

    task: Task | None = None
    soft_label: SoftLabel | None = None
    embedding: Embedding | None = None
    hidden: Hidden | None = None
    feature: Feature | None = None
    attention: Attention | None = None
    pairwise: Pairwise | None = None
    contrastive: Contrastive | None = None
    sp: SimilarityPreserving | None = None
    rkd: RelationalKD | None = None
    cka: KernelAlignment | None = None
    pkt: ProbabilisticTransfer | None = None
    trajectory: Trajectory | None = None
    fdd: FeatureDynamics | None = None
    domain: DomainMapping | None = None
    smooth: Smooth | None = None

    def named(self) -> dict[str, Term]:
        return {name: term for name, term in self if term is not None and term.weight > 0}


def settings_of(name: str) -> type[Term]:
    """Return the class of a term's settings."""
    return get_args(Terms.model_fields[name].annotation)[0]


def _place(section: type[ConstructedSection]) -> tuple[str, ...]:
    """Return the keys that lead to a section in a config; for a section that no field has, the class name."""
    if section is Terms:
        return ("terms",)
    name = next((name for name in Terms.model_fields if settings_of(name) is section), None)
    return (section.__name__,) if name is None else ("terms", name)
