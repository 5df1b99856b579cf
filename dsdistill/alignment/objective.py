"""Compute the loss: a weighted sum of terms, each divided by counts over the whole step."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from dsdistill.alignment.terms import TERMS, Pair
from dsdistill.alignment.terms.base import AlignmentTerm
from dsdistill.alignment.weighting import EarthMover, share_masses
from dsdistill.config import UserError
from dsdistill.config.terms import Terms
from dsdistill.data.batch import Batch
from dsdistill.models.trace import Geometry, Trace
from dsdistill.ops import BackendError, VocabularyLosses, available_backends, backends_taken

__all__ = ["BackendError", "Loss", "Objective", "available_backends"]  # the engine uses backend names, too


class Loss(NamedTuple):  # a tuple, because ZeRO-3 looks for tensors in what modules return
    """Hold the loss of a micro-batch, divided by the whole step's counts, so that micro-batches and ranks add up."""

    total: Tensor  # scalar with gradients
    raw: Tensor  # (parts of all terms,) detached, unweighted


class Objective(nn.Module):
    """Compute Σ_k weight_k · factor_k · Σ_parts ω_part · sum / count, over the terms k of a stage.

    distill_weight: w. The task's weight is multiplied by 1 − w, every other term's by w. None: all are multiplied by 1.

    Each count is that of the whole step: it is summed over micro-batches and all-reduced over ranks before the first
    forward pass. So each term computes its counts from the batch alone.
    """

    def __init__(self, terms: Terms, pair: Pair, distill_weight: float | None = None):
        super().__init__()
        self.task, self.pooling = pair.task, pair.pooling
        self.distill_weight = distill_weight
        modules = {name: TERMS[name](config, pair) for name, config in terms.named().items()}
        # To mypy a ModuleDict is a mapping of plain modules.
        self.terms = cast(Mapping[str, AlignmentTerm], nn.ModuleDict(modules))
        _check_shared(modules)
        # Terms that are computed together: the first one's name → the later one's name.
        self._joined = {term.joins: name for name, term in modules.items() if term.joins in modules}

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
        """Return the name of a term that needs `what`, or None if no term does.

        what: teacher, head, logits, lens, labels, spans, values, unrotated, previous or final; see AlignmentTerm.
        """
        return next((name for name, term in self.terms.items() if getattr(term, f"needs_{what}")), None)

    @property
    def fused(self) -> tuple[int, ...]:
        """Return the teacher layers that the student's domain fusion maps, in order."""
        return tuple(sorted({layer for term in self.terms.values() for layer in term.fused}))

    @property
    def moves(self) -> bool:
        """Return whether some layer weights change during training."""
        return any(term.weighting.moves for term in self.terms.values())

    def layers(self, kind: str) -> frozenset[int]:
        """Return the layers to capture for all terms.

        kind: student_hidden, teacher_hidden, student_attention or teacher_attention.
        """
        return frozenset().union(*(getattr(term, kind) for term in self.terms.values()))

    def counts(self, batch: Batch, geometry: dict[int, Geometry]) -> Tensor:
        """Return (parts of all terms,) float64: this batch's share of the divisors."""
        return torch.cat([term.counts(batch, geometry) for term in self.terms.values()])

    def forward(self, student: Trace, teacher: Trace | None, batch: Batch, counts: Tensor) -> Loss:
        """Return the loss of one micro-batch.

        counts: (parts of all terms,), those of the whole step. teacher: its layers are removed after they are read.
        """
        total: Tensor | float = 0.0
        raw, terms = [], list(self.terms.values())
        divisors = self._divisors(counts)
        known: dict[str, Tensor] = {}  # sums of terms that were computed together with an earlier term
        for index, (name, term) in enumerate(self.terms.items()):
            weighted: Tensor | float | None = None
            if name in self._joined:
                later = self._joined[name]
                losses = self._together(name, student, teacher, batch, divisors)
                # Detached, so that only the total's graph holds the teacher's states.
                sums, known[later] = losses.task.detach()[None], losses.soft.detach()[None]
                weighted = losses.total
                del losses
            elif name in known:
                sums, weighted = known[name], 0.0  # it is in the total already
            else:
                sums = term.sums(student, teacher, batch)
            if sums.shape != (term.parts,):  # a mistake in a term from outside
                got = f"sums of shape {tuple(sums.shape)}"
                raise ValueError(f"term {term.name}: got {got}, expected ({term.parts},), one for each part")
            values = sums / divisors[name].float()
            if teacher is not None:  # memory peaks here: gradients are created while teacher layers are freed
                _release(teacher.hidden, "teacher_hidden", term, terms[index + 1 :])
                if teacher.depth not in teacher.hidden:
                    teacher.last = None
                _release(teacher.attention, "teacher_attention", term, terms[index + 1 :])
            raw.append(values.detach())
            if weighted is None:
                layers = filled(term.weighting.values, values)
                weighted = self.weights[name] * term.factor * (values * layers).sum()
            total = total + weighted
        assert isinstance(total, Tensor)  # a config has one term at least
        return Loss(total, torch.cat(raw))

    def begin(self, steps: int) -> None:
        """Tell the layer weights that a stage of this many optimizer steps starts."""
        for term in self.terms.values():
            term.weighting.begin(steps)

    def update(self, raw: Tensor) -> None:
        """Update layer weights after a step. raw: (parts of all terms,), the step's values, the same on every rank."""
        for name, values in self._by_term(raw).items():
            self.terms[name].weighting.update(values)
        share_masses(term.weighting for term in self.terms.values())

    def values(self, raw: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Return each term before and after its weight, and its (parts,) values, from raw (parts of all terms,).

        This does not wait for the device.
        """
        parts = raw.split([term.parts for term in self.terms.values()])
        made = {}
        for (name, term), values in zip(self.terms.items(), parts, strict=True):
            value = term.factor * (values * filled(term.weighting.values, values)).sum()
            made[name] = value, self.weights[name] * value, values
        return made

    def report(self, raw: Tensor) -> dict[str, dict]:
        """Return each term of a step before and after its weight, and the layer weights that move.

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
        """Return the training state outside the parameters, as plain JSON."""
        return {name: term.weighting.state() for name, term in self.terms.items()}

    def restore(self, state: dict[str, dict]) -> None:
        """Restore what state() returned."""
        for name, term in self.terms.items():
            term.weighting.load(state[name])

    def _by_term(self, raw: Tensor) -> dict[str, list[float]]:
        parts = raw.split([term.parts for term in self.terms.values()])
        return {name: values.tolist() for name, values in zip(self.terms, parts, strict=True)}

    def sums(self, student: Trace, teacher: Trace | None, batch: Batch) -> Tensor:
        """Return (terms,): each term's undivided sum over this micro-batch, for evaluation to add up.

        Without a teacher only the terms that need none are returned.
        """
        known: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            if teacher is None and term.needs_teacher:
                continue
            if name in self._joined and teacher is not None:
                losses = self._together(name, student, teacher, batch, None)
                known[name], known[self._joined[name]] = losses.task, losses.soft
            elif name not in known:
                known[name] = term.sums(student, teacher, batch).sum()
        return torch.stack([term.factor * known[name] for name, term in self.terms.items() if name in known])

    def _divisors(self, counts: Tensor) -> dict[str, Tensor]:
        """Return the divisors of each term's sums, (parts,) each."""
        counts = counts.masked_fill(counts == 0, 1)  # nothing valid: the sums are 0
        return dict(zip(self.terms, counts.split([term.parts for term in self.terms.values()]), strict=True))

    def _together(
        self,
        name: str,
        student: Trace,
        teacher: Trace | None,
        batch: Batch,
        divisors: dict[str, Tensor] | None,
    ) -> VocabularyLosses:
        """Return the sums of a term and of the term that joins it, and their weighted total.

        divisors: those of each term; None: the total is not needed.
        """
        assert teacher is not None  # only terms that need one join
        first, second = self.terms[name], self.terms[self._joined[name]]
        if divisors is None:
            return second.sums_with(first, student, teacher, batch)
        scales = [
            self.weights[term.name] * term.factor * term.weighting.values[0] / divisors[term.name][0]
            for term in (first, second)
        ]
        return second.sums_with(first, student, teacher, batch, (scales[0], scales[1]))


def filled(values: Sequence[float], like: Tensor) -> Tensor:
    """Return a tensor (n,) of these numbers, with the type and device of `like`.

    The numbers are set on the device: a copy from the host would wait until the GPU has finished all earlier work.
    """
    if len(set(values)) == 1:
        return like.new_full((len(values),), values[0])
    return torch.stack([like.new_full((), value) for value in values])


def _check_shared(terms: Mapping[str, AlignmentTerm]) -> None:
    """Refuse terms that share the masses of their layers but map different numbers of layers."""
    movers = {name: term.weighting for name, term in terms.items() if isinstance(term.weighting, EarthMover)}
    shapes = {name: mover.shape for name, mover in movers.items() if mover.shared}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape[0]} × {shape[1]}" for name, shape in shapes.items())
        raise UserError("terms.layer_masses", f"shared by terms of different layers ({listed})", "own")


def _release(layers: dict, kind: str, done: AlignmentTerm, later: list[AlignmentTerm]) -> None:
    """Drop the layers that a term has read and no later term reads."""
    for layer in getattr(done, kind).difference(*(getattr(term, kind) for term in later)):
        layers.pop(layer, None)
