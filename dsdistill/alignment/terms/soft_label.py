"""Compare the student's output distribution with the teacher's (Hinton et al. 2015)."""

from dataclasses import replace
from typing import Any

import torch

from dsdistill.alignment.terms.base import AlignmentTerm, Pair
from dsdistill.alignment.terms.task import (
    count_predicted,
    counted_places,
    counted_states,
    predicting,
    targets,
)
from dsdistill.config import UserError
from dsdistill.config.schema import LANGUAGE
from dsdistill.config.terms import SoftLabel
from dsdistill.data.batch import NO_LABEL, Batch
from dsdistill.ops import logit_alignment, soft_label_alignment, vocabulary_losses


def common_vocabulary(pair: Pair, place: str) -> int | None:
    """Return how many entries of both heads belong to tokens; None if the heads have the same size."""
    student, teacher = (shape.vocabulary for shape in pair.shapes)
    if student == teacher:
        return None
    if min(student, teacher) < pair.tokens:
        raise UserError(
            place,
            f"vocabularies of {student} (student) and {teacher} (teacher)",
            f"at least the tokenizer's {pair.tokens} entries in both",
        )
    return pair.tokens


class SoftLabelTerm(AlignmentTerm):
    """Compute the divergence at temperature τ, times τ² (unless scale_tau2 is off) so that gradients keep their size.

    For language models it is computed from hidden states and heads, over the positions that predict a token with a
    label, or with `positions: valid` (as in DistilBERT's code) over the positions of all valid tokens. If the heads are
    padded to different sizes, only the tokenizer's entries are compared. For regression it is the squared difference of
    both scores divided by τ, which is 2 KL of unit normal distributions around them; τ² cancels τ there, as it does in
    logit_mse.
    """

    name = "soft_label"
    config: SoftLabel
    needs_head = True

    def __init__(self, config: SoftLabel, pair: Pair):
        super().__init__(config, pair)
        self.needs_logits = pair.task not in LANGUAGE
        # Labels tell which tokens are predicted, and the task's loss is over the same tokens.
        self.needs_labels = pair.task in LANGUAGE and config.positions == "predicted"
        self.joins = "task" if self.needs_labels else None
        self.factor = config.temperature**2 if config.scale_tau2 else 1.0
        self.common = common_vocabulary(pair, "terms.soft_label") if pair.task in LANGUAGE else None

    def _read(self, batch: Batch) -> Batch:
        """Return the batch with labels at the positions that are compared."""
        if self.config.positions == "predicted":
            return batch
        return replace(batch, labels=batch.input_ids, counted=None)

    def counts(self, batch, geometry):
        if self.pair.task in LANGUAGE:
            return count_predicted(self._read(batch), self.pair.task)[None]
        return batch.rows.sum().double()[None]

    @property
    def _options(self) -> dict[str, Any]:
        config = self.config
        return {
            "temperature": config.temperature,
            "divergence": config.divergence,
            "beta": config.beta,
            "alpha": config.alpha,
            "mu": config.mu,
            "reduction": "sum",
        }

    def sums(self, student, teacher, batch):
        config, options = self.config, self._options
        if self.pair.task == "regression":
            difference = (student.logits[:, 0].float() - teacher.logits[:, 0].float()) / config.temperature
            return torch.where(batch.rows, difference, 0.0).square().sum()[None]
        if self.pair.task not in LANGUAGE:
            return logit_alignment(student.logits, teacher.logits, mask=batch.rows, **options)[None]
        cut = slice(None, self.common)
        return soft_label_alignment(
            predicting(student.output, self.pair.task),
            student.head[cut],
            predicting(teacher.output, self.pair.task),
            teacher.head[cut],
            student_bias=None if student.head_bias is None else student.head_bias[cut],
            teacher_bias=None if teacher.head_bias is None else teacher.head_bias[cut],
            student_softcap=student.softcap,
            teacher_softcap=teacher.softcap,
            backend=self.pair.logit_backend,
            **counted_states(self._read(batch), self.pair.task),
            **options,
        )[None]

    def sums_with(self, other, student, teacher, batch, weights=(1.0, 1.0)):
        return vocabulary_losses(
            predicting(student.output, self.pair.task),
            student.head,
            predicting(teacher.output, self.pair.task),
            teacher.head,
            labels=targets(batch, self.pair.task),
            index=counted_places(batch, self.pair.task),
            weights=weights,
            common=self.common,
            student_bias=student.head_bias,
            teacher_bias=teacher.head_bias,
            student_softcap=student.softcap,
            teacher_softcap=teacher.softcap,
            ignore_index=NO_LABEL,
            label_smoothing=self.pair.smoothing,
            backend=self.pair.logit_backend,
            **self._options,
        )
