"""Make the inputs on which every operator is checked: ordinary shapes, odd shapes and extreme values, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsdistill import ops
from dsdistill.ops.soft_label.divergence import DIVERGENCES

# Weights of task and soft labels in the checked total of `vocabulary_losses`.
WEIGHTS = (0.7, 1.6)


def vocabulary_total(**arguments) -> Tensor:
    """Return the weighted sum of task and soft labels."""
    return ops.vocabulary_losses(**arguments, weights=WEIGHTS).total


def with_rows(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an operator that takes its rows as two tensors, row_index and row_weights, both optional."""

    def call(*given, row_index: Tensor | None = None, row_weights: Tensor | None = None, **options) -> Tensor:
        return function(*given, rows=None if row_index is None else (row_index, row_weights), **options)

    return call


FUNCTIONS = {
    "attention": with_rows(ops.attention_alignment),
    "pairwise": with_rows(ops.pairwise_alignment),
    "hidden": ops.hidden_alignment,
    "soft-label": ops.soft_label_alignment,
    "cross-entropy": ops.token_cross_entropy,
    "vocabulary": vocabulary_total,
}

# The tensors that get gradients, by operator, and the axis that counts tokens, by tensor.
STUDENT = {
    "attention": ("student_query", "student_key"),
    "pairwise": ("student",),
    "hidden": ("student", "projection", "bias"),
    "soft-label": ("student_hidden", "student_head", "student_bias"),
    "cross-entropy": ("hidden", "head", "bias"),
    "vocabulary": ("student_hidden", "student_head", "student_bias"),
}
TOKEN_AXIS = {
    **dict.fromkeys(("student_query", "student_key", "teacher_query", "teacher_key"), 2),
    **dict.fromkeys(("student", "teacher", "hidden", "student_hidden", "teacher_hidden"), 1),
    **dict.fromkeys(("mask", "segments", "weights", "labels"), 1),
}


@dataclass(frozen=True)
class Case:
    """A Case is one call of one operator.

    tensors: float64, integer or bool, by argument name. options: the other keyword arguments.
    cancels: the value may come from a difference that cancels; its error is relative to both models' own sizes.
    native: the "cpp" backend must be able to run it.
    gradient_floor: size of the terms that cancel if the true gradient is 0.
    """

    operator: str
    name: str
    tensors: dict[str, Tensor]
    options: dict = field(default_factory=dict)
    cancels: bool = False
    native: bool = True
    gradient_floor: float = 0.0

    def __str__(self) -> str:
        return f"{self.operator}-{self.name}"


