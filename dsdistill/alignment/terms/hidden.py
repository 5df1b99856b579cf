"""Compare the hidden states of mapped layers (TinyBERT, Jiao et al. 2020; PKD, Sun et al. 2019)."""

import torch
from torch import Tensor, nn

from dsdistill.alignment.layer_map import layer_map
from dsdistill.alignment.projector import Projector
from dsdistill.alignment.terms.base import AlignmentTerm, Pair
from dsdistill.config import UserError
from dsdistill.config.terms import Hidden
from dsdistill.models.domain_fusion import TeacherMap
from dsdistill.models.trace import Trace
from dsdistill.ops import hidden_alignment


class HiddenTerm(AlignmentTerm):
    """Compute the mean squared or cosine distance over valid tokens, with the student projected to the teacher's width.

    The squared distance is TinyBERT's (equations 8 and 9). Each mapped layer has its own projector, whereas the layers
    share one in the paper's code. The last layer is read after the final norm, as other libraries read it, or with
    `final_norm: before` as the layer outputs it.

    With `positions: first` only the first token of each sequence, [CLS], is compared. PKD's squared distance of its
    normalised states (equation 7) is twice the cosine distance.

    With `components: d'` the student learns φ of the teacher's states, their first d' principal components after
    LayerNorm (TeacherMap), through a trained linear map ψ: the second reading of L_struct of the structured multi-stage
    method (PairwiseTerm is the first). φ is fitted before training and frozen; it reads the teacher's last layer before
    the final norm.
    """

    name = "hidden"
    config: Hidden

    def __init__(self, config: Hidden, pair: Pair):
        super().__init__(config, pair)
        mine, other = pair.shapes
        mapped = layer_map(config.layers, mine.depth, other.depth, f"terms.{self.name}.layers")
        self._map_layers(config, ((0, 0), *mapped) if config.embedding else mapped)
        if config.positions == "first" and pair.task == "causal_lm":
            got = "first with task causal_lm, whose first token sees no other"
            raise UserError(f"terms.{self.name}.positions", got, "all")
        self.student_hidden = frozenset(student for student, _ in self.layers)
        self.teacher_hidden = frozenset(teacher for _, teacher in self.layers)
        self.width = config.components or other.width
        if self.width > other.width:
            raise UserError(
                f"terms.{self.name}.components", self.width, f"at most the teacher's width, {other.width}"
            )
        project = config.projector == "linear" or mine.width != self.width or config.components is not None
        self.projectors = (
            nn.ModuleDict({name: Projector(mine.width, self.width) for name in self._names()})
            if project
            else None
        )
        fitted = sorted(self.teacher_hidden) if config.components is not None else ()
        self.maps = nn.ModuleDict({str(layer): TeacherMap(other.width, self.width) for layer in fitted})

    @property
    def teacher_maps(self):
        return {int(layer): made for layer, made in self.maps.items()}

    def _names(self) -> list[str]:
        """Return the name of each part's projector, the same in every stage that maps these layers.

        `emd` has one projector for each student layer.
        """
        if self.config.layers == "emd":
            return [str(student) for student, _ in self.layers]
        return [f"{student}-{teacher}" for student, teacher in self.layers]

    @property
    def _tokens(self) -> slice:
        return slice(1 if self.config.positions == "first" else None)

    def counts(self, batch, geometry):
        count = batch.mask[:, self._tokens].sum().double()
        if self.config.divergence == "mse":
            count = count * self.width
        return count.expand(self.parts)

    def _target(self, teacher: Trace, layer: int) -> Tensor:
        """Return what the student's layer is compared with, (B, N, width)."""
        if not self.maps:
            return self.state(teacher, layer)
        return self.maps[str(layer)](teacher.hidden[layer]).to(teacher.hidden[layer].dtype)

    def sums(self, student, teacher, batch):
        sums = []
        for (mine, other), name in zip(self.layers, self._names(), strict=True):
            align = hidden_alignment if self.projectors is None else self.projectors[name]
            sums.append(
                align(
                    self.state(student, mine)[:, self._tokens],
                    self._target(teacher, other)[:, self._tokens],
                    mask=batch.mask[:, self._tokens],
                    divergence=self.config.divergence,
                    reduction="sum",
                    backend=self.pair.backend,
                )
            )
        return torch.stack(sums)


class FeatureTerm(HiddenTerm):
    """Compute HiddenTerm with a cosine by default and without the embeddings, so that a loss can have both terms.

    With `layers: last` it is DistilBERT's cosine loss (Sanh et al. 2019).
    """

    name = "feature"
