"""Compare normalised hidden states, and the mean and variance that normalisation removes (MobileBERT)."""

from typing import Any

import torch
from torch import Tensor, nn

from dsdistill.alignment.layer_map import layer_map
from dsdistill.alignment.projector import Projector
from dsdistill.alignment.terms.base import AlignmentTerm, Pair
from dsdistill.alignment.units import centred, wide
from dsdistill.config import UserError
from dsdistill.config.terms import FeatureMap
from dsdistill.ops import hidden_alignment


class FeatureMapTerm(AlignmentTerm):
    """Compute MobileBERT's feature map transfer (Sun et al. 2020, section 3.3): means over valid tokens and layers.

      maps       squared difference of the states after LayerNorm without parameters, mean over the values
      means      squared difference of the states' means over their values
      variances  absolute difference of the states' variances over their values

    The paper prints only the first. The others and the default factors are those of its code. The code takes the
    teacher's means and variances over all layers at once; here they are those of the mapped layer. The paper's models
    are equally wide and deep; other students are projected for the maps, each layer by its own projector. For the maps
    2 (1 − cos) of the centred states is computed, which is the same except for LayerNorm's ε. The last layer is read
    after the final norm, or with `final_norm: before` as the layer outputs it.
    """

    name = "feature_map"
    config: FeatureMap

    def __init__(self, config: FeatureMap, pair: Pair):
        super().__init__(config, pair)
        mine, other = pair.shapes
        self.layers = layer_map(config.layers, mine.depth, other.depth, "terms.feature_map.layers")
        self.student_hidden = frozenset(student for student, _ in self.layers)
        self.teacher_hidden = frozenset(teacher for _, teacher in self.layers)
        factors = {"maps": config.maps, "means": config.means, "variances": config.variances}
        self.kinds = [kind for kind, factor in factors.items() if factor]
        if not self.kinds:
            raise UserError("terms.feature_map", "maps 0, means 0 and variances 0", "one of them above 0")
        self.weighting.values = [factors[kind] / len(self.layers) for kind in self.kinds for _ in self.layers]
        self.parts = len(self.weighting.values)
        self.projectors = (
            nn.ModuleDict({f"{s}-{t}": Projector(mine.width, other.width) for s, t in self.layers})
            if config.maps and mine.width != other.width
            else None
        )

    def counts(self, batch, geometry):
        return batch.mask.sum().double().expand(self.parts)

    def sums(self, student, teacher, batch):
        sums = []
        for kind in self.kinds:
            for mine, other in self.layers:
                states = self.state(student, mine), self.state(teacher, other).detach()
                if kind == "maps":
                    sums.append(self._maps(f"{mine}-{other}", *states, batch.mask))
                    continue
                moments = [
                    (wide(x).mean(-1) if kind == "means" else wide(x).var(-1, correction=0)) for x in states
                ]
                difference = (moments[0] - moments[1]).masked_fill(~batch.mask, 0)
                sums.append((difference.square() if kind == "means" else difference.abs()).sum())
        return torch.stack(sums)

    def _maps(self, name: str, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Return the sum over tokens of the mean squared difference of the normalised states."""
        options: dict[str, Any] = {
            "mask": mask,
            "divergence": "cosine",
            "reduction": "sum",
            "backend": self.pair.backend,
        }
        if self.projectors is not None:
            return 2 * self.projectors[name](student, centred(teacher), centre=True, **options)
        return 2 * hidden_alignment(centred(student), centred(teacher), **options)
