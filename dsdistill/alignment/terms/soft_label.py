"""The teacher's output distribution (Hinton et al. 2015)."""

from dsdistill.alignment.terms.base import AlignmentTerm, Pair
from dsdistill.alignment.terms.task import next_tokens
from dsdistill.config import UserError
from dsdistill.config.terms import SoftLabel
from dsdistill.data.batch import NO_LABEL
from dsdistill.ops import logit_alignment, soft_label_alignment


def common_vocabulary(pair: Pair, place: str) -> int | None:
    """Entries of both heads that stand for tokens, where the heads are padded to different widths; else None."""
    student, teacher = pair.student.vocabulary, pair.teacher.vocabulary
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
    """Divergence at temperature τ, times τ² (unless scale_tau2 is off) so that gradients keep their size.

    Language models: over the positions that predict a token, from hidden states and heads; where the heads are
    padded to different widths, over the tokenizer's entries.
    """

    def __init__(self, config: SoftLabel, pair: Pair):
        super().__init__(config, pair)
        self.factor = config.temperature**2 if config.scale_tau2 else 1.0
        self.common = common_vocabulary(pair, "terms.soft_label") if pair.task == "causal_lm" else None

    def counts(self, batch, geometry):
        if self.pair.task == "causal_lm":
            return (next_tokens(batch) != NO_LABEL).sum().double()[None]
        return batch.rows.sum().double()[None]

    def sums(self, student, teacher, batch):
        config = self.config
        options = {
            "temperature": config.temperature,
            "divergence": config.divergence,
            "beta": config.beta,
            "alpha": config.alpha,
            "reduction": "sum",
        }
        if self.pair.task != "causal_lm":
            return logit_alignment(student.logits, teacher.logits, mask=batch.rows, **options)[None]
        cut = slice(None, self.common)
        return soft_label_alignment(
            student.output[:, :-1],
            student.head[cut],
            teacher.output[:, :-1],
            teacher.head[cut],
            student_bias=None if student.head_bias is None else student.head_bias[cut],
            teacher_bias=None if teacher.head_bias is None else teacher.head_bias[cut],
            mask=next_tokens(batch) != NO_LABEL,
            **options,
        )[None]
