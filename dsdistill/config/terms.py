"""Define the settings of the loss terms.

Layers are counted from 1; layer 0 is the output of the embeddings, as in the papers.
"""

from typing import Annotated, Literal, get_args

from pydantic import Field

from dsdistill.config.section import NonNegative, Positive, Section
from dsdistill.config.term_base import (
    ConstructedSection,
    Layered,
    LayerMap,
    LayerPair,
    LayerPairs,
    States,
    Term,
)

Relation = Literal["query_key", "query_query", "key_key", "value_value"]


class Task(Term):
    """Cross-entropy with the labels (regression: squared error; embedding: contrast in the batch).

    For task embedding it needs pairs without scores: each query must identify its document among the documents of all
    pairs in a micro-batch, over all ranks (van den Oord et al. 2018, InfoNCE).
    """

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=0.05, description="embedding: τ, which divides the cosines of queries and documents"
    )

    @property
    def needs_teacher(self) -> bool:
        return False

    @property
    def reads_labels(self) -> bool:
        return True


class Embedding(Term):
    """Difference of text vectors (task embedding only); the student's are projected if the widths differ."""

    divergence: Literal["cosine", "mse"] = Field(
        default="cosine",
        description="cosine: 1 − cosine of the two vectors; mse: squared difference, mean over the values of the "
        "pooled vectors before they are normalised (for unit vectors it would be the cosine again)",
    )
    dims: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None,
        description="Matryoshka: lengths d, such as [384, 256, 128]; the first d values of the student's vector are "
        "compared as if they were the whole vector, and the loss is the mean over all d; default: the whole vector",
    )
    projector: Literal["auto", "linear"] = Field(
        default="auto",
        description="auto: a bias-free linear map to the teacher's width if the widths differ, else none; linear: "
        "always the linear map",
    )


class SoftLabel(Term):
    """Divergence of the output distributions at temperature τ (squared difference for regression)."""

    temperature: Annotated[float, Field(gt=0)] = Field(
        default=2.0, description="τ, which divides the logits of both models"
    )
    divergence: Literal[
        "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "akl", "tvd", "logit_mse"
    ] = Field(
        default="forward_kl",
        description="forward_kl: KL(teacher‖student); reverse_kl: KL(student‖teacher); jsd: generalised JSD; skew_kl "
        "and skew_reverse_kl: KL to a mixture of both models; akl: forward and reverse KL, weighted by where both "
        "models differ. All of these are in nats. tvd: total variation, 0 to 1; logit_mse: squared difference of the "
        "logits, mean over classes",
    )
    beta: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="teacher's share in jsd's mixture"
    )
    alpha: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1,
        description="share in the mixture: the teacher's in skew_kl, the student's in skew_reverse_kl",
    )
    mu: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5,
        description="akl: the head of the vocabulary is the teacher's likeliest tokens, of at most this total "
        "probability",
    )
    positions: Literal["predicted", "valid"] = Field(
        default="predicted",
        description="positions that are compared in tasks that predict tokens; predicted: those whose token has a "
        "label; valid: those of all tokens, so also tokens that are not masked (masked_lm) and prompts (causal_lm)",
    )
    scale_tau2: bool = Field(
        default=True, description="multiply by τ², so that gradients keep their size (Hinton 2015)"
    )

    @property
    def needs_head(self) -> bool:
        return True


class Hidden(Layered, States):
    """Difference of hidden states; the student's are projected to the teacher's width if the widths differ."""

    divergence: Literal["mse", "cosine"] = Field(
        default="mse",
        description="mse: squared difference, mean over a state's values; cosine: 1 − cosine of a token's two states",
    )
    positions: Literal["all", "first"] = Field(
        default="all",
        description="tokens that are compared; first: only the first token of each sequence, [CLS] (not for "
        "causal_lm)",
    )
    embedding: bool = Field(
        default=True, description="also match the embeddings' output (layer 0 with layer 0)"
    )
    projector: Literal["auto", "linear"] = Field(
        default="auto",
        description="auto: a bias-free linear map to the teacher's width if the widths differ, else none; linear: "
        "always the linear map",
    )
    components: Positive | None = Field(
        default=None,
        description="d': the student's projected states are compared with this number of principal components of the "
        "teacher's normed states, which are fitted before training; default: with the states themselves",
    )


class Feature(Hidden):
    """A second term over hidden states; by default it compares directions, while `hidden` compares values."""

    divergence: Literal["mse", "cosine"] = Field(
        default="cosine",
        description="mse: squared difference, mean over a state's values; cosine: 1 − cosine of a token's two states",
    )
    embedding: bool = Field(
        default=False, description="also match the embeddings' output (layer 0 with layer 0)"
    )


