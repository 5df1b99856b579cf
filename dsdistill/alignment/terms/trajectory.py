"""Align words and phrases layer by layer: multi-granularity trajectory alignment (MTA, arXiv 2605.01374)."""

import torch
from torch import Tensor, nn

from dsdistill.alignment.layer_map import layer_map
from dsdistill.alignment.projector import Projector
from dsdistill.alignment.span_grid import SpanGrid, even_weights, token_weights
from dsdistill.alignment.terms.base import AlignmentTerm, Pair
from dsdistill.alignment.units import unpacked
from dsdistill.config import UserError
from dsdistill.config.terms import Trajectory
from dsdistill.data.batch import PHRASE, WORD
from dsdistill.ops import pairwise_alignment


class TrajectoryTerm(AlignmentTerm):
    """Compute λ_DSA · mean over layers of DSA + λ_Hid · sum over layers of Hid; DSA and Hid are means over sequences.

      DSA  Σ_i Σ_{j≠i} ŵ_i ŵ_j (cos_S(i, j) − cos_T(i, j))² over the spans of a sequence. A span is the weighted mean of
           its tokens' states; ŵ is its share of the weight. `pairs: upper` takes only i < j, which is half of the sum.
      Hid  Σ_t w_t (1 − cos(W h_S, h_T)) over the tokens in a span; each layer has a trained W.

    Token weights w come from the teacher's states of the same layer and are used for both models; `weighted: false`
    gives all tokens of a sequence the same weight. Lower layers compare words, upper layers phrases. No code is
    published: which weights the student's spans take, which pairs are summed, and the mean over sequences are this
    project's own readings. A sequence with fewer than two spans has a DSA of 0. The last layer is read after the final
    norm, or with `final_norm: before` as the layer outputs it.
    """

    name = "trajectory"
    config: Trajectory
    needs_spans = True

    def __init__(self, config: Trajectory, pair: Pair):
        super().__init__(config, pair)
        mine, other = pair.shapes
        self.mapped = [  # (kind of span, student layer, teacher layer)
            (kind, student, teacher)
            for kind, place in ((WORD, "word_layers"), (PHRASE, "phrase_layers"))
            for student, teacher in layer_map(
                getattr(config, place), mine.depth, other.depth, f"terms.trajectory.{place}"
            )
        ]
        if not self.mapped:
            raise UserError("terms.trajectory", "neither word_layers nor phrase_layers", "one pair at least")
        if not config.structure and not config.hidden:
            raise UserError("terms.trajectory", "structure 0 and hidden 0", "one of them above 0")
        self.student_hidden = frozenset(student for _, student, _ in self.mapped)
        self.teacher_hidden = frozenset(teacher for _, _, teacher in self.mapped)
        count = len(self.mapped)
        weights = [config.structure / count] * count * bool(config.structure)
        weights += [config.hidden] * count * bool(config.hidden)
        self.parts = len(weights)
        self.weighting.values = weights
        names = [_name(*layer) for layer in self.mapped if config.hidden]
        self.projectors = nn.ModuleDict({name: Projector(mine.width, other.width) for name in names})

    def counts(self, batch, geometry):
        return batch.documents.sum().double().expand(self.parts)

    def sums(self, student, teacher, batch):
        rows = batch.unpacked
        grids = {
            kind: SpanGrid(rows.spans[rows.spans[:, 3] == kind], *rows.mask.shape)
            for kind in {kind for kind, *_ in self.mapped}
        }
        own = {n: unpacked(self.state(student, n), batch) for n in self.student_hidden}
        theirs = {n: unpacked(self.state(teacher, n), batch) for n in self.teacher_hidden}
        weigh = token_weights if self.config.weighted else even_weights
        weights = {n: weigh(states, rows.mask) for n, states in theirs.items()}
        structure, hidden = [], []
        for kind, mine, other in self.mapped:
            states = own[mine], theirs[other]
            if self.config.structure:
                structure.append(self._structure(*states, grids[kind], weights[other]))
            if self.config.hidden:
                hidden.append(
                    self.projectors[_name(kind, mine, other)](
                        *states,
                        mask=rows.mask & grids[kind].covered,
                        weights=weights[other],
                        divergence="cosine",
                        reduction="sum",
                        backend=self.pair.backend,
                    )
                )
        return torch.stack(structure + hidden)

    def _structure(self, student: Tensor, teacher: Tensor, grid: SpanGrid, weights: Tensor) -> Tensor:
        if not grid.mask.any():
            return student[:, :0].sum().to(weights.dtype)  # 0
        difference = pairwise_alignment(
            grid.vectors(student, weights),
            grid.vectors(teacher.detach(), weights),
            mask=grid.mask,
            weights=grid.weights(weights),
            relation="cosine",
            reduction="sum",
            backend=self.pair.backend,
        )
        return difference if self.config.pairs == "ordered" else difference / 2


def _name(kind: int, student: int, teacher: int) -> str:
    return f"{'phrase' if kind == PHRASE else 'word'}-{student}-{teacher}"
