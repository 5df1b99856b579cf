"""Compute losses over a vocabulary from the logits of some tokens, in plain PyTorch."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dsdistill.ops.soft_label.divergence import Formula, described, divergence_rows, logit_gradient
from dsdistill.ops.soft_label.head import Head

Places = Tensor | slice  # of a block's tokens among all: (K,) int64, or a range


class Loss(Protocol):
    """Describe one loss over the vocabulary."""

    entries: int  # number of entries of other heads whose logits exist together with the student's

    def block(self, places: Places) -> Tensor:
        """Return what the loss needs for a block's tokens; the first axis is the tokens."""

    def rows(self, z: Tensor, given: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Return the sum over some tokens of a block, and the gradient at the first entries of their logits z.

        z: (tokens, V), not to be overwritten. given: what `block` returned for these tokens; may be overwritten.
        """


class SoftLabels:
    """Compute the divergence between both models' predictions over the entries of the teacher's head."""

    def __init__(self, teacher_hidden: Tensor, teacher: Head, *, temperature: float, formula: Formula):
        self.entries = teacher.matrix.shape[0]
        self.hidden, self.teacher = teacher_hidden.detach().flatten(0, 1), teacher
        self.temperature, self.formula = temperature, formula

    def block(self, places: Places) -> Tensor:
        return self.teacher.logits(self.hidden[places])

    def rows(self, z: Tensor, given: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        log_q = described(z[:, : self.entries] / self.temperature, self.formula)
        log_p = described(given.div_(self.temperature), self.formula)
        p = given if log_p is given else torch.exp(log_p, out=given)
        value = divergence_rows(log_p, log_q, p, self.formula).sum()
        if not with_gradient:
            return value, None
        return value, logit_gradient(log_p, log_q, p, self.formula).div_(self.temperature)


class Labels:
    """Compute cross-entropy against labels, with label smoothing ε."""

    entries = 0

    def __init__(self, labels: Tensor, label_smoothing: float):
        self.labels, self.smoothing = labels.flatten(), label_smoothing

    def block(self, places: Places) -> Tensor:
        return self.labels[places][:, None]

    def rows(self, z: Tensor, given: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        log_q = z.log_softmax(-1)
        own, spread = 1 - self.smoothing, self.smoothing / z.shape[1]  # t at the label, t at all
        value = -own * log_q.gather(1, given).sum()
        if self.smoothing:
            value -= self.smoothing * log_q.mean(-1).sum()
        if not with_gradient:
            return value, None
        gradient = log_q.exp_()  # the gradient is softmax − t
        if self.smoothing:
            gradient.sub_(spread)
        return value, gradient.scatter_add_(1, given, gradient.new_full(given.shape, -own))
