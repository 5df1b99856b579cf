"""Capture queries, keys, values and hidden states of chosen layers, without output_attentions.

The models run under an attention function of ours that notes its inputs and then calls the library's SDPA, so
the forward pass keeps its fused kernels. Its mask function is registered too: without that the library drops
the padding mask silently.
"""

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dsdistill.models.trace import AttentionTrace, Geometry, Trace

ATTENTION = "dsdistill"  # the name to give models as attn_implementation

_recording: "Capture | None" = None  # at most one model runs under capture at a time


def attention_trace(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict
) -> AttentionTrace:
    """Return what the library's attention call with these arguments means."""
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


def _attention(module, query, key, value, attention_mask, **options):
    if _recording is not None:
        _recording.note_attention(module, query, key, value, options)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def layer_list(model: PreTrainedModel) -> nn.ModuleList | None:
    """Return the model's blocks in order, or None where it does not hold one module a layer (ALBERT shares one)."""
    depth = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    return None


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """Return the norm between a language model's last layer and its head; None where it has none."""
    body = model.base_model
    for holder in (body, getattr(body, "decoder", None)):
        for name in ("norm", "ln_f", "final_layernorm", "final_layer_norm", "final_norm"):
            if isinstance(getattr(holder, name, None), nn.Module):
                return getattr(holder, name)
    return None


class Capture:
    """Note what the chosen layers of one model compute.

    model: built with attn_implementation=ATTENTION.
    hidden, attention: layers to keep, counted from 1; hidden 0 is the embeddings' output.
    values: keep the values of attention too, which without gradients would be freed.

    Attention layers are told apart by the order of their calls, because some modules carry no index. Only the
    calls inside `recording` count: the second run of a checkpointed layer comes in backward, after it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        hidden: Iterable[int] = (),
        attention: Iterable[int] = (),
        values: bool = True,
    ):
        self.hidden, self.attention, self.values = frozenset(hidden), frozenset(attention), values
        self.geometry: dict[int, Geometry] = {}  # of every layer seen so far
        self._trace: Trace | None = None
        self._calls = 0
        self._hooks: list[RemovableHandle] = []
        layers = layer_list(model)
        if not self.hidden:
            return
        if layers is None:
            raise ValueError(
                f"{type(model).__name__}: no list of {model.config.num_hidden_layers} layers to hook"
            )
        if 0 in self.hidden:
            self._hooks.append(layers[0].register_forward_pre_hook(self._note_embedding, with_kwargs=True))
        for index in self.hidden - {0}:
            hook = partial(self._note_hidden, index)
            self._hooks.append(layers[index - 1].register_forward_hook(hook))

    def detach(self) -> None:
        """Take the hooks off the model; what it computes is noted no more."""
        while self._hooks:
            self._hooks.pop().remove()

    @contextmanager
    def recording(self):
        """Yield the Trace that the forward pass inside fills."""
        global _recording
        if _recording is not None:
            raise RuntimeError("another forward pass is being captured; finish it first")
        self._trace, self._calls, _recording = Trace(), 0, self
        try:
            yield self._trace
        finally:
            self._trace, _recording = None, None

    def note_attention(self, module, query, key, value, options) -> None:
        assert self._trace is not None  # called inside `recording` alone
        self._calls += 1
        layer = attention_trace(module, query, key, value, options)
        self.geometry[self._calls] = layer.geometry
        if self._calls in self.attention:
            self._trace.attention[self._calls] = layer if self.values else replace(layer, value=None)

    def _note_embedding(self, module, args, kwargs) -> None:
        if self._trace is not None:
            self._trace.hidden[0] = args[0] if args else kwargs["hidden_states"]

    def _note_hidden(self, index: int, module, args, output) -> None:
        """Forward hook, once `index` is bound: a partial can be copied and pickled with the model, a closure cannot."""
        # A checkpointed layer runs again in backward; by then nothing is being recorded.
        if self._trace is not None:
            self._trace.hidden[index] = output if isinstance(output, Tensor) else output[0]
