"""Estimate how long a run takes, from the operations per token and a share of the device's peak.

These are the operations per token; a multiplication and an addition count as two:

  teacher    2 · N_t + A_t            N: elements of the matrices below the head that multiply a token
  student    6 · N_s + 3 · A_s        forward once, backward twice; 8 and 4 if layers run again in backward; a weight
                                      below adapters has no gradient, which saves 2
  heads      6 · V_s · D_s for each term over logits (terms that are computed together count once), and 2 · V_t · D_t
             if the teacher's logits are read
  terms      6 · P for projectors of P values; 6/4 · A_s + 2/4 · A_t for each mapped attention layer

A = Σ 4 · H · d · keys over the layers: 2 · H · d per key for query by key, and as much for probabilities by value. In
causal attention, keys is half the length of a sequence. Relations of tokens (pairwise and the like) take less than a
hundredth and are left out. Everything except matrix products (norms, softmax, the optimizer, communication) is left out
too; `utilisation` accounts for it.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from dsdistill.alignment.objective import Objective
from dsdistill.config import Config, UserError
from dsdistill.config.schema import LANGUAGE
from dsdistill.planner.sizes import Size, attention_operations, terms_own

# Dense operations per second of an A100 (its data sheet): tensor cores in half precision, and plain float32.
PEAKS = {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12}


@dataclass(frozen=True)
class Duration:
    """A Duration estimates how fast a run is.

    operations: per token, by what needs them. tokens: per second, of all ranks. step: seconds of an optimizer step.
    seconds: of all steps; None if epochs are given, since their steps depend on the data.
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
    """Return the operations per token in the stage of this objective, by what needs them."""
    length, task = config.data.max_length, config.task
    again = config.student.gradient_checkpointing
    own, attention = student[1], attention_operations(student[0], task, length)
    products = (8 if again else 6) * own.multiplied - 2 * own.resting
    found = {"student": products + (4 if again else 3) * sum(attention)}
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
    """Return how long the steps take; rate: operations per second that a rank achieves."""
    one = sum(needed.values())
    tokens = world_size * rate / one
    step = config.train.batch_size * config.rows * config.data.max_length / tokens
    return Duration(needed, tokens, step, None if config.train.steps is None else config.train.steps * step)


def check_rate(peak: float | None, utilisation: float, dtype: str, *, gpu: bool) -> float | None:
    """Return the operations per second that a rank achieves; None for a CPU whose peak is not given.

    peak: peak operations per second; None: an A100's in train.dtype. Raises UserError for an invalid peak or share.
    """
    if not 0 < utilisation <= 1:
        raise UserError("--utilisation", utilisation, "a share above 0 and at most 1")
    if peak is None:
        return utilisation * PEAKS[dtype] if gpu else None
    if not 0 < peak < float("inf"):
        raise UserError("--peak-flops", peak, "a number above 0, such as 312e12")
    return utilisation * peak
