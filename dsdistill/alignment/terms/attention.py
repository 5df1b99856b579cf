"""Attention of mapped layers, from queries and keys."""

import torch

from dsdistill.alignment.layer_map import layer_map
from dsdistill.alignment.terms.base import AlignmentTerm, Pair
from dsdistill.config import UserError
from dsdistill.config.terms import Attention
from dsdistill.models.trace import Geometry
from dsdistill.ops import attention_alignment
from dsdistill.ops.attention.pairs import Pairs


class AttentionTerm(AlignmentTerm):
    """KL of the probabilities (MiniLM), their squared difference, or that of the raw scores (TinyBERT)."""

    def __init__(self, config: Attention, pair: Pair):
        super().__init__(config, pair)
        self._map_layers(
            layer_map(config.layers, pair.student.depth, pair.teacher.depth, "terms.attention.layers"),
            config.layer_agg,
        )
        self.student_attention = frozenset(student for student, _ in self.layers)
        self.teacher_attention = frozenset(teacher for _, teacher in self.layers)
        mine, other = pair.student.heads, pair.teacher.heads
        if config.heads == "match" and mine != other:
            raise UserError(
                "terms.attention.heads", f"match for {mine} student and {other} teacher heads", "heads: mean"
            )
        if config.heads == "mean" and config.divergence == "score_mse":
            raise UserError("terms.attention.divergence", "score_mse with heads: mean", "kl or mse")
        self.heads = mine if config.heads == "match" else 1

    def check_geometry(self, student: dict[int, Geometry], teacher: dict[int, Geometry]) -> None:
        """Raise UserError unless mapped layers see the same keys; both by layer."""
        for layer, other in self.layers:
            if student[layer] != teacher[other]:
                raise UserError(
                    "terms.attention.layers",
                    f"student layer {layer} with {student[layer]} and teacher layer {other} with {teacher[other]}",
                    "pairs of layers that see the same keys",
                )

    def counts(self, batch, geometry):
        if self.config.divergence == "kl":
            return (self.heads * batch.mask.sum()).double().expand(self.parts)
        entries = {}  # layers of one geometry share their count
        for layer, _ in self.layers:
            shape = geometry[layer]
            if shape not in entries:
                pairs = Pairs(batch.mask.shape[1], batch.mask, shape.causal, shape.window, segments=None)
                entries[shape] = self.heads * pairs.count(len(batch.mask), batch.mask.device).double()
        return torch.stack([entries[geometry[layer]] for layer, _ in self.layers])

    def sums(self, student, teacher, batch):
        self.check_geometry(*({n: t.geometry for n, t in of.attention.items()} for of in (student, teacher)))
        sums = []
        for layer, other_layer in self.layers:
            mine, other = student.attention[layer], teacher.attention[other_layer]
            sums.append(
                attention_alignment(
                    mine.query,
                    mine.key,
                    other.query,
                    other.key,
                    mask=batch.mask,
                    causal=mine.geometry.causal,
                    window=mine.geometry.window,
                    student_scale=mine.scale,
                    teacher_scale=other.scale,
                    divergence=self.config.divergence,
                    heads=self.config.heads,
                    reduction="sum",
                    backend=self.pair.backend,
                )
            )
        return torch.stack(sums)
