"""Define what the settings of all loss terms share.

Layers are counted from 1; layer 0 is the output of the embeddings, as in the papers of the losses.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from dsdistill.config.explain import explain
from dsdistill.config.section import NonNegative, Section

LayerPair = Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], Field(strict=False)]
LayerPairs = Annotated[tuple[LayerPair, ...], Field(strict=False, min_length=1)]
# How student layers are mapped to teacher layers; an explicit map lists [student, teacher] pairs.
LayerMap = Literal["uniform", "skip", "last", "emd", "cka_offline"] | LayerPairs
LayerWeights = (
    Literal["uniform", "dynamic"] | Annotated[tuple[NonNegative, ...], Field(strict=False, min_length=1)]
)


class ConstructedSection(Section):
    """A ConstructedSection may also be built in code; mistakes then raise the same UserError as in a config."""

    def __init__(self, /, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise explain(error.errors(), type(self), within=self.place()) from None

    @classmethod
    def place(cls) -> tuple[str, ...]:
        """Return the keys that lead to this section in a config; for a section that no field has, the class name."""
        from dsdistill.config.terms import Terms, settings_of  # which builds on this file

        name = next((name for name in Terms.model_fields if settings_of(name) is cls), None)
        return (cls.__name__,) if name is None else ("terms", name)

    # Within a config pydantic validates this section itself, and reports mistakes by their place in that config.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # a function takes any attribute


class Term(ConstructedSection):
    """Term is the base class of all terms: a weight, and properties that say what the term needs from a run."""

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


class Layered(Term):
    layers: LayerMap = Field(
        default="uniform",
        description="which student layer learns from which teacher layer; uniform: layer l of L_S from layer "
        "l · L_T / L_S, rounded; skip: from every ⌊L_T / L_S⌋-th, but the last student layer from none (PKD); last: "
        "the last from the last; a list of [student, teacher] pairs; emd: every pair, with new weights at each step; "
        "cka_offline: the most similar layers in order, found before training",
    )
    layer_agg: Literal["mean", "sum"] = Field(
        default="mean", description="how the losses of the mapped layers are combined"
    )
    layer_weights: LayerWeights = Field(
        default="uniform",
        description="dynamic: layers that lag behind gain weight during training; a list: λ of each mapped layer in "
        "order (the embeddings first), for a weighted sum in place of layer_agg",
    )
    layer_masses: Literal["own", "shared"] = Field(
        default="own",
        description="for layers: emd; own: the term has its own masses of layers; shared: after each step the masses "
        "are the mean over all terms that share them, as in BERT-EMD's code",
    )


class States(Term):
    """States holds the settings that all terms over hidden states share."""

    final_norm: Literal["after", "before"] = Field(
        default="after",
        description="whether the last layer's states are read after the final norm (as in transformers' "
        "hidden_states[-1] and other libraries) or before it; no difference for models without such a norm (BERT)",
    )
