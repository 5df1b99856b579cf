"""Compute the task's own loss against the labels."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsdistill.alignment.relations import contrast
from dsdistill.alignment.terms.base import AlignmentTerm, Pair
from dsdistill.alignment.units import gather_rows, pair_vectors, shared_sum, text_vectors
from dsdistill.config.schema import EMBEDDING, LANGUAGE
from dsdistill.config.terms import Task
from dsdistill.data.batch import NO_LABEL, Batch
from dsdistill.ops import token_cross_entropy


def targets(batch: Batch, task: str) -> Tensor:
    """Return (B, M) int64: the label that each state of `predicting` should predict, or NO_LABEL."""
    if task == "causal_lm":
        follows = batch.mask[:, 1:]
        if batch.position_ids is not None:  # packed: a document's first token follows another document
            follows = follows & (batch.position_ids[:, 1:] > 0)
        return _labels(batch)[:, 1:].masked_fill(~follows, NO_LABEL)
    return _labels(batch).masked_fill(~batch.mask, NO_LABEL)


def _labels(batch: Batch) -> Tensor:
    assert batch.labels is not None  # data without labels has been refused
    return batch.labels


def predicting(states: Tensor, task: str) -> Tensor:
    """Return the states (B, M, D) of (B, N, D) that predict a token: the next token, or (masked) their own."""
    return states[:, :-1] if task == "causal_lm" else states


def count_predicted(batch: Batch, task: str) -> Tensor:
    """Return the number of tokens to predict, a float64 scalar on the batch's device."""
    if batch.counted is None:
        return (targets(batch, task) != NO_LABEL).sum().double()
    return torch.full((), batch.counted.numel(), dtype=torch.float64, device=batch.counted.device)


def counted_places(batch: Batch, task: str) -> Tensor | None:
    """Return (K,) int64: the flat places of those states of `predicting` that predict a token.

    Return None if the batch does not hold them (`Batch.counted`).
    """
    if batch.counted is None or task != "causal_lm":
        return batch.counted
    # Token (b, n) is predicted by state (b, n − 1) of N − 1: b·N + n becomes b·(N − 1) + n − 1.
    row = torch.div(batch.counted, batch.input_ids.shape[1], rounding_mode="floor")
    return batch.counted - row - 1


def counted_states(batch: Batch, task: str) -> dict[str, Any]:
    """Return which states of `predicting` count, as a keyword argument: `index` if the batch has it, else `mask`."""
    index = counted_places(batch, task)
    return {"mask": targets(batch, task) != NO_LABEL} if index is None else {"index": index}


def _weighed(share: Tensor | None, loss: Callable[..., Tensor], *given: Tensor, **options: Any) -> Tensor:
    """Return the sum of a loss over the rows, each multiplied by its share if there are shares."""
    if share is None:
        return loss(*given, reduction="sum", **options)
    return (share * loss(*given, reduction="none", **options)).sum()


class TaskTerm(AlignmentTerm):
    """Compute cross-entropy over examples or predicted tokens, squared error for scores, or a contrast of text pairs.

    Labels are smoothed and classes weighted as by torch's cross_entropy. With w the weights of the C classes, ε the
    smoothing and q the student's probabilities, an example adds (1 − ε) w_y (−log q_y) + ε/C Σ_c w_c (−log q_c) to the
    sum, and w_y to the divisor.

    The loss of a row that is mixed with another (Batch.share, MixKD, Liang et al. 2021) is λ times that of its own
    label plus 1 − λ times that of the other's. A score is λ times its own plus 1 − λ times the other's.

    A pair of a query q_i and a document d_i adds −log softmax_j(cos(q_i, d_j) / τ) at j = i to the sum, where j runs
    over the pairs of a micro-batch on all ranks (InfoNCE, van den Oord et al. 2018). As with a RelatedTerm, the number
    of ranks does not change the value (two ranks of 8 equal one of 16), but gradient accumulation does.
    """

    name = "task"
    needs_teacher = False
    needs_labels = True
    needs_logits = True
    supervised = True
    config: Task

    def __init__(self, config: Task, pair: Pair):
        super().__init__(config, pair)
        if pair.task == EMBEDDING:
            self.needs_labels = self.needs_logits = False

    def counts(self, batch, geometry):
        task = self.pair.task
        if task == EMBEDDING:
            assert batch.pair is not None  # see pair_vectors
            return ((batch.pair >= 0) & batch.rows).sum().double()[None] / 2
        if task in LANGUAGE:
            return count_predicted(batch, task)[None]
        if task == "regression":
            return batch.rows.sum().double()[None]
        counted = [self._weights(labels, share) for labels, share in self._classes(batch)]
        return torch.stack(counted).sum()[None]

    def _weights(self, labels: Tensor, share: Tensor | None) -> Tensor:
        """Return (B,) float64: what each row adds to the divisor."""
        if self.pair.class_weights:
            weights = torch.tensor(self.pair.class_weights, dtype=torch.float64, device=labels.device)
            counted = weights[labels.clamp(min=0)].masked_fill(labels == NO_LABEL, 0)
        else:
            counted = (labels != NO_LABEL).double()
        return counted if share is None else counted * share

    def _classes(self, batch: Batch) -> list[tuple[Tensor, Tensor | None]]:
        """Return (B,) int64 classes (NO_LABEL: the row does not count) and the rows' shares; two pairs if mixed."""
        own = _labels(batch).masked_fill(~batch.rows, NO_LABEL)
        if batch.share is None or batch.partner_labels is None:
            return [(own, None)]
        return [
            (own, batch.share),
            (batch.partner_labels.masked_fill(~batch.rows, NO_LABEL), 1 - batch.share),
        ]

    def sums(self, student, teacher, batch):
        task = self.pair.task
        if task == EMBEDDING:
            return self._contrast(text_vectors(student.output, batch, self.pair.pooling[0]), batch)[None]
        if task in LANGUAGE:
            loss = token_cross_entropy(
                predicting(student.output, task),
                student.head,
                targets(batch, task),
                bias=student.head_bias,
                softcap=student.softcap,
                index=counted_places(batch, task),
                ignore_index=NO_LABEL,
                label_smoothing=self.pair.smoothing,
                reduction="sum",
                backend=self.pair.logit_backend,
            )
        elif task == "regression":
            scores = batch.labels.float()
            if batch.share is not None:
                scores = batch.share * scores + (1 - batch.share) * batch.partner_labels.float()
            difference = student.logits[:, 0].float() - scores
            loss = torch.where(batch.rows, difference, 0.0).square().sum()
        else:
            logits, weights = student.logits.float(), self.pair.class_weights
            losses = [
                _weighed(
                    share,
                    F.cross_entropy,
                    logits,
                    labels,
                    weight=logits.new_tensor(weights) if weights else None,
                    ignore_index=NO_LABEL,
                    label_smoothing=self.pair.smoothing,
                )
                for labels, share in self._classes(batch)
            ]
            loss = torch.stack(losses).sum()
        return loss[None]

    def _contrast(self, vectors: Tensor, batch: Batch) -> Tensor:
        """Return this rank's share of the sum over the pairs of all ranks. vectors: (B, D), the student's."""
        own = torch.cat(pair_vectors(vectors, batch), dim=1)
        units = gather_rows(own)
        if not len(units):
            return own.sum() + 0.0 * vectors.sum()  # 0
        queries, documents = units.chunk(2, dim=1)
        loss = contrast(queries, documents, self.config.temperature)
        return shared_sum(loss, len(own), len(units))
