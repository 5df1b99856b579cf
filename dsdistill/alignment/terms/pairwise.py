"""How the tokens of a sequence relate to each other (Tung & Mori 2019; Park et al. 2019)."""

import torch

from dsdistill.alignment.layer_map import layer_map
from dsdistill.alignment.terms.base import AlignmentTerm, Pair
from dsdistill.config.terms import Pairwise
from dsdistill.ops import pairwise_alignment


class PairwiseTerm(AlignmentTerm):
    """Difference of the two models' token-by-token relations; needs no projector, widths may differ."""

    def __init__(self, config: Pairwise, pair: Pair):
        super().__init__(config, pair)
        self._map_layers(
            layer_map(config.layers, pair.student.depth, pair.teacher.depth, "terms.pairwise.layers"),
            config.layer_agg,
        )
        self.student_hidden = frozenset(student for student, _ in self.layers)
        self.teacher_hidden = frozenset(teacher for _, teacher in self.layers)

    def counts(self, batch, geometry):
        return batch.rows.sum().double().expand(self.parts)

    def sums(self, student, teacher, batch):
        return torch.stack(
            [
                pairwise_alignment(
                    student.hidden[mine],
                    teacher.hidden[other],
                    mask=batch.mask,
                    relation=self.config.relation,
                    reduction="sum",
                    backend=self.pair.backend,
                )
                for mine, other in self.layers
            ]
        )
