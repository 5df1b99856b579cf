"""Compare relations between words and between layers (CKD, Park et al. 2021)."""

import torch
from torch import Tensor

from dsdistill.alignment.contextual_relations import layer_pairs, layer_triples, word_pairs, word_triples
from dsdistill.alignment.layer_map import layer_map
from dsdistill.alignment.terms.base import AlignmentTerm, Pair
from dsdistill.alignment.units import unpacked
from dsdistill.config import UserError
from dsdistill.config.terms import ContextualKD
from dsdistill.data.batch import Batch


class ContextualTerm(AlignmentTerm):
    """Compute CKD's word relations of each mapped layer and of the embeddings, and its relations between these layers.

      word_pairs     KL of softmax over the cosines of a word with the other words, Σ / Σ n², mean over layers
      word_triples   squared difference of the angles at a word between two words of its window, mean over all such
      layer_pairs    KL of softmax over the cosines of a word's layer with its other layers, Σ / (N · L²)
      layer_triples  squared difference of the angles between three layers of a word, mean over all L³ triples

    n is the number of words of a sequence, N of all sequences, and L that of layers. Divisors and window are those of
    the authors' code. Its windows reach into padding and repeat a sequence's last word; here only words of the sequence
    count. No projector is needed, and widths may differ. The last layer is read after the final norm, or with
    `final_norm: before` as the layer outputs it.
    """

    name = "ckd"
    config: ContextualKD

    def __init__(self, config: ContextualKD, pair: Pair):
        super().__init__(config, pair)
        mine, other = pair.shapes
        if config.window % 2 == 0:
            raise UserError("terms.ckd.window", config.window, "an odd number: the vertex is in the middle")
        self.layers = ((0, 0), *layer_map(config.layers, mine.depth, other.depth, "terms.ckd.layers"))
        self.student_hidden = frozenset(student for student, _ in self.layers)
        self.teacher_hidden = frozenset(teacher for _, teacher in self.layers)
        count = len(self.layers)
        factors = {"word_pairs": config.word_pairs, "word_triples": config.word_triples}
        self.kinds = [(name, factor / count, count) for name, factor in factors.items() if factor]
        factors = {"layer_pairs": config.layer_pairs, "layer_triples": config.layer_triples}
        self.kinds += [(name, factor, 1) for name, factor in factors.items() if factor]
        if not self.kinds:
            raise UserError("terms.ckd", "every factor 0", "one of them above 0")
        self.weighting.values = [factor for _, factor, parts in self.kinds for _ in range(parts)]
        self.parts = len(self.weighting.values)

    def counts(self, batch, geometry):
        words, depth = batch.mask.sum().double(), len(self.layers)
        found = {"layer_pairs": words * depth**2, "layer_triples": words * depth**3}
        lengths = batch.unpacked.mask.sum(1).double()
        found["word_pairs"] = lengths.square().sum()
        found["word_triples"] = _neighbours(batch.unpacked.mask, self.config.window // 2).square().sum()
        return torch.stack([found[name] for name, _, parts in self.kinds for _ in range(parts)])

    def sums(self, student, teacher, batch):
        states = [(self.state(student, mine), self.state(teacher, other)) for mine, other in self.layers]
        across = [pair[0] for pair in states], [pair[1] for pair in states]
        sums: list[Tensor] = []
        for name, _, _ in self.kinds:
            if name == "layer_pairs":
                sums.append(layer_pairs(*across, batch.mask))
            elif name == "layer_triples":
                sums.append(layer_triples(*across, batch.mask))
            else:
                sums += [self._words(name, *pair, batch) for pair in states]
        return torch.stack(sums)

    def _words(self, name: str, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        given = unpacked(student, batch), unpacked(teacher, batch), batch.unpacked.mask
        return word_pairs(*given) if name == "word_pairs" else word_triples(*given, self.config.window)


def _neighbours(mask: Tensor, half: int) -> Tensor:
    """Return (B, N) float64: how many words of the sequence are in each word's window, itself included."""
    places = torch.arange(mask.shape[1], device=mask.device)
    last = torch.minimum(places + half, mask.sum(1, keepdim=True) - 1)
    return ((last - (places - half).clamp(min=0) + 1) * mask).double()
