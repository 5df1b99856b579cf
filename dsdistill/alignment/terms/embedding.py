"""Compare the vectors that student and teacher make of whole texts (Reimers & Gurevych 2020)."""

import torch
import torch.nn.functional as F
from torch import nn

from dsdistill.alignment.projector import Projection
from dsdistill.alignment.terms.base import AlignmentTerm, Pair
from dsdistill.alignment.units import text_vectors
from dsdistill.config import UserError
from dsdistill.config.terms import Embedding


class EmbeddingTerm(AlignmentTerm):
    """Compute the mean over texts of 1 − cosine or of the squared difference of the two models' vectors.

    The student's vector is projected if its width is not the teacher's. For each number d in `dims`, the first d values
    form a vector with its own projector (Kusupati et al. 2022, Matryoshka), and the loss is the mean over these
    vectors. The two texts of a pair count as two texts.
    """

    name = "embedding"
    config: Embedding

    def __init__(self, config: Embedding, pair: Pair):
        super().__init__(config, pair)
        mine, other = pair.shapes
        self.dims = config.dims or (mine.width,)
        if max(self.dims) > mine.width or len(set(self.dims)) < len(self.dims):
            got = f"{list(self.dims)} of a student {mine.width} wide"
            raise UserError(f"terms.{self.name}.dims", got, f"different numbers up to {mine.width}")
        self.parts, self.factor = len(self.dims), 1 / len(self.dims)
        self.weighting = type(self.weighting)(self.parts)
        self.projectors = nn.ModuleDict(
            {
                str(width): Projection(width, other.width)
                for width in self.dims
                if config.projector == "linear" or width != other.width
            }
        )

    def counts(self, batch, geometry):
        count = batch.rows.sum().double()
        if self.config.divergence == "mse":
            count = count * self.pair.shapes[1].width
        return count.expand(self.parts)

    def sums(self, student, teacher, batch):
        vectors = text_vectors(student.output, batch, self.pair.pooling[0])
        theirs = text_vectors(teacher.output, batch, self.pair.pooling[1])
        sums = []
        for width in self.dims:
            mine = vectors[:, :width]
            if str(width) in self.projectors:
                mine = self.projectors[str(width)](mine)
            if self.config.divergence == "mse":
                loss = (mine - theirs).square().sum(-1)
            else:
                loss = 1 - F.cosine_similarity(mine, theirs, dim=-1)
            sums.append(torch.where(batch.rows, loss, 0.0).sum())
        return torch.stack(sums)
