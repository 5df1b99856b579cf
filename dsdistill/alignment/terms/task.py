"""The task's own loss, against the labels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsdistill.alignment.terms.base import AlignmentTerm
from dsdistill.data.batch import NO_LABEL, Batch
from dsdistill.ops import token_cross_entropy


def next_tokens(batch: Batch) -> Tensor:
    """(B, N−1) int64: what positions 0 to N−2 are to predict, NO_LABEL where nothing."""
    return batch.labels[:, 1:].masked_fill(~batch.mask[:, 1:], NO_LABEL)


class TaskTerm(AlignmentTerm):
    """Cross-entropy over examples or next tokens; squared error for scores."""

    needs_teacher = False

    def counts(self, batch, geometry):
        counted = next_tokens(batch) != NO_LABEL if self.pair.task == "causal_lm" else batch.rows
        return counted.sum().double()[None]

    def sums(self, student, teacher, batch):
        if self.pair.task == "causal_lm":
            loss = token_cross_entropy(
                student.output[:, :-1],
                student.head,
                next_tokens(batch),
                bias=student.head_bias,
                ignore_index=NO_LABEL,
                reduction="sum",
            )
        elif self.pair.task == "regression":
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