class FeatureMap(States):
    """Difference of normalised hidden states, and of the means and variances that normalising removes (MobileBERT)."""

    layers: LayerMap = Field(
        default="uniform", description="mapped layers: uniform, skip, last, or [student, teacher] pairs"
    )
    maps: NonNegative = Field(
        default=100.0, description="factor of the squared difference of the normalised states"
    )
    means: NonNegative = Field(
        default=5000.0, description="factor of the squared difference of the states' means over their values"
    )
    variances: NonNegative = Field(
        default=5.0,
        description="factor of the absolute difference of the states' variances over their values",
    )


class RelationHeads(Section):
    """Separate numbers of heads for queries, keys and values."""

    query: Positive | None = Field(default=None, description="number of heads for query_query and query_key")
    key: Positive | None = Field(default=None, description="number of heads for key_key")
    value: Positive | None = Field(default=None, description="number of heads for value_value")


class Attention(Layered):
    """Attention, and relations of queries, keys or values among themselves, without building whole matrices."""

    divergence: Literal["kl", "mse", "score_mse"] = Field(
        default="kl",
        description="kl: KL of each row of probabilities, in nats (MiniLM); mse: squared difference of "
        "probabilities; score_mse: squared difference of the scores before softmax (TinyBERT)",
    )
    heads: Literal["match", "mean", "group"] = Field(
        default="match",
        description="match: head by head, for equal numbers of heads; mean: probabilities averaged over all heads of "
        "each model; group: each student head against the average of a group of neighbouring teacher heads, all "
        "groups of equal size and in order",
    )
    relations: Annotated[tuple[Relation, ...], Field(strict=False, min_length=1)] = Field(
        default=("query_key",),
        description="relations to compare, whose losses are summed; query_key is attention itself. MiniLM uses "
        "query_key and value_value; MiniLMv2 uses query_query, key_key and value_value",
    )
    relation_heads: Literal["auto"] | Positive | RelationHeads | None = Field(
        default=None,
        description="number of heads after all heads are joined and split again (MiniLMv2): one number, or a number "
        "each for query, key and value. auto: the student's number, or the next smaller one that divides both widths. "
        "Default: the heads are not split again",
    )
    rows: Positive | None = Field(
        default=None,
        description="number of rows (queries), such as 256, that training compares in a sequence or packed row. At "
        "each step one query is drawn from each of this number of equal parts. Evaluation compares all rows. Default: "
        "all",
    )


class Pairwise(Layered, States):
    """Structure: relations between the tokens of a sequence."""

    layers: LayerMap = Field(default="last", description="uniform, skip, last, or [student, teacher] pairs")
    relation: Literal["cosine", "dot", "distance"] = Field(
        default="cosine",
        description="relation of two tokens' states; distance is relative to the sequence's mean distance (RKD)",
    )
    center: bool = Field(
        default=False,
        description="first subtract the mean of the sequence's tokens, in both models (L_struct)",
    )
    rows: Positive | None = Field(
        default=None,
        description="number of tokens that training relates to all tokens of their sequence, drawn like the rows of "
        "attention; not supported with relation distance; default: all",
    )


class ContextualKD(States):
    """Relations between words, and between the layers of a word, including the embeddings (CKD)."""

    layers: LayerMap = Field(
        default="uniform", description="mapped layers: uniform, skip, last, or [student, teacher] pairs"
    )
    word_pairs: NonNegative = Field(
        default=1.0, description="factor of the KL of a word's cosines with the other words"
    )
    word_triples: NonNegative = Field(
        default=1.0, description="factor of the squared difference of the angles between a word's neighbours"
    )
    layer_pairs: NonNegative = Field(
        default=1.0, description="factor of the KL of the cosines between the layers of a word"
    )
    layer_triples: NonNegative = Field(
        default=1.0, description="factor of the squared difference of the angles between the layers of a word"
    )
    window: Positive = Field(
        default=21,
        description="word_triples: number of words in the window around a word, itself included; odd",
    )


class Related(Layered, States):
    """Related is the base class of terms that relate the mean-pooled examples of a micro-batch, over all ranks.

    Their values depend on which examples share a micro-batch, so another split of the batch changes them.
    """

    layers: LayerMap = Field(default="last", description="uniform, skip, last, or [student, teacher] pairs")

    @property
    def relates(self) -> bool:
        return True


class Contrastive(Related):
    """Contrast: a student vector must identify the teacher's vector of the same example among all (InfoNCE)."""

    temperature: Annotated[float, Field(gt=0)] = Field(
        default=0.07, description="τ, which divides the cosines"
    )
    projector: Literal["auto", "linear"] = Field(
        default="auto",
        description="auto: a bias-free linear map to the teacher's width if the widths differ, else none; linear: "
        "always the linear map",
    )

    @property
    def contrasts(self) -> bool:
        return True


