"""Compare how the examples of a micro-batch relate to each other in both models."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from dsdistill.alignment import relations
from dsdistill.alignment.layer_map import layer_map
from dsdistill.alignment.projector import Projection
from dsdistill.alignment.terms.base import AlignmentTerm, Pair
from dsdistill.alignment.units import gather_rows, pooled, shared_sum
from dsdistill.config.terms import Contrastive, Related, RelationalKD


class RelatedTerm(AlignmentTerm):
    """Compare units: the mean-pooled hidden states of the examples of one micro-batch on all ranks.

    Each gathered micro-batch has one loss, a mean over its units. The step's loss is their mean, weighted by the number
    of units. So the number of ranks does not change the value (two ranks of 8 equal one of 16), but gradient
    accumulation does. The last layer is read after the final norm, or with `final_norm: before` as the layer outputs
    it.
    """

    config: Related

    def __init__(self, config: Related, pair: Pair):
        super().__init__(config, pair)
        mine, other = pair.shapes
        self._map_layers(
            config, layer_map(config.layers, mine.depth, other.depth, f"terms.{self.name}.layers")
        )
        self.student_hidden = frozenset(student for student, _ in self.layers)
        self.teacher_hidden = frozenset(teacher for _, teacher in self.layers)

    @abstractmethod
    def relate(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean loss over the units of (n, D_s) and (n, D_t), n ≥ 1."""

    def project(self, pair: tuple[int, int], student: Tensor) -> Tensor:
        """Return the vectors of the student's layer in the form that is related, here unchanged."""
        return student

    def counts(self, batch, geometry):
        return batch.documents.sum().double().expand(self.parts)

    def sums(self, student, teacher, batch):
        vectors = []
        for mine, other in self.layers:
            vectors.append(self.project((mine, other), pooled(self.state(student, mine), batch)))
            vectors.append(pooled(self.state(teacher, other), batch))
        own = torch.cat(vectors, dim=1)[batch.documents]
        units = gather_rows(own)  # of all layers and both models at once
        if not len(units):
            return own.sum().expand(self.parts)  # 0
        gathered = units.split([vector.shape[1] for vector in vectors], dim=1)
        losses = [self.relate(mine, other) for mine, other in zip(gathered[::2], gathered[1::2], strict=True)]
        return shared_sum(torch.stack(losses), len(own), len(units))


class ContrastiveTerm(RelatedTerm):
    """Compute InfoNCE in a batch: each student vector against the teacher's vectors of all examples.

    The published method names a contrastive loss without a formula; vectors, negatives and temperature (as in
    CRD, Tian et al. 2020) are this project's own reading.
    """

    name = "contrastive"
    config: Contrastive

    def __init__(self, config: Contrastive, pair: Pair):
        super().__init__(config, pair)
        mine, other = pair.shapes
        self.projectors = (
            nn.ModuleDict({f"{s}-{t}": Projection(mine.width, other.width) for s, t in self.layers})
            if config.projector == "linear" or mine.width != other.width
            else None
        )

    def project(self, pair, student):
        return student if self.projectors is None else self.projectors["{}-{}".format(*pair)](student)

    def relate(self, student, teacher):
        return relations.info_nce(student, teacher, self.config.temperature)


class SimilarityTerm(RelatedTerm):
    name = "sp"

    def relate(self, student, teacher):
        return relations.similarity_preserving(student, teacher)


class RelationalTerm(RelatedTerm):
    name = "rkd"
    config: RelationalKD

    def relate(self, student, teacher):
        loss = 0.0 * student.sum()
        if self.config.distance:
            distances = relations.rkd_distance(student, teacher, self.pair.backend)
            loss = loss + self.config.distance * distances
        if self.config.angle:
            loss = loss + self.config.angle * relations.rkd_angle(student, teacher, self.config.triples)
        return loss


class KernelAlignmentTerm(RelatedTerm):
    name = "cka"

    def relate(self, student, teacher):
        return relations.cka(student, teacher)


class ProbabilisticTransferTerm(RelatedTerm):
    name = "pkt"

    def relate(self, student, teacher):
        return relations.pkt(student, teacher)
