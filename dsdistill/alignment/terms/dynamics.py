"""Compare predictions of middle layers and how they change (feature dynamics distillation)."""

import itertools

import torch
from torch import Tensor

from dsdistill.alignment.layer_map import layer_map
from dsdistill.alignment.lens import change_alignment
from dsdistill.alignment.terms.base import AlignmentTerm, Pair
from dsdistill.alignment.terms.soft_label import common_vocabulary
from dsdistill.alignment.terms.task import count_predicted, counted_states
from dsdistill.config import UserError
from dsdistill.config.terms import FeatureDynamics
from dsdistill.models.trace import Trace
from dsdistill.ops import soft_label_alignment


class FeatureDynamicsTerm(AlignmentTerm):
    """Compute levels · Σ_l KL(p_T^l ‖ p_S^l) + changes · Σ_l (1 − cos(Δy_T^l, Δy_S^l)), means over tokens.

    y^l = log softmax(head(norm(h_l))) is what the model would predict if layer l were its last (the logit lens), and
    Δy^l is its change to the next mapped layer. Only the student's layers learn: its head is a constant here, because
    otherwise the lens could be fitted instead of the layers. This is one of the base losses of MTA (arXiv 2605.01374);
    the default weights of 1 are those of a reproduction. The term soft_label compares the models' own predictions.
    """

    name = "fdd"
    config: FeatureDynamics
    needs_lens = True
    needs_labels = True

    def __init__(self, config: FeatureDynamics, pair: Pair):
        super().__init__(config, pair)
        if pair.task != "causal_lm":
            raise UserError(
                "terms.fdd", f"task {pair.task}", "causal_lm (a classifier's head reads no middle layer)"
            )
        mine, other = pair.shapes
        self.layers = layer_map(config.layers, mine.depth, other.depth, "terms.fdd.layers")
        if config.changes and len(self.layers) < 2:
            raise UserError("terms.fdd.layers", "one layer", "two or more, or changes: 0")
        if not config.levels and not config.changes:
            raise UserError("terms.fdd", "levels 0 and changes 0", "one of them above 0")
        self.common = common_vocabulary(pair, "terms.fdd")
        self.student_hidden = frozenset(student for student, _ in self.layers)
        self.teacher_hidden = frozenset(teacher for _, teacher in self.layers)
        weights = [config.levels] * len(self.layers) * bool(config.levels)
        weights += [config.changes] * (len(self.layers) - 1) * bool(config.changes)
        self.parts = len(weights)
        self.weighting.values = weights

    def counts(self, batch, geometry):
        return count_predicted(batch, self.pair.task).expand(self.parts)

    def sums(self, student, teacher, batch):
        mine, other = (
            [_lens(trace, layer) for layer in layers]
            for trace, layers in zip((student, teacher), zip(*self.layers, strict=True), strict=True)
        )
        heads, biases = zip(*(self._head(trace) for trace in (student, teacher)), strict=True)
        options = {"student_bias": biases[0], "teacher_bias": biases[1]}
        options |= {"student_softcap": student.softcap, "teacher_softcap": teacher.softcap}
        options |= counted_states(batch, self.pair.task)
        sums = []
        if self.config.levels:
            sums += [
                soft_label_alignment(
                    s, heads[0], t, heads[1], reduction="sum", backend=self.pair.logit_backend, **options
                )
                for s, t in zip(mine, other, strict=True)
            ]
        if self.config.changes:
            sums += [
                change_alignment(s, heads[0], t, heads[1], **options)
                for s, t in zip(itertools.pairwise(mine), itertools.pairwise(other), strict=True)
            ]
        return torch.stack(sums)

    def _head(self, trace: Trace) -> tuple[Tensor, Tensor | None]:
        cut = slice(None, self.common)
        assert trace.head is not None  # the task is causal_lm, whose traces have a head
        bias = trace.head_bias
        return trace.head[cut].detach(), None if bias is None else bias[cut].detach()


def _lens(trace: Trace, layer: int) -> Tensor:
    """Return (B, N−1, D): a layer's states at the positions that predict, as the head reads them."""
    states = trace.hidden[layer][:, :-1]
    states = states if trace.norm is None else trace.norm(states)
    return states if trace.factor == 1 else states * trace.factor
