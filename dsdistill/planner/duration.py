"""Tell how long a run would take, from the operations of a token and a share of the device's peak.

Operations of a token, a product and a sum counted as two:

  teacher    2 · N_t + A_t            N: values of matrices below the head that a token passes
  student    6 · N_s + 3 · A_s        forward once, backward twice; 8 and 4 where layers run again in backward
  heads      6 · V_s · D_s a term over logits (terms that are computed together are one), and 2 · V_t · D_t where the
             teacher's are read
  terms      6 · P for projectors of P values; 6/4 · A_s + 2/4 · A_t of each mapped attention layer

A = Σ 4 · H · d · keys over the layers, keys being half of a sequence where attention is causal: query by key, and
probabilities by value, 2 · H · d each. Relations of tokens (pairwise and the like) take less than a hundredth and are
left out, as is all that is not a product: norms, softmax, the optimizer, communication. `utilisation` stands for those.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from dsdistill.alignment.objective import Objective
from dsdistill.config import Config, UserError
from dsdistill.config.schema import LANGUAGE
from dsdistill.planner.sizes import Size, attention_operations, terms_own

# Dense operations a second of an A100 (its data sheet): tensor cores in half precision, and plain float32.
PEAKS = {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12}


@dataclass(frozen=True)
class Duration:
    """A Duration says how fast a run would be.

    operations: of a token, by what takes them. tokens: a second, of all ranks. step: seconds of an optimizer step.
    seconds: of all steps; None where epochs decide, whose steps the data tells.
    """

    operations: dict[str, float]
    tokens: float
    step: float
    seconds: float | None


def operations(
    config: Config,
    teacher: tuple[PretrainedConfig, Size] | None,
    student: tuple[PretrainedConfig, Size],
    objective: Objective,
) -> dict[str, float]:
    """Return the operations of a token by what takes them, of a stage that this is the objective of."""
    length, task = config.data.max_length, config.task
    again = config.student.gradient_checkpointing
    own, attention = student[1], attention_operations(student[0], task, length)
    found = {"student": (8 if again else 6) * own.multiplied + (4 if again else 3) * sum(attention)}
    mapped = sum(1.5 * attention[layer - 1] for layer in objective.layers("student_attention"))
    heads = 0.0
    if task in LANGUAGE:
        reading = [
            term
            for term in objective.terms.values()
            if (term.needs_head or term.supervised) and term.joins not in objective.terms
        ]
        heads += 6 * own.head * len(reading)
    if teacher is not None and objective.needs("teacher"):
        theirs = attention_operations(teacher[0], task, length)
        found["teacher"] = 2 * teacher[1].multiplied + sum(theirs)
        mapped += sum(0.5 * theirs[layer - 1] for layer in objective.layers("teacher_attention"))
        heads += 2 * teacher[1].head if objective.needs("head") else 0
    found["heads"] = heads
    found["terms"] = 6 * terms_own(objective) + mapped
    return {name: value for name, value in found.items() if value}


def duration(config: Config, needed: dict[str, float], world_size: int, rate: float) -> Duration:
    """Return how long the steps take; rate: operations a second that a rank comes to."""
    one = sum(needed.values())
    tokens = world_size * rate / one
    step = config.train.batch_size * config.rows * config.data.max_length / tokens
    return Duration(needed, tokens, step, None if config.train.steps is None else config.train.steps * step)


def check_rate(peak: float | None, utilisation: float, dtype: str, *, gpu: bool) -> float | None:
    """Return the operations a second that a rank comes to; None where its peak is not known: that of a CPU.

    peak: at its best; None: an A100's in train.dtype. Raises UserError for numbers that are no peak or share.
    """
    if not 0 < utilisation <= 1:
        raise UserError("--utilisation", utilisation, "a share above 0, at most 1")
    if peak is None:
        return utilisation * PEAKS[dtype] if gpu else None
    if not 0 < peak < float("inf"):
        raise UserError("--peak-flops", peak, "a number above 0, such as 312e12")
    return utilisation * peak
