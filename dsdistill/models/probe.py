"""Refuse by name, before anything heavy loads, a model whose attention we would misread.

Counting captured calls is not enough: position biases, soft caps and sinks change the probabilities without
changing queries and keys. So a small random copy of the architecture runs twice: once with the library's eager
attention, once with attention recomputed from what Capture would note. Unequal hidden states mean that the
captured tensors do not tell the whole story.
"""

import copy

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, PretrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

from dsdistill.config import UserError
from dsdistill.models.capture import Capture, attention_trace, layer_list
from dsdistill.models.trace import Geometry

_RECOMPUTED = "dsdistill_recomputed"
_LENGTH = 12  # tokens of the probe's sequence; longer than its windows
_WINDOW = 8

_calls = 0


def _recomputed_attention(module, query, key, value, attention_mask, **options):
    global _calls
    _calls += 1
    for extra in (
        "softcap",
        "s_aux",
        "position_bias",
    ):  # too weak to show in the small copy's output, perhaps
        if options.get(extra) is not None:
            raise ValueError(f"its attention takes {extra}")
    layer = attention_trace(module, query, key, value, options)
    valid = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool)
    valid[0, -3:] = False  # the padding that probe() gives
    groups = query.shape[1] // key.shape[1]
    scores = layer.scale * query @ repeat_kv(key, groups).transpose(-1, -2)
    scores = scores.masked_fill(~_visible(valid, layer.geometry)[:, None], float("-inf"))
    return (scores.softmax(-1) @ repeat_kv(value, groups)).transpose(1, 2).contiguous(), None


AttentionInterface.register(_RECOMPUTED, _recomputed_attention)
AttentionMaskInterface.register(_RECOMPUTED, sdpa_mask)


def probe(config: PretrainedConfig, place: str, *, attention: bool, hidden: bool) -> None:
    """Raise UserError where Capture would miss or misread what the terms need.

    config: architecture of the model; place: the config key to name; attention, hidden: what is needed.
    """
    global _calls
    name = config.model_type
    if config.is_encoder_decoder:
        raise UserError(place, f"model type {name}, an encoder-decoder", "an encoder or a decoder")
    small = _small_copy(config)
    input_ids = torch.arange(2 * _LENGTH).reshape(2, _LENGTH) % 64 + 2
    mask = torch.ones(2, _LENGTH, dtype=torch.int64)
    mask[0, -3:] = 0
    inputs = {"input_ids": input_ids, "attention_mask": mask, "output_hidden_states": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            eager = AutoModel.from_config(small, attn_implementation="eager").float().eval()
        except ValueError as error:
            raise UserError(
                place, f"model type {name} ({error})", "an encoder or decoder of transformers"
            ) from None
        # Fresh query and key weights are so small that every probability is nearly 1/N: sharpen them.
        with torch.no_grad():
            for parameter in eager.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(4.0)
    if hidden and layer_list(eager) is None:
        raise UserError(
            place,
            f"model type {name}, which holds no list of its layers",
            "a model whose layers can be hooked",
        )
    with torch.no_grad():
        if hidden:
            _probe_hidden(eager, inputs, place)
        if not attention:
            return
        truth = eager(**inputs).last_hidden_state
        _calls = 0
        try:
            eager.set_attn_implementation(_RECOMPUTED)
            got = eager(**inputs).last_hidden_state
        except ValueError as error:
            raise UserError(
                place, f"model type {name} ({error})", "a model with interchangeable attention"
            ) from None
    if _calls != small.num_hidden_layers:
        raise UserError(
            place,
            f"model type {name}, {_calls} of {small.num_hidden_layers} attention layers captured",
            "a model that runs its attention through transformers' attention interface",
        )
    valid = mask.bool()
    if not torch.allclose(got[valid], truth[valid], rtol=1e-3, atol=1e-4):
        raise UserError(
            place,
            f"model type {name}, whose attention is more than softmax(scale·QKᵀ)·V (bias, soft cap or sink)",
            "a model whose attention follows from its queries and keys, or no attention term",
        )


def _probe_hidden(model, inputs: dict, place: str) -> None:
    """The hooked embeddings' output must be the library's own first hidden state."""
    with Capture(model, hidden=[0]).recording() as trace:
        states = model(**inputs).hidden_states
    if states is None or 0 not in trace.hidden or not torch.equal(trace.hidden[0], states[0]):
        raise UserError(
            place,
            f"model type {model.config.model_type}, whose layers do not pass hidden states on",
            "a model whose layers can be hooked",
        )


def _small_copy(config: PretrainedConfig) -> PretrainedConfig:
    """The architecture with few layers, tokens and feed-forward units; heads and head widths stay."""
    small = copy.deepcopy(config)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ["full_attention"]))
    kinds = kinds if len(kinds) > 1 else kinds * 2  # with one layer, a model that shares its layer would pass
    small.num_hidden_layers = len(kinds)
    if getattr(config, "layer_types", None):
        small.layer_types = kinds
    small.vocab_size = 128
    for token in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        if getattr(small, token, None) is not None:
            setattr(small, token, 0 if token == "pad_token_id" else 1)
    for width in ("intermediate_size", "hidden_dim", "n_inner"):
        if isinstance(getattr(small, width, None), int):
            setattr(small, width, 64)
    for dropout in ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout"):
        if isinstance(getattr(small, dropout, None), float):
            setattr(small, dropout, 0.0)
    if getattr(small, "sliding_window", None):
        small.sliding_window = _WINDOW
    return small


def _visible(mask: Tensor, geometry: Geometry) -> Tensor:
    """(B, N, N) bool: which keys each query may see; mask (B, N) bool, True = valid."""
    position = torch.arange(mask.shape[1], device=mask.device)
    distance = position[:, None] - position[None, :]
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if geometry.causal:
        allowed &= distance >= 0
    if geometry.window is not None:
        allowed &= distance.abs() < geometry.window
    return allowed & mask[:, None, :]
