"""Compare the attention of mapped layers, or other relations of their queries, keys and values."""

from math import gcd

import torch
from torch import Tensor

from dsdistill.alignment.drawn import rows_of
from dsdistill.alignment.layer_map import layer_map
from dsdistill.alignment.terms.base import AlignmentTerm, Pair, Shape
from dsdistill.config import UserError
from dsdistill.config.terms import Attention, LayerMap, Relation, RelationHeads
from dsdistill.models.trace import AttentionTrace, Geometry
from dsdistill.ops import attention_alignment, relation_heads
from dsdistill.ops.attention.pairs import Pairs


class AttentionTerm(AlignmentTerm):
    """Sum over relations the KL of the probabilities, their squared difference, or the raw scores' squared difference.

      query_key                            attention itself (MiniLM, Wang et al. 2020, Eq. 4; TinyBERT, Jiao et al.
                                           2020, Eq. 7 with score_mse)
      value_value                          softmax(V Vᵀ / √d) instead (MiniLM, section 3.2)
      query_query, key_key, value_value    heads joined and split anew into relation_heads of width d_r, scaled by
                                           1/√d_r of each model (MiniLMv2, Wang et al. 2021, section 3.1)

    With `relation_heads` the models may differ in heads and widths. With `heads: mean` probabilities are averaged over
    the heads of each model. With `heads: group` a student head learns from the average of H_T / H_S neighbouring
    teacher heads. These groups are this project's own choice: trained heads have no order, but groups keep one map for
    each student head. A causal model's relations see the same keys as its attention. The papers average over each
    sequence and then over sequences; here every valid row has the same weight. With `rows`, training compares only that
    many rows of each sequence, or packed row. Averaged over the draws, the loss and its gradient are those of all rows.
    Evaluation compares all rows.
    """

    name = "attention"
    config: Attention

    def __init__(self, config: Attention, pair: Pair):
        super().__init__(config, pair)
        own, theirs = (shape.attending for shape in pair.shapes)
        self._map_layers(config, _attention_map(config.layers, own, theirs), (len(own), len(theirs)))
        self.student_attention = frozenset(student for student, _ in self.layers)
        self.teacher_attention = frozenset(teacher for _, teacher in self.layers)
        self.needs_values = "value_value" in config.relations
        self.needs_unrotated = bool(self.unrotated)
        if len(set(config.relations)) < len(config.relations):
            raise UserError("terms.attention.relations", list(config.relations), "each relation once")
        if config.heads != "match" and config.divergence == "score_mse":
            raise UserError(
                "terms.attention.divergence", f"score_mse with heads: {config.heads}", "kl or mse"
            )
        if config.heads != "match" and config.relation_heads is not None:
            raise UserError("terms.attention.heads", f"{config.heads} with relation_heads", "match")
        self.relation_heads = {relation: self._check_heads(relation) for relation in config.relations}
        self.heads = self.relation_heads[config.relations[0]]  # the heads in counts()

    def _check_heads(self, relation: str) -> int:
        """Return how many heads are compared in one relation."""
        student, teacher = (_joined(shape, relation) for shape in self.pair.shapes)
        wanted = self._wanted_heads(relation, student, teacher)
        if wanted is not None:
            for place, (heads, width) in (("student", student), ("teacher", teacher)):
                if heads * width % wanted:
                    raise UserError(
                        "terms.attention.relation_heads",
                        f"{wanted} for {relation}",
                        f"a divisor of the {place}'s {heads} heads × {width}",
                    )
            return wanted
        if self.config.heads == "mean":
            return 1
        divides = teacher[0] % student[0] == 0
        if student[0] != teacher[0] and not (self.config.heads == "group" and divides):
            where = "" if relation == "query_key" else f" in {relation}"
            raise UserError(
                "terms.attention.heads",
                f"{self.config.heads} for {student[0]} student and {teacher[0]} teacher heads{where}",
                "heads: mean, heads: group or relation_heads"
                if divides
                else "heads: mean, or relation_heads",
            )
        return student[0]

    def _wanted_heads(self, relation: str, student: tuple[int, int], teacher: tuple[int, int]) -> int | None:
        """Return how many heads one relation is split into; None: the models' own heads."""
        wanted = self.config.relation_heads
        if isinstance(wanted, RelationHeads):
            kind = relation.split("_")[0]
            number = getattr(wanted, kind)
            if number is None:
                raise UserError(
                    "terms.attention.relation_heads", f"none for {kind}", f"a number, which {relation} needs"
                )
            return number
        if wanted != "auto":
            return wanted
        common = gcd(student[0] * student[1], teacher[0] * teacher[1])
        return next(heads for heads in range(student[0], 0, -1) if common % heads == 0)

    @property
    def unrotated(self) -> tuple[str, ...]:
        """Return the relations that need queries and keys from before their rotation by position.

        RoPE is made for query·key, which then depends only on the distance between positions. Splitting heads anew
        mixes their rotations, and in a product of two queries or of two keys the rotations have no meaning.
        """
        mixed = self.config.relation_heads is not None
        return tuple(r for r in self.config.relations if r != "value_value" and (mixed or r != "query_key"))

    def check_models(self, seen, hidden_rotation):
        self.check_geometry(*seen)
        for place, kind in hidden_rotation.items() if self.unrotated else ():
            split = " with relation_heads" if self.config.relation_heads is not None else ""
            raise UserError(
                "terms.attention.relations",
                f"{', '.join(self.unrotated)}{split} for a {place} of model type {kind}, which rotates queries and "
                "keys by their position in its own way",
                "value_value, or query_key without relation_heads",
            )

    def check_geometry(self, student: dict[int, Geometry], teacher: dict[int, Geometry]) -> None:
        """Raise UserError unless mapped layers see the same keys. student, teacher: geometry by layer."""
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
                mask = batch.unpacked.mask
                pairs = Pairs(mask.shape[1], mask, shape.causal, shape.window, segments=None)
                entries[shape] = self.heads * pairs.count(len(mask), mask.device).double()
        return torch.stack([entries[geometry[layer]] for layer, _ in self.layers])

    def sums(self, student, teacher, batch):
        self.check_geometry(*({n: t.geometry for n, t in of.attention.items()} for of in (student, teacher)))
        return torch.stack(
            [self._layer_sum(s, student.attention[s], teacher.attention[t], batch) for s, t in self.layers]
        )

    def _layer_sum(self, layer: int, mine: AttentionTrace, other: AttentionTrace, batch) -> Tensor:
        total: Tensor | float = 0.0
        rows = rows_of(batch, self.config.rows, layer, self.training)  # the same for all relations
        for relation, heads in self.relation_heads.items():
            query, key, scale = self._related(mine, relation)
            other_query, other_key, other_scale = self._related(other, relation)
            difference = attention_alignment(
                query,
                key,
                other_query,
                other_key,
                mask=batch.mask,
                causal=mine.geometry.causal,
                window=mine.geometry.window,
                segments=batch.segments,
                rows=rows,
                student_scale=scale,
                teacher_scale=other_scale,
                divergence=self.config.divergence,
                heads=self.config.heads,
                reduction="sum",
                backend=self.pair.backend,
            )
            total = total + difference * (self.heads / heads)  # each relation is a mean over its own heads
        assert isinstance(total, Tensor)  # a config has one relation at least
        return total

    def _related(self, trace: AttentionTrace, relation: Relation) -> tuple[Tensor, Tensor, float]:
        """Return the relation's left side (B, H, N, D), right side (B, H_kv, N, D), and the scale of their products."""
        before = relation in self.unrotated and trace.unrotated_query is not None
        left, right = (
            getattr(trace, f"unrotated_{name}" if before else name) for name in relation.split("_")
        )
        if self.config.relation_heads is not None:
            heads = self.relation_heads[relation]
            if left is not right and left.shape[1] != right.shape[1]:  # a key head serves several queries
                right = right.repeat_interleave(left.shape[1] // right.shape[1], dim=1)
            left, right = relation_heads(left, heads), relation_heads(right, heads)
        elif relation == "query_key":
            return left, right, trace.scale
        return left, right, left.shape[-1] ** -0.5


def _attention_map(
    layers: LayerMap, student: tuple[int, ...], teacher: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Return the (student, teacher) pairs of attention layers for a layer map, numbered as in the models.

    student, teacher: the layers that have attention; a named map (uniform, last, ...) picks among them.
    """
    place = "terms.attention.layers"
    if isinstance(layers, str):
        for name, own in (("student", student), ("teacher", teacher)):
            if not own:
                raise UserError(place, f"{layers} for a {name} without attention", "a model with attention")
        pairs = layer_map(layers, len(student), len(teacher), place)
        return tuple((student[s - 1], teacher[t - 1]) for s, t in pairs)
    for pair in layers:
        for name, layer, own in zip(("student", "teacher"), pair, (student, teacher), strict=True):
            if layer <= max(own, default=0) and layer not in own:
                among = ", ".join(map(str, own))
                raise UserError(place, f"{name} layer {layer}, which has no attention", f"one of {among}")
    return layer_map(layers, max(student, default=0), max(teacher, default=0), place)


def _joined(shape: Shape, relation: str) -> tuple[int, int]:
    """Return how many heads a relation compares, and their width."""
    return (shape.heads if relation.startswith("query") else shape.key_heads), shape.head_width