def _normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def _ragged(batch: int, tokens: int) -> Tensor:
    """Return a mask with a full row, shorter rows, and for three or more sequences an empty one."""
    lengths = torch.tensor([max(0, tokens - index * (tokens // 2)) for index in range(batch)])
    return torch.arange(tokens)[None, :] < lengths[:, None]


def _rows(batch: int, tokens: int, rows: int) -> dict[str, Tensor]:
    """Return unordered positions, some repeated and some missing (−1), with weights."""
    generator = torch.Generator().manual_seed(7)
    index = torch.randint(-1, tokens, (batch, rows), generator=generator)
    return {"row_index": index, "row_weights": _normal(batch, rows, seed=8).abs()}


def attention_tensors(
    batch=2, heads=4, tokens=33, width=16, *, kv=None, t_heads=None, t_kv=None, t_width=None, peak=1.0
) -> dict[str, Tensor]:
    kv, t_heads, t_width = kv or heads, t_heads or heads, t_width or width
    t_kv = t_kv or t_heads
    return {
        "student_query": _normal(batch, heads, tokens, width, seed=0, scale=peak),
        "student_key": _normal(batch, kv, tokens, width, seed=1),
        "teacher_query": _normal(batch, t_heads, tokens, t_width, seed=2, scale=peak),
        "teacher_key": _normal(batch, t_kv, tokens, t_width, seed=3),
    }


def attention_cases() -> Iterator[Case]:
    scattered = torch.rand(2, 33, generator=torch.Generator().manual_seed(5)) > 0.3
    segments = (torch.arange(33) // 7).expand(2, 33)
    for divergence in ("kl", "mse", "score_mse"):
        variants = [
            ("plain", attention_tensors(), {}),
            ("causal", attention_tensors(tokens=70), {"causal": True}),
            ("ragged", attention_tensors(batch=3), {"mask": _ragged(3, 33)}),
            ("scattered-causal", attention_tensors(), {"mask": scattered, "causal": True}),
            ("window", attention_tensors(tokens=131, heads=2), {"window": 9}),
            ("window-causal", attention_tensors(tokens=131, heads=2), {"window": 70, "causal": True}),
            (
                "packed",
                attention_tensors(),
                {"segments": segments, "mask": scattered, "causal": True, "window": 4},
            ),
            ("grouped", attention_tensors(kv=2, t_kv=1, t_width=24, tokens=65), {}),
            ("grouped-ragged", attention_tensors(heads=6, kv=3, t_kv=2, t_width=8), {"mask": _ragged(2, 33)}),
            ("scales", attention_tensors(), {"student_scale": 0.5, "teacher_scale": 0.1, "reduction": "sum"}),
            ("peaked", attention_tensors(peak=12.0, tokens=40), {}),
            ("one-token", attention_tensors(tokens=1), {}),
            ("odd-width", attention_tensors(heads=3, tokens=67, width=13, t_width=7), {}),
            ("long", attention_tensors(batch=1, heads=1, tokens=299), {"causal": True}),
            ("rows", attention_tensors(tokens=131, kv=2), _rows(2, 131, 70)),
            (
                "rows-packed",
                attention_tensors(kv=2, t_kv=1),
                {**_rows(2, 33, 9), "segments": segments, "mask": scattered, "causal": True, "window": 4},
            ),
        ]
        for name, tensors, options in variants:
            tensors = dict(tensors)
            for key in ("mask", "segments", "row_index", "row_weights"):
                if key in options:
                    tensors[key] = options[key]
            options = {k: v for k, v in options.items() if k not in tensors} | {"divergence": divergence}
            cancels = divergence == "score_mse"
            yield Case("attention", f"{divergence}-{name}", tensors, options, cancels)
        if divergence != "score_mse":
            mean = attention_tensors(heads=4, kv=2, t_heads=6)
            options = {"divergence": divergence, "heads": "mean"}
            yield Case("attention", f"{divergence}-mean-heads", mean, options, native=False)
            options = {**options, "causal": True}
            masked = {**mean, "mask": scattered}
            yield Case("attention", f"{divergence}-mean-heads-masked", masked, options, native=False)
            grouped = {
                "": (attention_tensors(heads=2, t_heads=6, t_kv=3, t_width=8), {}),
                "-masked": (
                    {**attention_tensors(kv=2, t_heads=12, t_kv=4), "mask": scattered},
                    {"causal": True},
                ),
                "-packed": (
                    {**attention_tensors(t_heads=8), "mask": scattered, "segments": segments},
                    {"window": 5, "reduction": "sum"},
                ),
                "-peaked": (attention_tensors(heads=2, t_heads=4, tokens=70, peak=12.0), {"window": 9}),
                "-one-token": (attention_tensors(heads=2, t_heads=4, tokens=1), {}),
                "-rows": ({**attention_tensors(t_heads=8), **_rows(2, 33, 9)}, {"causal": True}),
            }
            for name, (tensors, options) in grouped.items():
                options = {"divergence": divergence, "heads": "group", **options}
                yield Case("attention", f"{divergence}-group-heads{name}", tensors, options, native=False)


def pairwise_cases() -> Iterator[Case]:
    for relation in ("cosine", "dot", "distance"):
        for name, batch, tokens, width, t_width in (
            ("plain", 2, 33, 24, 40),
            ("long", 2, 97, 8, 12),
            ("one-token", 2, 1, 8, 8),
            ("odd", 1, 67, 33, 5),
        ):
            tensors = {
                "student": _normal(batch, tokens, width, seed=0),
                "teacher": _normal(batch, tokens, t_width, seed=1),
            }
            cancels = relation != "distance"
            options = {"relation": relation}
            floor = 1.0 if name == "one-token" else 0.0
            yield Case("pairwise", f"{relation}-{name}", tensors, options, cancels, gradient_floor=floor)
            if tokens > 1:
                masked = {**tensors, "mask": _ragged(batch, tokens)}
                yield Case("pairwise", f"{relation}-{name}-ragged", masked, options, cancels)
                if relation != "distance":
                    chosen = {**masked, **_rows(batch, tokens, tokens // 2)}
                    yield Case("pairwise", f"{relation}-{name}-rows", chosen, options, cancels)
        weighted = {**tensors, "weights": _normal(1, 67, seed=2).abs(), "mask": _ragged(1, 67)}
        yield Case("pairwise", f"{relation}-weighted", weighted, {**options, "reduction": "sum"}, cancels)
        repeated = _normal(2, 20, 8, seed=0)
        repeated[:, 10:] = repeated[:, :10]
        twins = {"student": repeated, "teacher": _normal(2, 20, 8, seed=1)}
        yield Case("pairwise", f"{relation}-twins", twins, options, cancels)
    # Vectors of nearly the same direction, as in some layers: their distances are far smaller than their lengths.
    shifted = {"student": _normal(2, 40, 24, seed=0) + 30, "teacher": _normal(2, 40, 16, seed=1) + 30}
    yield Case("pairwise", "distance-shifted", shifted, {"relation": "distance"})


def hidden_cases() -> Iterator[Case]:
    for divergence in ("mse", "cosine"):
        options = {"divergence": divergence}
        same = {"student": _normal(2, 33, 24, seed=0), "teacher": _normal(2, 33, 24, seed=1)}
        projected = {
            "student": _normal(3, 37, 24, seed=0),
            "teacher": _normal(3, 37, 40, seed=1),
            "projection": _normal(40, 24, seed=2, scale=0.2),
        }
        bias = _normal(40, seed=3)
        weights = _normal(3, 37, seed=4).abs()
        yield Case("hidden", f"{divergence}-plain", same, options)
        yield Case("hidden", f"{divergence}-ragged", {**same, "mask": _ragged(2, 33)}, options)
        yield Case("hidden", f"{divergence}-projected", projected, options)
        yield Case(
            "hidden", f"{divergence}-bias", {**projected, "bias": bias, "mask": _ragged(3, 37)}, options
        )
        yield Case(
            "hidden", f"{divergence}-weighted", {**projected, "bias": bias, "weights": weights}, options
        )
        summed = {**options, "reduction": "sum"}
        masked = {**projected, "weights": weights, "mask": _ragged(3, 37)}
        yield Case("hidden", f"{divergence}-weighted-sum", masked, summed)
        # Widths without padding, and more tokens than the native kernel keeps between its phases.
        even = {
            "student": _normal(1, 500, 64, seed=0),
            "teacher": _normal(1, 500, 48, seed=1),
            "projection": _normal(48, 64, seed=2, scale=0.2),
            "bias": bias[:24].repeat(2),
        }
        yield Case("hidden", f"{divergence}-long", even, options)
        single = {"student": _normal(1, 1, 7, seed=0), "teacher": _normal(1, 1, 7, seed=1)}
        yield Case("hidden", f"{divergence}-one-token", single, options)


def soft_label_cases() -> Iterator[Case]:
    tensors = {
        "student_hidden": _normal(2, 33, 12, seed=0),
        "student_head": _normal(61, 12, seed=1, scale=0.5),
        "teacher_hidden": _normal(2, 33, 20, seed=2),
        "teacher_head": _normal(61, 20, seed=3, scale=0.5),
    }
    bias = {"student_bias": _normal(61, seed=4), "teacher_bias": _normal(61, seed=5)}
    for divergence in DIVERGENCES:
        options = {"divergence": divergence}
        yield Case("soft-label", f"{divergence}-plain", tensors, options, native=False)
        masked = {**tensors, **bias, "mask": _ragged(2, 33)}
        warm = {**options, "temperature": 2.5, "beta": 0.3, "alpha": 0.2}
        yield Case("soft-label", f"{divergence}-warm", masked, warm, native=False)
        peaked = {**tensors, "student_head": tensors["student_head"] * 6}
        yield Case(
            "soft-label", f"{divergence}-peaked", peaked, {**options, "reduction": "sum"}, native=False
        )
        capped = {**warm, "student_softcap": 3.0, "teacher_softcap": 1.5}
        yield Case("soft-label", f"{divergence}-capped", masked, capped, native=False)
    for name in ("student", "teacher"):
        yield Case("soft-label", f"{name}-capped", tensors, {f"{name}_softcap": 2.0}, native=False)
    labels = torch.randint(61, (2, 33), generator=torch.Generator().manual_seed(6))
    entropy = {"hidden": tensors["student_hidden"], "head": tensors["student_head"], "labels": labels}
    yield Case("cross-entropy", "plain", entropy, native=False)
    ignored = {**entropy, "labels": labels.masked_fill(~_ragged(2, 33), -100), "bias": bias["student_bias"]}
    yield Case("cross-entropy", "ragged", ignored, native=False)
    yield Case("cross-entropy", "capped", ignored, {"softcap": 2.0}, native=False)
    yield Case("cross-entropy", "smoothed", ignored, {"label_smoothing": 0.2, "softcap": 2.0}, native=False)
    yield from _vocabulary_cases({**tensors, "labels": labels}, {**bias, "labels": ignored["labels"]})


def _vocabulary_cases(tensors: dict[str, Tensor], ragged: dict[str, Tensor]) -> Iterator[Case]:
    yield Case("vocabulary", "plain", tensors, native=False)
    masked = {**tensors, **ragged}
    warm = {"temperature": 2.5, "beta": 0.3, "alpha": 0.2}
    capped = {"student_softcap": 3.0, "teacher_softcap": 1.5, "label_smoothing": 0.2}
    for divergence in DIVERGENCES:
        yield Case(
            "vocabulary", f"{divergence}-warm", masked, {"divergence": divergence, **warm}, native=False
        )
        options = {"divergence": divergence, **warm, **capped, "reduction": "sum"}
        yield Case("vocabulary", f"{divergence}-capped", masked, options, native=False)
    # Both heads are padded, the student's to more entries than the teacher's.
    padded = {
        **masked,
        "teacher_head": masked["teacher_head"][:52],
        "teacher_bias": masked["teacher_bias"][:52],
    }
    options = {**warm, "common": 50, "label_smoothing": 0.1}
    yield Case("vocabulary", "padded", padded, options, native=False)
    yield Case("vocabulary", "padded-capped", padded, {**options, **capped}, native=False)


def all_cases() -> list[Case]:
    return [*attention_cases(), *pairwise_cases(), *hidden_cases(), *soft_label_cases()]
