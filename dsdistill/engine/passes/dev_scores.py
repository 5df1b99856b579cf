"""Measure what student and teacher score on the dev sets, and how long a text takes."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsdistill.alignment.units import unit_vectors
from dsdistill.config import Config
from dsdistill.config.schema import EMBEDDING
from dsdistill.data import Batch, Set, evaluation_batches
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.passes import at_once, in_order, over
from dsdistill.engine.passes.predictions import Predictions
from dsdistill.engine.passes.teacher_outputs import TeacherOutputs
from dsdistill.engine.prepare import Prepared
from dsdistill.evaluation.scores import Seen, evaluate
from dsdistill.models.trace import Trace
from dsdistill.models.tracer import Tracer, model_inputs

WARM, TIMED = 10, 100  # examples


def score(
    student: Callable,
    teacher: Tracer | None,
    prepared: Prepared,
    ranks: Ranks,
    predictions: Predictions | None = None,
) -> dict[str, dict[str, float]]:
    """Return the scores of student and teacher on each dev set; scores of a named set are called NAME/SCORE.

    student: a StudentModule in eval mode, or the engine around one. predictions: collects the models' outputs.
    """
    found: dict[str, dict[str, float]] = {}
    for name, examples in prepared.data.devs.items():
        seen = functools.partial(predictions.take, name) if predictions is not None else None
        for model, scores in score_on(examples, student, teacher, prepared, ranks, seen).items():
            named = {f"{name}/{key}" if name else key: value for key, value in scores.items()}
            found.setdefault(model, {}).update(named)
    return found


def score_on(
    examples: Set,
    student: Callable,
    teacher: Tracer | None,
    prepared: Prepared,
    ranks: Ranks,
    seen: Seen | None = None,
) -> dict[str, dict[str, float]]:
    """Return the scores of student and teacher on one set; seen: as in `evaluate`.

    The teacher reads a set once: its outputs are kept for further evaluations, and in the cache for other runs.
    """
    kept = TeacherOutputs(examples, prepared, ranks) if teacher is not None else None
    batches = evaluation_batches(
        examples,
        at_once(prepared, examples),
        ranks.world_size,
        ranks.rank,
        prepared.tokenizer.pad_token_id,
    )
    with torch.no_grad():
        return evaluate(
            lambda batch, trace: student(batch, teacher=trace),
            teacher.frozen if teacher is not None else None,
            lambda trace, batch: _teacher_values(prepared, trace, batch),
            (batch.to(ranks.device) for batch in batches),
            task=prepared.config.task,
            gather=ranks.gather,
            positive=prepared.positive,
            seen=seen,
            dims=_lengths(prepared.config),
            known=kept.find() if kept is not None else None,
            keep=kept.keep if kept is not None else None,
        )


def _lengths(config: Config) -> list[int]:
    """Return the lengths N for which a term of some stage trains a vector's first N values as a vector (Matryoshka)."""
    terms = [stage.terms.embedding for stage in config.run_stages]
    return sorted({width for term in terms if term is not None for width in term.dims or ()})


def _teacher_values(prepared: Prepared, trace: Trace, batch: Batch) -> Tensor:
    """Return the teacher's own outputs: vectors of texts, or the loss summed over tokens."""
    if prepared.config.task == EMBEDDING:
        return unit_vectors(trace.output, batch, prepared.pair.pooling[1])
    return prepared.evaluation.sums(trace, None, batch)


def represent(student: Callable, prepared: Prepared, ranks: Ranks) -> Tensor:
    """Return (examples, D) float32 mean last-layer states of the first dev set, in its order, on every rank.

    student: as in `score`, with `represents`.
    """
    parts = over(
        prepared,
        ranks,
        prepared.data.dev,
        lambda batch: (student(batch, ask="mean").float().cpu(), batch.index.cpu()),
    )
    return in_order(parts)


def latency(model: PreTrainedModel, prepared: Prepared) -> dict[str, float]:
    """Return the median milliseconds of a forward pass over one example; model: in eval mode, on its device."""
    return {
        "latency_ms": milliseconds(
            lambda batch: functools.partial(model, **model_inputs(model, batch)), prepared, model.device
        )
    }


def milliseconds(
    made: Callable[[Batch], Callable[[], object]], prepared: Prepared, device: torch.device
) -> float:
    """Return the median milliseconds of a call for one example, unpadded, after a warm-up.

    Up to TIMED examples are timed, evenly spaced in the first dev set, so that lengths are typical of it and the same
    for every model.

    made: makes the call for a batch of one example; this is not timed.
    """
    dev = prepared.data.dev
    sample = dev.take(np.linspace(0, len(dev) - 1, min(TIMED, len(dev)), dtype=int).tolist())
    batches = list(evaluation_batches(sample, 1, 1, 0, prepared.tokenizer.pad_token_id))
    seconds = []
    with torch.no_grad():
        for batch in itertools.chain(batches[:WARM], batches):
            call = made(batch.to(device))
            _wait(device)
            started = time.perf_counter()
            call()
            _wait(device)
            seconds.append(time.perf_counter() - started)
    return round(1000 * statistics.median(seconds[-len(batches) :]), 3)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
