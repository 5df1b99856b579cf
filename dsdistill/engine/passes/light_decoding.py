"""Measure how many hidden tokens the head and the light decoder find, and how long each takes (domain mapping)."""

import itertools
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dsdistill.alignment.terms.domain import DomainTerm
from dsdistill.alignment.terms.task import targets
from dsdistill.data import Batch, evaluation_batches
from dsdistill.data.batch import NO_LABEL
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.module import StudentModule
from dsdistill.engine.passes import over
from dsdistill.engine.passes.dev_scores import TIMED, WARM
from dsdistill.engine.prepare import Prepared
from dsdistill.models.trace import Trace


def decoding_term(prepared: Prepared) -> DomainTerm | None:
    """Return the term of the last stage that has a light decoder; None without one."""
    terms = prepared.objectives[-1].terms.values()
    return next((term for term in terms if isinstance(term, DomainTerm) and term.decoder is not None), None)


def measure(module: StudentModule, term: DomainTerm, prepared: Prepared, ranks: Ranks) -> dict[str, float]:
    """Return the accuracy on the hidden tokens of the first dev set, and milliseconds for one example, of both ways.

    token_accuracy and token_ms: the head reads a token's own last state. decoder_accuracy and decoder_ms: it reads the
    light decoder's state. Each time is the median over examples, from the token ids to the predicted tokens.

    module: in eval mode, with the trained weights of the term.
    """
    ways: dict[str, Callable[[Trace, Batch], Tensor]] = {
        "token": lambda trace, _: _needed(trace.output),
        "decoder": term.decoded,
    }
    task = prepared.config.task

    def read(batch: Batch) -> list[int]:
        wanted = targets(batch, task)
        chosen, trace = wanted != NO_LABEL, module.trace(batch)
        right = [
            (_predicted(trace, way(trace, batch), chosen) == wanted[chosen]).sum() for way in ways.values()
        ]
        return [int(count) for count in (chosen.sum(), *right)]

    counts = np.sum(over(prepared, ranks, prepared.data.dev, read), axis=0)
    found = {
        f"{name}_accuracy": float(right / max(1, counts[0]))
        for name, right in zip(ways, counts[1:], strict=True)
    }
    return found | (
        {f"{name}_ms": _time(module, way, prepared) for name, way in ways.items()} if ranks.first else {}
    )


def _needed(states: Tensor | None) -> Tensor:
    assert states is not None  # a language model has them
    return states


def _predicted(trace: Trace, states: Tensor, chosen: Tensor) -> Tensor:
    """Return the most probable token at each of the K places that are chosen, (K,); a soft cap keeps their order."""
    head = _needed(trace.head)
    return torch.nn.functional.linear(states[chosen].to(head.dtype), head, trace.head_bias).argmax(-1)


def _time(module: StudentModule, way: Callable[[Trace, Batch], Tensor], prepared: Prepared) -> float:
    dev = prepared.data.dev
    sample = dev.take(np.linspace(0, len(dev) - 1, min(TIMED, len(dev)), dtype=int).tolist())
    batches = list(evaluation_batches(sample, 1, 1, 0, prepared.tokenizer.pad_token_id))
    device, seconds = next(module.parameters()).device, []
    with torch.no_grad():
        for batch in itertools.chain(batches[:WARM], batches):
            batch = batch.to(device)
            chosen = targets(batch, prepared.config.task) != NO_LABEL
            started = time.perf_counter()
            trace = module.trace(batch)
            _predicted(trace, way(trace, batch), chosen).tolist()  # which waits for a GPU
            seconds.append(time.perf_counter() - started)
    return round(1000 * statistics.median(seconds[-len(batches) :]), 3)
