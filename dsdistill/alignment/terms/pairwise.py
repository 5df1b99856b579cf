"""Compare how the tokens of a sequence relate to each other (Tung & Mori 2019; Park et al. 2019)."""

import torch
from torch import Tensor

from dsdistill.alignment.drawn import rows_of
from dsdistill.alignment.layer_map import layer_map
from dsdistill.alignment.terms.base import AlignmentTerm, Pair
from dsdistill.alignment.units import mean_pool, unpacked, wide
from dsdistill.config import UserError
from dsdistill.config.terms import Pairwise
from dsdistill.data.batch import Batch
from dsdistill.ops import pairwise_alignment


class PairwiseTerm(AlignmentTerm):
    """Compare the two models' token-by-token relations; no projector is needed, and widths may differ.

    With `center` and cosines it is L_struct of the structured multi-stage method, whose paper names φ and ψ without a
    formula. There are two readings: φ and ψ both give the centred, row-normalised Gram matrix of a sequence's tokens,
    or φ is a PCA fitted on the teacher and ψ a trained linear map. This term is the first reading, HiddenTerm
    (`components`) the second. This term has no parameters: if φ and ψ were trained together on this loss alone, both
    would collapse to 0. With `rows`, training relates that many tokens of each sequence, drawn anew at each step, to
    all of its tokens; evaluation relates all. The last layer is read after the final norm, or with `final_norm: before`
    as the layer outputs it.
    """

    name = "pairwise"
    config: Pairwise

    def __init__(self, config: Pairwise, pair: Pair):
        super().__init__(config, pair)
        if config.center and config.relation == "distance":
            raise UserError("terms.pairwise.center", "true with relation: distance", "cosine or dot")
        if config.rows is not None and config.relation == "distance":
            got = f"{config.rows} with relation: distance, whose mean takes all pairs"
            raise UserError("terms.pairwise.rows", got, "cosine or dot")
        mine, other = pair.shapes
        self._map_layers(config, layer_map(config.layers, mine.depth, other.depth, "terms.pairwise.layers"))
        self.student_hidden = frozenset(student for student, _ in self.layers)
        self.teacher_hidden = frozenset(teacher for _, teacher in self.layers)

    def _units(self, states: Tensor, batch: Batch) -> Tensor:
        """Return the vectors whose relations are compared, one sequence in each row, centred if `center` is set."""
        rows = unpacked(states, batch)
        return wide(rows) - mean_pool(rows, batch.unpacked.mask)[:, None] if self.config.center else rows

    def counts(self, batch, geometry):
        return batch.documents.sum().double().expand(self.parts)

    def sums(self, student, teacher, batch):
        return torch.stack(
            [
                pairwise_alignment(
                    self._units(self.state(student, mine), batch),
                    self._units(self.state(teacher, other), batch),
                    mask=batch.unpacked.mask,
                    relation=self.config.relation,
                    rows=rows_of(batch.unpacked, self.config.rows, mine, self.training),
                    reduction="sum",
                    backend=self.pair.backend,
                )
                for mine, other in self.layers
            ]
        )
