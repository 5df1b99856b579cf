"""Rehearse a few layers of each kind, and let what they held stand for the others.

A model of 80 equal layers does the same 80 times. Only the first two and the last layer of each kind run. A function
replaces every layer between them: it makes an output of the same shape, holds as many bytes until its backward pass as
the second layer held, and has a gradient arrive at each of its parameters. So layer maps, terms, ZeRO's buckets and
parameter counts are those of the whole model. Between two layers of a kind memory rises and falls evenly, so that the
highest moment is at the first or at the last one, and these run.

A layer whose queries and keys are captured runs too, and so do all layers of a model with at most WHOLE layers.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsdistill.models.capture import Capture, layer_list
from dsdistill.models.small_copy import signature
from dsdistill.planner.ledger import Ledger, address

WHOLE = 12


class _Touch(torch.autograd.Function):
    """Pass states on; in backward give the parameter a gradient."""

    @staticmethod
    def forward(ctx, states: Tensor, parameter: Tensor) -> Tensor:
        ctx.parameter = parameter
        return states.view_as(states)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, torch.empty_like(ctx.parameter)


class _Hold(torch.autograd.Function):
    """Make a layer's output; until backward, hold `size` bytes and, with `own`, the layer's input."""

    @staticmethod
    def forward(ctx, states: Tensor, size: int, own: bool) -> Tensor:
        ctx.held = states if own else None, states.new_empty(size, dtype=torch.uint8)
        return torch.empty_like(states)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.held = None
        return gradient, None, None


class _Kind:
    """A _Kind notes what a layer of one kind held when it ran.

    held: bytes besides its input and output, None before it ran. own: whether it holds its input. known: whether
    layers of the kind can be replaced.
    """

    def __init__(self):
        self.held: int | None = None
        self.known = self.own = False
        self.rest: tuple | None = (
            None  # all but the first of a tuple of outputs; None: the output is no tuple
        )

    def note(self, states: Any, output: Any, held: int, saved: set[int] | None) -> None:
        """Note a layer's output for its input; saved: storages that backward needs, None if the layer runs again."""
        self.held = held
        first, *rest = output if isinstance(output, tuple) else (output,)
        if any(isinstance(x, Tensor) for x in rest) or not all(
            isinstance(x, Tensor) for x in (states, first)
        ):
            return
        self.known = (first.shape, first.dtype) == (states.shape, states.dtype)
        self.rest = tuple(rest) if isinstance(output, tuple) else None
        self.held = max(0, held - first.untyped_storage().nbytes())
        self.own = saved is None or address(states) in saved

    def stand_in(self, layer: nn.Module, states: Tensor) -> Any:
        if torch.is_grad_enabled():
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    states = _Touch.apply(states, parameter)
            made = _Hold.apply(states, self.held, self.own)
        else:
            made = torch.empty_like(states)
        return made if self.rest is None else (made, *self.rest)


@contextlib.contextmanager
def few_layers(ledger: Ledger, model: PreTrainedModel, capture: Capture) -> Iterator[None]:
    """Run only a few layers of the model inside; `capture` is what captures its states."""
    layers = layer_list(model)
    if layers is None or len(layers) <= WHOLE:
        yield
        return
    with contextlib.ExitStack() as stack:
        for alike in _kinds(layers):
            places = [place for place in alike if place + 1 not in capture.attention]
            if len(places) > 3:  # note the second: the first may get states that need no gradient
                kind = _Kind()
                _note(ledger, layers[places[1]], kind, stack)
                for place in places[2:-1]:
                    _replace(layers[place], kind, stack)
        yield


def _kinds(layers: Sequence[nn.Module]) -> list[list[int]]:
    """Return the indices, from 0, of the layers of each kind: built alike, with the same parameters trained."""
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
        if kind.held is not None:  # a checkpointed layer runs again in backward
            return forward(*args, **options)
        before, saved = ledger.held.total(), None
        with contextlib.ExitStack() as hooks:
            if not getattr(layer, "gradient_checkpointing", False):
                saved = set()
                hooks.enter_context(_saving(saved))
            output = forward(*args, **options)
        kind.note(_states(args, options), output, ledger.held.total() - before, saved)
        return output

    _put(layer, run, stack)


def _saving(saved: set[int]) -> torch.autograd.graph.saved_tensors_hooks:
    """Return a context that notes the storages of all tensors which are saved for backward."""

    def pack(tensor: Tensor) -> Tensor:
        saved.add(address(tensor))
        return tensor.detach()  # an output that held itself would never be freed

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def _replace(layer: nn.Module, kind: _Kind, stack: contextlib.ExitStack) -> None:
    forward = layer.forward

    def run(*args, **options):
        states = _states(args, options)
        return kind.stand_in(layer, states) if kind.known else forward(*args, **options)

    _put(layer, run, stack)


def _put(layer: nn.Module, run: Any, stack: contextlib.ExitStack) -> None:
    """Replace a layer's forward until the stack is closed."""
    layer.forward = run
    stack.callback(layer.__dict__.pop, "forward")
