"""The loss: a weighted sum of terms, each divided by counts over the whole step."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dsdistill.alignment.terms import TERMS, Pair
from dsdistill.config.terms import Terms
from dsdistill.data.batch import Batch
from dsdistill.models.trace import Geometry, Trace
from dsdistill.ops import backends_taken


class Loss(NamedTuple):  # a tuple, because ZeRO-3 looks for tensors in what modules return
    """Of one micro-batch, in units of the whole step: over all its micro-batches and ranks they add up."""

    total: Tensor  # scalar with gradients
    raw: Tensor  # (terms,) detached, unweighted


class Objective(nn.Module):
    """Σ_k weight_k · factor_k · Σ_parts sum / count.

    counts are those of the step: summed over micro-batches and all-reduced over ranks before the first forward
    pass, which is why each term tells its counts from the batch alone.
    """

    def __init__(self, terms: Terms, pair: Pair):
        super().__init__()
        self.task = pair.task
        self.terms = nn.ModuleDict(
            {name: TERMS[name](config, pair) for name, config in terms.named().items()}
        )

    @property
    def weights(self) -> dict[str, float]:
        return {name: term.weight for name, term in self.terms.items()}

    @property
    def backends(self) -> dict[str, list[str]]:
        """Which backends the operators have run on in this process."""
        return backends_taken()

    @property
    def needs_teacher(self) -> bool:
        return any(term.needs_teacher for term in self.terms.values())

    def layers(self, kind: str) -> frozenset[int]:
        """Layers to capture; kind: student_hidden, teacher_hidden, student_attention or teacher_attention."""
        return frozenset().union(*(getattr(term, kind) for term in self.terms.values()))

    def counts(self, batch: Batch, geometry: dict[int, Geometry]) -> Tensor:
        """(parts of all terms,) float64."""
        return torch.cat([term.counts(batch, geometry) for term in self.terms.values()])

    def forward(self, student: Trace, teacher: Trace | None, batch: Batch, counts: Tensor) -> Loss:
        """counts: (parts of all terms,) of the whole step."""
        total, raw, start = 0.0, [], 0
        for term in self.terms.values():
            divisor = counts[start : start + term.parts].clamp(min=1)  # nothing valid: the sums are 0
            start += term.parts
            value = term.factor * (term.sums(student, teacher, batch) / divisor.float()).sum()
            raw.append(value.detach())
            total = total + term.weight * value
        return Loss(total, torch.stack(raw))

    def sums(self, student: Trace, teacher: Trace | None, batch: Batch) -> Tensor:
        """(terms,) each term's sum over this micro-batch, undivided: what evaluation adds up.

        Without a teacher only of the terms that need none.
        """
        terms = [term for term in self.terms.values() if teacher is not None or not term.needs_teacher]
        return torch.stack([term.factor * term.sums(student, teacher, batch).sum() for term in terms])
