"""Measure how many hidden tokens the head and the light decoder find, and how long each takes (domain mapping)."""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dsdistill.alignment.terms.domain import DomainTerm
from dsdistill.alignment.terms.task import targets
from dsdistill.data import Batch
from dsdistill.data.batch import NO_LABEL
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.module import StudentModule
from dsdistill.engine.passes import over
from dsdistill.engine.passes.dev_scores import milliseconds
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
    shares = [float(right / max(1, counts[0])) for right in counts[1:]]
    found = {f"{name}_accuracy": share for name, share in zip(ways, shares, strict=True)}

    def timed(way: Callable[[Trace, Batch], Tensor], batch: Batch) -> Callable[[], Tensor]:
        chosen = targets(batch, task) != NO_LABEL

        def call() -> Tensor:
            trace = module.trace(batch)
            return _predicted(trace, way(trace, batch), chosen)

        return call

    if ranks.first:
        for name, way in ways.items():
            found[f"{name}_ms"] = milliseconds(functools.partial(timed, way), prepared, ranks.device)
    return found


def _needed(states: Tensor | None) -> Tensor:
    assert states is not None  # a language model has them
    return states


def _predicted(trace: Trace, states: Tensor, chosen: Tensor) -> Tensor:
    """Return the most probable token at each of the K places that are chosen, (K,); a soft cap keeps their order."""
    head = _needed(trace.head)
    return torch.nn.functional.linear(states[chosen].to(head.dtype), head, trace.head_bias).argmax(-1)
