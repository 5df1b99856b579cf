"""Make the measured calls of the microbenchmark, one per operator, with the operations and bytes of its definition."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsdistill.alignment.drawn import stratified
from dsdistill.bench.cases import FUNCTIONS


def device() -> str:
    """Return the device that everything here is measured on: the GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=device())


@dataclass(frozen=True)
class Work:
    """A Work is one measured call.

    flops and bytes: those of the definition, forward and backward, with each tensor read or written once.
    """

    operator: str
    label: str
    student: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...]
    names: tuple[str, ...]
    options: dict
    flops: float
    bytes: float

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return the operator's tensors by the names of its arguments."""
        return dict(zip(self.names, (*self.student, *self.fixed), strict=True))

    def loss(self, backend: str) -> Tensor:
        """Return the loss of one call."""
        return FUNCTIONS[self.operator](**self.tensors, **self.options, backend=backend)


def attention_work(
    batch=4,
    heads=12,
    tokens=1024,
    width=64,
    divergence="kl",
    causal=False,
    masked=False,
    packed=False,
    group=1,
    rows=0,
    dtype=torch.float32,
):
    """Return a call of attention.

    masked: the lengths of sequences range from whole to half. packed: each sequence has three documents. group: query
    heads per key head. rows: number of queries of a sequence that are compared, one from each part of it; 0: all.
    """
    query, teacher_query = (randn(batch, heads, tokens, width).to(dtype) for _ in range(2))
    key, teacher_key = (randn(batch, heads // group, tokens, width).to(dtype) for _ in range(2))
    lengths = [tokens - i * tokens // (2 * batch) if masked else tokens for i in range(batch)]
    cuts = [0, tokens // 8, tokens // 2, tokens] if packed else [0, tokens]
    parts = [max(0, min(b, n) - a) for n in lengths for a, b in itertools.pairwise(cuts)]
    conditions = {}
    places = torch.arange(tokens, device=device()).expand(batch, tokens)
    if masked:
        conditions["mask"] = places < torch.tensor(lengths, device=device())[:, None]
    if packed:
        conditions["segments"] = (places >= cuts[1]).int() + (places >= cuts[2]).int()
    if rows:
        conditions["row_index"] = drawn(lengths, rows)
    flags = {
        "causal": causal,
        "masked": masked,
        "packed": packed,
        f"group {group}": group > 1,
        f"R{rows}": rows > 0,
    }
    label = f"{divergence} B{batch} H{heads} N{tokens} D{width}"
    return Work(
        "attention",
        " ".join([label, *(name for name, chosen in flags.items() if chosen)]),
        (query.requires_grad_(), key.requires_grad_()),
        (teacher_query, teacher_key, *conditions.values()),
        ("student_query", "student_key", "teacher_query", "teacher_key", *conditions),
        {"divergence": divergence, "causal": causal},
        8 * heads * width * sum(n * (n + 1) / 2 if causal else n**2 for n in parts) * share_of(lengths, rows),
        3 * (query.numel() + key.numel()) * query.element_size(),
    )


def drawn(lengths: list[int], rows: int) -> Tensor:
    """Return (B, R) positions, drawn as in a training step."""
    counts = torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randint(2**31, (len(lengths), rows), generator=generator) % counts
    return stratified(offsets, counts).to(device())


def share_of(lengths: list[int], rows: int) -> float:
    """Return the share of the sequences' rows that is compared."""
    return sum(min(rows, n) for n in lengths) / sum(lengths) if rows else 1.0


def pairwise_work(batch=1, tokens=512, width=768, relation="cosine", rows=0, dtype=torch.float32):
    """Return a call of pairwise; rows: as in attention_work."""
    chosen = {"row_index": drawn([tokens] * batch, rows)} if rows else {}
    student, teacher = (randn(batch, tokens, width).to(dtype) for _ in range(2))
    return Work(
        "pairwise",
        f"{relation} B{batch} N{tokens} D{width}" + (f" R{rows}" if rows else ""),
        (student.requires_grad_(),),
        (teacher, *chosen.values()),
        ("student", "teacher", *chosen),
        {"relation": relation},
        8 * batch * tokens**2 * width * share_of([tokens], rows),
        3 * student.numel() * student.element_size(),
    )


def hidden_work(
    tokens=2048, width=768, teacher_width=1024, projected=True, divergence="mse", dtype=torch.float32
):
    student = randn(1, tokens, width).to(dtype)
    teacher = randn(1, tokens, teacher_width if projected else width).to(dtype)
    if not projected:
        return Work(
            "hidden",
            f"{divergence} {tokens} tokens {width}",
            (student.requires_grad_(),),
            (teacher,),
            ("student", "teacher"),
            {"divergence": divergence},
            4 * tokens * width,
            3 * student.numel() * student.element_size(),
        )
    projection = (randn(teacher_width, width) * width**-0.5).to(dtype)
    return Work(
        "hidden",
        f"{divergence} {tokens} tokens {width}→{teacher_width}",
        (student.requires_grad_(), projection.requires_grad_()),
        (teacher,),
        ("student", "projection", "teacher"),
        {"divergence": divergence},
        6 * tokens * width * teacher_width,
        (2 * student.numel() + teacher.numel() + 2 * projection.numel()) * student.element_size(),
    )


def soft_label_work(tokens=512, vocabulary=30522, width=768, divergence="forward_kl", dtype=torch.float32):
    hidden = [randn(1, tokens, width).to(dtype) for _ in range(2)]
    heads = [(randn(vocabulary, width) * width**-0.5).to(dtype) for _ in range(2)]
    return Work(
        "soft-label",
        f"{divergence} {tokens} tokens V{vocabulary} D{width}",
        (hidden[0].requires_grad_(), heads[0].requires_grad_()),
        (hidden[1], heads[1]),
        ("student_hidden", "student_head", "teacher_hidden", "teacher_head"),
        {"divergence": divergence},
        8 * tokens * vocabulary * width,
        (3 * hidden[0].numel() + 3 * heads[0].numel()) * hidden[0].element_size(),
    )


def vocabulary_work(tokens=512, vocabulary=30522, width=768, divergence="forward_kl", dtype=torch.float32):
    soft = soft_label_work(tokens, vocabulary, width, divergence, dtype)
    labels = torch.randint(vocabulary, (1, tokens), device=device())
    return Work(
        "vocabulary",
        f"task and {soft.label}",
        soft.student,
        (*soft.fixed, labels),
        (*soft.names, "labels"),
        soft.options,
        soft.flops,
        soft.bytes,
    )


def cross_entropy_work(tokens=512, vocabulary=30522, width=768, dtype=torch.float32):
    soft = soft_label_work(tokens, vocabulary, width, dtype=dtype)
    labels = torch.randint(vocabulary, (1, tokens), device=device())
    return Work(
        "cross-entropy",
        f"task {tokens} tokens V{vocabulary} D{width}",
        soft.student,
        (labels,),
        ("hidden", "head", "labels"),
        {},
        6 * tokens * vocabulary * width,
        soft.bytes,
    )


WORKS: dict[str, Callable[..., Work]] = {
    "attention": attention_work,
    "pairwise": pairwise_work,
    "hidden": hidden_work,
    "soft-label": soft_label_work,
    "cross-entropy": cross_entropy_work,
    "vocabulary": vocabulary_work,
}
