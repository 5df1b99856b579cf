"""Define traces: what one forward pass leaves for the alignment terms."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Hold which keys a query of one layer may see, apart from padding."""

    causal: bool
    window: int | None  # keys at distance < window are seen; None: at any distance

    def __str__(self) -> str:
        order = "causal" if self.causal else "two-sided"
        return f"{order} attention" + (f" in a window of {self.window}" if self.window else "")


@dataclass(frozen=True)
class AttentionTrace:
    """Hold the tensors from which one layer computed its attention probabilities (after rotary embedding)."""

    query: Tensor  # (B, H, N, D)
    key: Tensor  # (B, H_kv, N, D), H_kv divides H
    value: Tensor | None  # (B, H_kv, N, D_v); None if not requested
    scale: float  # the scores are scale · query · keyᵀ
    geometry: Geometry
    # Before rotary embedding, (B, H, N, D) and (B, H_kv, N, D); None if not requested, or if there is no rotation.
    unrotated_query: Tensor | None = None
    unrotated_key: Tensor | None = None


@dataclass(frozen=True)
class DomainTrace:
    """Hold the result of domain fusion in one forward pass (models/domain_fusion.py)."""

    targets: dict[int, Tensor]  # teacher layer → φ of its states, (B, N, d'); empty in evaluation
    predicted: Tensor  # (B, N, d')


@dataclass
class Trace:
    """Hold what one forward pass leaves. Layers count from 1; hidden[0] is the embeddings' output.

    hidden[L] comes before any final norm.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)  # (B, N, D)
    last: Tensor | None = (
        None  # (B, N, D), hidden[L] after the final norm; None if the model has none, or not requested
    )
    depth: int | None = None  # L, if hidden states are kept
    attention: dict[int, AttentionTrace] = field(default_factory=dict)
    logits: Tensor | None = None  # (B, C) of classifiers and regressors
    output: Tensor | None = None  # (B, N, D) of language models: what their head reads
    head: Tensor | None = None  # (V, D)
    head_bias: Tensor | None = None  # (V,)
    norm: Callable[[Tensor], Tensor] | None = (
        None  # of language models, the norm from hidden[L] to output; None: they are equal
    )
    factor: float = 1.0  # of language models: output is norm(hidden[L]) multiplied by it
    softcap: float | None = (
        None  # c of language models whose logits are c · tanh(z / c), z = output · headᵀ + bias
    )
    domain: DomainTrace | None = None  # of a student with domain fusion
    previous: "Trace | None" = None  # of a student: its trace as the stage before left it

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors of the forward pass: states, attention's inputs, and outputs, but no weights."""
        yield from self.hidden.values()
        for layer in self.attention.values():
            kept = (layer.query, layer.key, layer.value, layer.unrotated_query, layer.unrotated_key)
            yield from (x for x in kept if x is not None)
        yield from (x for x in (self.last, self.logits, self.output) if x is not None)

    def state(self, layer: int, *, after: bool) -> Tensor:
        """Return the states of a layer, (B, N, D). after: take the last layer's states after the final norm."""
        return self.last if after and layer == self.depth and self.last is not None else self.hidden[layer]
