"""Compare hidden states in d' features, their structure at three granularities, and predictions (domain mapping)."""

import torch
from torch import Tensor, nn

from dsdistill.alignment import relations
from dsdistill.alignment.layer_map import layer_map
from dsdistill.alignment.projector import Projector
from dsdistill.alignment.span_grid import SpanGrid
from dsdistill.alignment.terms.base import AlignmentTerm, Pair
from dsdistill.alignment.terms.task import count_predicted, counted_places, targets
from dsdistill.alignment.units import gather_rows, mean_pool, shared_sum, unpacked, wide
from dsdistill.config import UserError
from dsdistill.config.terms import DomainMapping
from dsdistill.data.batch import NO_LABEL, PHRASE, Batch
from dsdistill.models.domain_fusion import Aggregate
from dsdistill.models.light_decoder import LightDecoder
from dsdistill.models.trace import Trace
from dsdistill.ops import hidden_alignment, pairwise_alignment, token_cross_entropy


class DomainTerm(AlignmentTerm):
    """Compute the domain loss, which has up to six parts, each with its own factor.

      hidden     ‖ψ_l h_S − φ_l h_T‖², mean over valid tokens, features and layers; φ frozen, ψ trained
      tokens     squared difference of the cosines between the tokens of a sequence, last layers, mean over pairs
      phrases    the same between mean-pooled phrases
      sequences  SP (Tung & Mori 2019) between the examples of a micro-batch on all ranks: the student's aggregate Y
                 against the teacher's mean-pooled states
      predictor  ‖Ẑ − Z‖², mean over valid tokens and features
      decoder    cross-entropy of the hidden tokens, predicted by a light decoder from Y alone (models/light_decoder.py)

    The published method prints no formula; all of this is the project's own reading. Tokens and phrases are compared
    by cosines and not by rows of the Gram matrix, so that no such matrix is built. The last layers are read before the
    final norm, as φ is fitted there.
    """

    name = "domain"
    config: DomainMapping
    needs_spans = True

    def __init__(self, config: DomainMapping, pair: Pair):
        super().__init__(config, pair)
        mine, other = pair.shapes
        if pair.domain_width > other.width:
            raise UserError(
                "student.domain.width",
                pair.domain_width,
                f"at most the teacher's width, {other.width}",
            )
        self.layers = layer_map(config.layers, mine.depth, other.depth, "terms.domain.layers")
        self.fused = tuple(sorted({teacher for _, teacher in self.layers} | {other.depth}))
        self.student_hidden = frozenset(student for student, _ in self.layers) | {mine.depth}
        self.teacher_hidden = frozenset(self.fused)
        count = len(self.layers) if config.hidden else 0
        weights = [config.hidden / count] * count if count else []
        if config.decoder and pair.task != "masked_lm":
            raise UserError("terms.domain.decoder", f"task {pair.task}", "masked_lm, or decoder: 0")
        self.others = [
            name
            for name in ("tokens", "phrases", "sequences", "predictor", "decoder")
            if getattr(config, name)
        ]
        weights += [getattr(config, name) for name in self.others]
        self.parts = len(weights)
        self.weighting.values = weights
        self.projectors = nn.ModuleDict(
            {f"{s}-{t}": Projector(pair.student.width, pair.domain_width) for s, t in self.layers}
        )
        needs_vector = config.sequences or config.decoder
        self.aggregate = Aggregate(pair.student.width) if needs_vector else None
        self.decoder = LightDecoder(pair.student.width) if config.decoder else None
        self.needs_labels = self.decoder is not None

    def counts(self, batch, geometry):
        values, rows = batch.mask.sum().double() * self.pair.domain_width, batch.documents.sum().double()
        others = {"predictor": values}
        if self.decoder is not None:
            others["decoder"] = count_predicted(batch, self.pair.task)
        counts = [values] * (self.parts - len(self.others))
        return torch.stack(counts + [others.get(name, rows) for name in self.others])

    def sums(self, student, teacher, batch):
        sums = []
        if self.config.hidden:
            sums += [
                self.projectors[f"{s}-{t}"](
                    student.hidden[s],
                    student.domain.targets[t].to(student.hidden[s].dtype),
                    mask=batch.mask,
                    reduction="sum",
                    backend=self.pair.backend,
                )
                for s, t in self.layers
            ]
        shapes = self.pair.shapes
        states = student.hidden[shapes[0].depth], teacher.hidden[shapes[1].depth]
        last, rows = (unpacked(states[0], batch), unpacked(states[1], batch)), batch.unpacked
        grid = _phrases(rows)
        alike = rows.mask.float()  # all tokens of a phrase have the same weight
        mine, other = (grid.vectors(of, alike) for of in last)
        vectors = None if self.aggregate is None else self._vectors(last[0], mine, grid.mask, rows)
        for name in self.others:
            if name == "tokens":
                sums.append(self._structure(*last, rows.mask))
            elif name == "phrases":
                sums.append(
                    self._structure(mine, other, grid.mask) if grid.mask.any() else 0 * last[0][:, 0].sum()
                )
            elif name == "sequences":
                sums.append(self._sequences(vectors, mean_pool(last[1], rows.mask), batch))
            elif name == "predictor":
                target = student.domain.targets[shapes[1].depth]
                predicted = student.domain.predicted
                sums.append(
                    hidden_alignment(
                        predicted,
                        target.to(predicted.dtype),
                        mask=batch.mask,
                        reduction="sum",
                        backend=self.pair.backend,
                    )
                )
            else:
                sums.append(self._decoding(vectors, student, batch))
        return torch.stack([value.float() for value in sums])

    def decoded(self, student: Trace, batch: Batch) -> Tensor:
        """Return the light decoder's states, (B, N, D), which the student's head reads."""
        states, grid = student.hidden[self.pair.student.depth], _phrases(batch)
        vectors = self._vectors(states, grid.vectors(states, batch.mask.float()), grid.mask, batch)
        assert self.decoder is not None  # asked for only if `decoder` has a factor
        return self.decoder(vectors, batch.mask.shape[1])

    def _structure(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        return pairwise_alignment(
            student, teacher, mask=mask, relation="cosine", reduction="sum", backend=self.pair.backend
        )

    def _vectors(self, states: Tensor, phrases: Tensor, mask: Tensor, rows: Batch) -> Tensor:
        """Return the aggregates Y of the examples, (S, D). phrases: (S, K, D) with a mask (S, K); rows: unpacked."""
        assert self.aggregate is not None  # it is there if a part reads Y
        place = (rows.mask.sum(1) - 1).clamp(min=0) if self.pair.task == "causal_lm" else 0 * rows.mask.sum(1)
        end = states[torch.arange(len(place), device=place.device), place]
        dtype = self.aggregate.attend.weight.dtype
        mean = mean_pool(states, rows.mask)
        return self.aggregate(mean.to(dtype), phrases.to(dtype), mask, end.to(dtype))

    def _sequences(self, mine: Tensor | None, other: Tensor, batch: Batch) -> Tensor:
        assert mine is not None  # Y is there if a part reads it
        own = torch.cat([wide(mine), other], dim=1)[batch.documents]
        units = gather_rows(own)
        if not len(units):
            return own.sum()  # 0
        loss = relations.similarity_preserving(*units.split([mine.shape[1], other.shape[1]], dim=1))
        return shared_sum(loss, len(own), len(units))

    def _decoding(self, vectors: Tensor | None, student: Trace, batch: Batch) -> Tensor:
        assert self.decoder is not None and vectors is not None
        assert student.head is not None  # of a masked language model
        return token_cross_entropy(
            self.decoder(vectors, batch.mask.shape[1]),
            student.head,
            targets(batch, self.pair.task),
            bias=student.head_bias,
            softcap=student.softcap,
            index=counted_places(batch, self.pair.task),
            ignore_index=NO_LABEL,
            reduction="sum",
            backend=self.pair.logit_backend,
        )


def _phrases(rows: Batch) -> SpanGrid:
    assert rows.spans is not None  # the term needs them
    return SpanGrid(rows.spans[rows.spans[:, 3] == PHRASE], *rows.mask.shape)
