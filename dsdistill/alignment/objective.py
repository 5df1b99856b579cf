"""Compute the loss: a weighted sum of terms, each divided by counts over the whole step."""

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from dsdistill.alignment.terms import TERMS, Pair
from dsdistill.alignment.terms.base import AlignmentTerm
from dsdistill.config.terms import Terms
from dsdistill.data.batch import Batch
from dsdistill.models.trace import Geometry, Trace
from dsdistill.ops import BackendError, available_backends, backends_taken

__all__ = ["BackendError", "Loss", "Objective", "available_backends"]  # the engine, too, names backends


class Loss(NamedTuple):  # a tuple, because ZeRO-3 looks for tensors in what modules return
    """A Loss is of one micro-batch, but in units of the whole step, so it adds up over micro-batches and ranks."""

    total: Tensor  # scalar with gradients
    raw: Tensor  # (parts of all terms,) detached, unweighted


class Objective(nn.Module):
    """Compute Σ_k weight_k · factor_k · Σ_parts ω_part · sum / count, over the terms k of a stage.

    distill_weight: w; the task's weight is multiplied by 1 − w, every other term's by w. None: by 1.

    counts are those of the step: summed over micro-batches and all-reduced over ranks before the first forward
    pass, which is why each term tells its counts from the batch alone.
    """

    def __init__(self, terms: Terms, pair: Pair, distill_weight: float | None = None):
        super().__init__()
        self.task = pair.task
        self.distill_weight = distill_weight
        modules = {name: TERMS[name](config, pair) for name, config in terms.named().items()}
        # A ModuleDict is read like a mapping, but does not say of what.
        self.terms = cast(Mapping[str, AlignmentTerm], nn.ModuleDict(modules))

    @property
    def weights(self) -> dict[str, float]:
        w = self.distill_weight
        return {
            name: term.weight * (1.0 if w is None else 1 - w if term.supervised else w)
            for name, term in self.terms.items()
        }

    @property
    def backends(self) -> dict[str, list[str]]:
        """Return which backends the operators have run on in this process."""
        return backends_taken()

    def needs(self, what: str) -> str | None:
        """Return the name of a term that needs it, None where none does.

        what: teacher, head, logits, lens, labels, spans, values, unrotated, previous or final, as AlignmentTerm says.
        """
        return next((name for name, term in self.terms.items() if getattr(term, f"needs_{what}")), None)

    @property
    def fused(self) -> tuple[int, ...]:
        """Return the teacher layers that the student's domain fusion maps, in order."""
        return tuple(sorted({layer for term in self.terms.values() for layer in term.fused}))

    @property
    def moves(self) -> bool:
        """Return whether some layer weights change while training."""
        return any(term.weighting.moves for term in self.terms.values())

    def layers(self, kind: str) -> frozenset[int]:
        """Return the layers to capture.

        kind: student_hidden, teacher_hidden, student_attention or teacher_attention.
        """
        return frozenset().union(*(getattr(term, kind) for term in self.terms.values()))

    def counts(self, batch: Batch, geometry: dict[int, Geometry]) -> Tensor:
        """Return (parts of all terms,) float64: this batch's share of what the sums are divided by."""
        return torch.cat([term.counts(batch, geometry) for term in self.terms.values()])

    def forward(self, student: Trace, teacher: Trace | None, batch: Batch, counts: Tensor) -> Loss:
        """Return the loss of one micro-batch.

        counts: (parts of all terms,), those of the whole step. teacher: this removes the layers that terms have read.
        """
        total: Tensor | float = 0.0
        raw, start = [], 0
        terms = list(self.terms.values())
        for index, (term, weight) in enumerate(zip(terms, self.weights.values(), strict=True)):
            divisor = counts[start : start + term.parts]  # weights of classes may come to less than 1
            divisor = divisor.masked_fill(divisor == 0, 1)  # nothing valid: the sums are 0
            start += term.parts
            sums = term.sums(student, teacher, batch)
            if sums.shape != (term.parts,):  # a mistake in a term from outside
                got = f"sums of shape {tuple(sums.shape)}"
                raise ValueError(f"term {term.name}: got {got}, expected ({term.parts},), one a part")
            values = sums / divisor.float()
            if teacher is not None:  # memory peaks here: gradients come as the teacher's layers are done with
                _release(teacher.hidden, "teacher_hidden", term, terms[index + 1 :])
                if teacher.depth not in teacher.hidden:
                    teacher.last = None
                _release(teacher.attention, "teacher_attention", term, terms[index + 1 :])
            raw.append(values.detach())
            total = total + weight * term.factor * (values * values.new_tensor(term.weighting.values)).sum()
        assert isinstance(total, Tensor)  # a config has one term at least
        return Loss(total, torch.cat(raw))

    def begin(self, steps: int) -> None:
        """Tell the layer weights that a stage of this many optimizer steps starts."""
        for term in self.terms.values():
            term.weighting.begin(steps)

    def update(self, raw: Tensor) -> None:
        """Let layer weights follow a step: raw (parts of all terms,) are its values, the same on every rank."""
        for name, values in self._by_term(raw).items():
            self.terms[name].weighting.update(values)

    def values(self, raw: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Return each term before and after its weight, and its (parts,), from (parts of all terms,).

        It does not wait for the device.
        """
        parts = raw.split([term.parts for term in self.terms.values()])
        made = {}
        for (name, term), values in zip(self.terms.items(), parts, strict=True):
            value = term.factor * (values * values.new_tensor(term.weighting.values)).sum()
            made[name] = value, self.weights[name] * value, values
        return made

    def report(self, raw: Tensor) -> dict[str, dict]:
        """Return each term of a step before and after its weight, and layer weights that move.

        Call it before update(), which changes those weights.
        """
        report: dict[str, dict] = {}
        for name, values in self._by_term(raw).items():
            term = self.terms[name]
            value = term.factor * sum(w * v for w, v in zip(term.weighting.values, values, strict=True))
            report[name] = {"raw": value, "weighted": self.weights[name] * value}
            if term.weighting.moves:
                report[name]["layer_weights"] = term.weighting.values
        return report

    def state(self) -> dict[str, dict]:
        """Return what moves outside the parameters, as plain JSON."""
        return {name: term.weighting.state() for name, term in self.terms.items()}

    def restore(self, state: dict[str, dict]) -> None:
        """Take state() back."""
        for name, term in self.terms.items():
            term.weighting.load(state[name])

    def _by_term(self, raw: Tensor) -> dict[str, list[float]]:
        parts = raw.split([term.parts for term in self.terms.values()])
        return {name: values.tolist() for name, values in zip(self.terms, parts, strict=True)}

    def sums(self, student: Trace, teacher: Trace | None, batch: Batch) -> Tensor:
        """Return (terms,), each term's undivided sum over this micro-batch, which evaluation adds up.

        Without a teacher these are only the terms that need none.
        """
        terms = [term for term in self.terms.values() if teacher is not None or not term.needs_teacher]
        return torch.stack([term.factor * term.sums(student, teacher, batch).sum() for term in terms])


def _release(layers: dict, kind: str, done: AlignmentTerm, later: list[AlignmentTerm]) -> None:
    """Drop the layers that a term has read and no later one will."""
    for layer in getattr(done, kind).difference(*(getattr(term, kind) for term in later)):
        layers.pop(layer, None)
