"""Rehearse a few layers of each kind, and let what they held stand for the others.

A model of 80 equal layers does the same 80 times. The first two and the last layer of each kind run; every layer between
them is replaced by a function that makes the same output, holds as many bytes as the second one held until its backward
pass, and has a gradient arrive at each of its parameters. So everything else, which is layer maps, terms, ZeRO's
buckets and the counts of parameters, is that of the whole model. Between two layers of a kind memory rises and falls
evenly, so its highest moment lies at the first or at the last one, and these run.

A layer whose queries and keys are captured runs as well, and so do all layers of a model with WHOLE layers or less.
"""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsdistill.models.capture import layer_list
from dsdistill.models.small_copy import signature
from dsdistill.planner.ledger import Ledger

WHOLE = 12


class _Touch(torch.autograd.Function):
    """Pass states on; in backward a gradient arrives at the parameter."""

    @staticmethod
    def forward(ctx, states: Tensor, parameter: Tensor) -> Tensor:
        ctx.parameter = parameter
        return states.view_as(states)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, torch.empty_like(ctx.parameter)


class _Hold(torch.autograd.Function):
    """Make a layer's output, and hold its input and so many bytes until backward."""

    @staticmethod
    def forward(ctx, states: Tensor, size: int) -> Tensor:
        ctx.held = states, states.new_empty(size, dtype=torch.uint8)
        return torch.empty_like(states)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.held = None
        return gradient, None


class _Kind:
    """What a layer of a kind left when it ran.

    held: bytes beside its output, None before. known: whether a layer of the kind can be replaced at all.
    """

    def __init__(self):
        self.held: int | None = None
        self.known = False
        self.output: Any = None  # the type of it: a tensor, or what a tuple holds after the first

    def note(self, states: Any, output: Any, held: int) -> None:
        first, rest = (output, None) if isinstance(output, Tensor) else (output[0], output[1:])
        plain = rest is None or (isinstance(output, tuple) and not any(isinstance(x, Tensor) for x in rest))
        alike = isinstance(states, Tensor) and (first.shape, first.dtype) == (states.shape, states.dtype)
        self.known, self.output = plain and alike, rest
        self.held = max(0, held - first.untyped_storage().nbytes())

    def stand_in(self, layer: nn.Module, states: Tensor) -> Any:
        if torch.is_grad_enabled():
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    states = _Touch.apply(states, parameter)
            made = _Hold.apply(states, self.held)
        else:
            made = torch.empty_like(states)
        return made if self.output is None else (made, *self.output)


@contextlib.contextmanager
def few_layers(ledger: Ledger, model: PreTrainedModel, captured: Collection[int]) -> Iterator[None]:
    """Inside, most layers of the model are not run.

    captured: layers whose attention is captured, counted from 1.
    """
    layers = layer_list(model)
    if layers is None or len(layers) <= WHOLE:
        yield
        return
    with contextlib.ExitStack() as stack:
        for alike in _kinds(layers):
            places = [place for place in alike if place + 1 not in captured]
            if len(places) > 3:  # the very first layer may get states that need no gradient
                kind = _Kind()
                _note(ledger, layers[places[1]], kind, stack)
                for place in places[2:-1]:
                    _replace(layers[place], kind, stack)
        yield


def _kinds(layers: Sequence[nn.Module]) -> list[list[int]]:
    """Return the places, from 0, of the layers of each kind: built alike, with the same parameters trained."""
    places: dict[Any, list[int]] = {}
    for place, layer in enumerate(layers):
        trained = tuple(parameter.requires_grad for parameter in layer.parameters())
        places.setdefault((signature(layer), trained), []).append(place)
    return list(places.values())


def _states(args: tuple, options: dict[str, Any]) -> Any:
    return args[0] if args else options.get("hidden_states")


def _note(ledger: Ledger, layer: nn.Module, kind: _Kind, stack: contextlib.ExitStack) -> None:
    forward = layer.forward

    def run(*args, **options):
        before = ledger.held.total()
        output = forward(*args, **options)
        if kind.held is None:  # a checkpointed layer runs again in backward
            kind.note(_states(args, options), output, ledger.held.total() - before)
        return output

    _put(layer, run, stack)


def _replace(layer: nn.Module, kind: _Kind, stack: contextlib.ExitStack) -> None:
    forward = layer.forward

    def run(*args, **options):
        states = _states(args, options)
        return kind.stand_in(layer, states) if kind.known else forward(*args, **options)

    _put(layer, run, stack)


def _put(layer: nn.Module, run: Any, stack: contextlib.ExitStack) -> None:
    """Give a layer another forward for a while."""
    layer.forward = run
    stack.callback(layer.__dict__.pop, "forward")
