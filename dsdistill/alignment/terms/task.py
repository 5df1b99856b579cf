"""Compute the task's own loss, against the labels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsdistill.alignment.terms.base import AlignmentTerm
from dsdistill.config.schema import LANGUAGE
from dsdistill.data.batch import NO_LABEL, Batch
from dsdistill.ops import token_cross_entropy


def next_tokens(batch: Batch) -> Tensor:
    """Return (B, N−1) int64: what positions 0 to N−2 are to predict, NO_LABEL where nothing."""
    return _labels(batch)[:, 1:].masked_fill(~batch.mask[:, 1:], NO_LABEL)


def targets(batch: Batch, task: str) -> Tensor:
    """Return (B, M) int64: what the states of `predicting` are to predict, NO_LABEL where nothing."""
    if task == "causal_lm":
        return next_tokens(batch)
    return _labels(batch).masked_fill(~batch.mask, NO_LABEL)


def _labels(batch: Batch) -> Tensor:
    assert batch.labels is not None  # a run whose terms or metrics read labels has data with labels
    return batch.labels


def predicting(states: Tensor, task: str) -> Tensor:
    """Return (B, M, D) of (B, N, D): the states that predict a token, the next one or (masked) their own."""
    return states[:, :-1] if task == "causal_lm" else states


class TaskTerm(AlignmentTerm):
    """Compute cross-entropy over examples or predicted tokens; squared error for scores."""

    name = "task"
    needs_teacher = False
    needs_labels = True
    supervised = True

    def counts(self, batch, geometry):
        task = self.pair.task
        counted = targets(batch, task) != NO_LABEL if task in LANGUAGE else batch.rows
        return counted.sum().double()[None]

    def sums(self, student, teacher, batch):
        task = self.pair.task
        if task in LANGUAGE:
            loss = token_cross_entropy(
                predicting(student.output, task),
                student.head,
                targets(batch, task),
                bias=student.head_bias,
                ignore_index=NO_LABEL,
                reduction="sum",
                backend=self.pair.logit_backend,
            )
        elif task == "regression":
            difference = student.logits[:, 0].float() - batch.labels.float()
            loss = torch.where(batch.rows, difference, 0.0).square().sum()
        else:
            loss = F.cross_entropy(
                student.logits.float(),
                batch.labels.masked_fill(~batch.rows, NO_LABEL),
                ignore_index=NO_LABEL,
                reduction="sum",
            )
        return loss[None]