class SimilarityPreserving(Related):
    """Difference of the examples' matrices of inner products, with normalised rows (SP)."""


class RelationalKD(Related):
    """Difference of the distances and angles between examples (RKD)."""

    distance: NonNegative = Field(default=1.0, description="factor of the distance loss")
    angle: NonNegative = Field(default=2.0, description="factor of the angle loss")
    triples: Positive = Field(
        default=32768,
        description="largest number of angles compared; if there are more, this number is drawn with a fixed seed",
    )


class KernelAlignment(Related):
    """1 − linear centred kernel alignment (CKA)."""


class ProbabilisticTransfer(Related):
    """Divergence of the probabilities that examples are neighbours, computed from cosines (PKT)."""


class Trajectory(States):
    """Relations between words and between phrases, layer by layer (MTA); data.chunker finds both."""

    word_layers: Annotated[tuple[LayerPair, ...], Field(strict=False)] = Field(
        default=(), description="[student, teacher] pairs of lower layers, compared over words"
    )
    phrase_layers: Annotated[tuple[LayerPair, ...], Field(strict=False)] = Field(
        default=(), description="[student, teacher] pairs of upper layers, compared over phrases"
    )
    structure: NonNegative = Field(
        default=2.0,
        description="λ_DSA: factor of the loss on the spans' pairwise cosines, averaged over layers",
    )
    hidden: NonNegative = Field(
        default=0.2,
        description="λ_Hid: factor of 1 − cosine of the spans' projected tokens, summed over layers",
    )
    weighted: bool = Field(
        default=True,
        description="weigh tokens by how much the teacher's other tokens attend to them; false: all alike, as in an "
        "ablation of the paper",
    )
    pairs: Literal["ordered", "upper"] = Field(
        default="ordered",
        description="pairs of spans in the sum; ordered: both orders of each pair; upper: each pair once",
    )

    @property
    def reads_spans(self) -> bool:
        return True


class FeatureDynamics(Term):
    """A language model's predictions from middle layers, and how they change from layer to layer (FDD)."""

    layers: Literal["uniform"] | LayerPairs = Field(
        default="uniform", description="uniform, or [student, teacher] pairs from lower to upper layers"
    )
    levels: NonNegative = Field(default=1.0, description="factor of the predictions' KL, summed over layers")
    changes: NonNegative = Field(
        default=1.0,
        description="factor of 1 − cosine of the predictions' changes from one layer to the next, summed",
    )


class DomainMapping(Term):
    """Domain structural mapping: hidden states are compared in the features of student.domain, which it needs."""

    layers: LayerMap = Field(
        default="uniform", description="mapped layers: uniform, skip, last, or [student, teacher] pairs"
    )
    hidden: NonNegative = Field(
        default=1.0, description="factor of the loss on the mapped layers' states in d' features"
    )
    tokens: NonNegative = Field(
        default=1.0, description="factor of the loss on relations between the tokens of a sequence"
    )
    phrases: NonNegative = Field(
        default=1.0, description="factor of the loss on relations between the phrases of a sequence"
    )
    sequences: NonNegative = Field(
        default=1.0, description="factor of the loss on relations between the examples of a micro-batch"
    )
    predictor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=1.0, description="factor of the loss on the student's prediction of the teacher's features"
    )
    decoder: NonNegative = Field(
        default=0.0,
        description="masked_lm: factor of the loss on hidden tokens that a light decoder predicts from the example's "
        "aggregated vector alone; evaluate then compares its accuracy and time with the head's; 0: no decoder",
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
    """Distance of the student's last layer from its state at the end of the previous stage."""

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
    feature_map: FeatureMap | None = None
    attention: Attention | None = None
    pairwise: Pairwise | None = None
    ckd: ContextualKD | None = None
    contrastive: Contrastive | None = None
    sp: SimilarityPreserving | None = None
    rkd: RelationalKD | None = None
    cka: KernelAlignment | None = None
    pkt: ProbabilisticTransfer | None = None
    trajectory: Trajectory | None = None
    fdd: FeatureDynamics | None = None
    domain: DomainMapping | None = None
    smooth: Smooth | None = None

    @classmethod
    def place(cls) -> tuple[str, ...]:
        return ("terms",)

    def named(self) -> dict[str, Term]:
        return {name: term for name, term in self if term is not None and term.weight > 0}


def settings_of(name: str) -> type[Term]:
    """Return the class of a term's settings."""
    return get_args(Terms.model_fields[name].annotation)[0]
