"""Capture queries, keys, values and hidden states of chosen layers, without output_attentions.

The models are not changed. While a forward pass is recorded, the function that a class takes from transformers'
attention interface (SDPA, eager, flex, flash) is called through a wrapper that first records its inputs. If a model
does not use that interface, or if a pass needs no attention, nothing is wrapped.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedModel

from dsdistill.models.settings import text_config
from dsdistill.models.trace import AttentionTrace, Geometry, Trace

# Names of the norm after the last layer in modelling files; the probe checks that the module is this norm.
_FINAL_NORMS = tuple(
    "norm ln_f final_layernorm final_layer_norm final_norm norm_f embedding_norm emb_layer_norm_after "
    "layer_norm layernorm ln LayerNorm".split()
)
# In these types such a name is a norm of relative positions, or one after the library's last hidden states.
_OTHER_NORMS = frozenset({"deberta", "deberta-v2", "reformer"})
ROTATION = "apply_rotary_pos_emb"  # function in modelling files that rotates queries and keys

_recording: "Capture | None" = None  # at most one model runs under capture at a time
_library_interface = AttentionInterface.get_interface


def attention_trace(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict
) -> AttentionTrace:
    """Return the trace of a call of the library's attention with these arguments."""
    causal = options.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)  # the library's own default
    scale = options.get("scaling")
    return AttentionTrace(
        query=query,
        key=key,
        value=value,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        geometry=Geometry(causal=bool(causal), window=options.get("sliding_window")),
    )


def _noting_interface(interface: AttentionInterface, name: str, default: Callable) -> Callable:
    return partial(_noted_attention, _library_interface(interface, name, default))


def _noted_attention(function: Callable, module, query, key, value, *arguments, **options):
    if _recording is None:
        return function(module, query, key, value, *arguments, **options)
    return _recording.attend(function, module, query, key, value, *arguments, **options)


def _noted_rotation(function: Callable, query, key, *arguments, **options):
    if _recording is not None:
        _recording.before_rotation = query, key
    return function(query, key, *arguments, **options)


def body(model: PreTrainedModel) -> nn.Module:
    """Return the model below the head; Llama 4's text class names a base model that it does not have."""
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


def layer_list(model: PreTrainedModel) -> nn.ModuleList | None:
    """Return the model's layers in order, or None if it does not have one module for each layer (ALBERT shares one)."""
    depth = text_config(model.config).num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    return None


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """Return the norm that follows a model's last layer; None if it has none."""
    if text_config(model.config).model_type in _OTHER_NORMS:
        return None
    whole, layers = body(model), layer_list(model)
    owners = [module for module in model.modules() if any(part is layers for part in module.children())]
    for holder in (*owners, whole):
        for name in _FINAL_NORMS:
            if isinstance(getattr(holder, name, None), nn.Module):
                return getattr(holder, name)
    return None


class Capture:
    """Record what the chosen layers of one model compute.

    hidden, attention: layers to keep, counted from 1; hidden 0 is the embeddings' output.
    values: keep the values of attention too; otherwise they are freed in passes without gradients.
    unrotated: also keep queries and keys as they are before their rotation by position (RoPE).

    An attention call belongs to the layer whose module makes it, even if layers before it were skipped. If a model has
    no list of layers (ALBERT runs one repeatedly), calls are assigned to layers by counting. Only the calls inside
    `recording` count, because a checkpointed layer runs a second time in backward, after `recording` has ended.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        hidden: Iterable[int] = (),
        attention: Iterable[int] = (),
        values: bool = True,
        unrotated: bool = False,
    ):
        self.hidden, self.attention = frozenset(hidden), frozenset(attention)
        self.values, self.unrotated = values, unrotated
        self.geometry: dict[int, Geometry] = {}  # of every layer seen so far
        self.calls: Counter[int] = Counter()  # of the latest pass: attention calls by layer
        self.before_rotation: tuple[Tensor, Tensor] | None = None
        self._trace: Trace | None = None
        self._depth: int | None = None
        self._hooks: list[RemovableHandle] = []
        layers = layer_list(model)
        # The keys are the modules and not their ids, so that a copy of a model with its capture still works.
        self._places = {
            module: place for place, layer in enumerate(layers or (), start=1) for module in layer.modules()
        }
        if not self.hidden:
            return
        if layers is None:
            depth = text_config(model.config).num_hidden_layers
            raise ValueError(f"{type(model).__name__}: got no list of layers, expected one of {depth} layers")
        if 0 in self.hidden:
            self._hooks.append(layers[0].register_forward_pre_hook(self._note_embedding, with_kwargs=True))
        for index in self.hidden - {0}:
            hook = partial(self._note_hidden, index)
            self._hooks.append(layers[index - 1].register_forward_hook(hook))
        self._depth = len(layers)
        norm = final_norm(model)
        if self._depth in self.hidden and norm is not None:
            self._hooks.append(norm.register_forward_hook(self._note_last))

    def detach(self) -> None:
        """Remove the hooks from the model. After this nothing is recorded."""
        while self._hooks:
            self._hooks.pop().remove()

    @contextmanager
    def recording(self) -> Iterator[Trace]:
        """Yield the Trace that the forward pass inside fills."""
        global _recording
        if _recording is not None:
            raise RuntimeError("another forward pass is being captured; finish it first")
        with ExitStack() as stack:
            if self.attention:
                stack.enter_context(replaced(AttentionInterface, "get_interface", _noting_interface))
            for file in self._files() if self.unrotated else ():
                noted = partial(_noted_rotation, getattr(file, ROTATION))
                stack.enter_context(replaced(file, ROTATION, noted))
            self._trace, _recording = Trace(depth=self._depth), self
            self.calls.clear()
            try:
                yield self._trace
            finally:
                self._trace, self.before_rotation, _recording = None, None, None

    def attend(self, function: Callable, module: nn.Module, query, key, value, *arguments, **options) -> Any:
        """Record the inputs of a module's attention, then call the library's attention function."""
        assert self._trace is not None  # this is called only inside `recording`
        place = self._places.get(module) if self._places else 1 + self.calls.total()
        if place is not None:  # else the module is outside the layers, such as in a vision tower
            self.calls[place] += 1
            layer = attention_trace(module, query, key, value, options)
            self.geometry[place] = layer.geometry
            if place in self.attention:
                self._trace.attention[place] = self._kept(layer)
        self.before_rotation = None
        return function(module, query, key, value, *arguments, **options)

    def _kept(self, layer: AttentionTrace) -> AttentionTrace:
        if self.before_rotation is not None:
            query, key = self.before_rotation
            layer = replace(layer, unrotated_query=query, unrotated_key=key)
        return layer if self.values else replace(layer, value=None)

    def _files(self) -> list[Any]:
        """Return the modelling files of the model's layers that rotate queries and keys."""
        names = dict.fromkeys(type(module).__module__ for module in self._places)
        return [sys.modules[name] for name in names if hasattr(sys.modules[name], ROTATION)]

    def _note_embedding(self, module, args, kwargs) -> None:
        if self._trace is not None:
            self._trace.hidden[0] = args[0] if args else kwargs["hidden_states"]

    def _note_last(self, module, args, output) -> None:
        if self._trace is not None:
            self._trace.last = output

    def _note_hidden(self, index: int, module, args, output) -> None:
        """Record a layer's output, as a forward hook. A partial binds `index`, because it can be copied and pickled."""
        # A checkpointed layer runs again in backward; by then nothing is being recorded.
        if self._trace is not None:
            self._trace.hidden[index] = output if isinstance(output, Tensor) else output[0]


@contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value inside the context."""
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)
