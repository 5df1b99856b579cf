"""Refuse by name, before anything heavy loads, a model that cannot do the task or that we would misread.

Counting captured calls is not enough: position biases, soft caps and sinks change the probabilities without
changing queries and keys. So a small random copy of the architecture runs twice: once with the library's eager
attention, once with attention recomputed from what Capture would note. Unequal hidden states mean that the
captured tensors do not tell the whole story.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

from dsdistill.config import UserError
from dsdistill.config.schema import LANGUAGE
from dsdistill.models.build import Headless, auto_class, skeleton
from dsdistill.models.capture import ATTENTION, Capture, attention_trace, final_norm, layer_list
from dsdistill.models.logits import softcapped
from dsdistill.models.trace import Geometry

_RECOMPUTED = "dsdistill_recomputed"
_LENGTH = 12  # tokens of the probe's sequence; longer than its windows
_WINDOW = 8
_PADDING = 3  # tokens at the end of its first row

LARGEST = 2**33  # values of the small copy

_EXTRAS = ("softcap", "s_aux", "position_bias")  # perhaps too weak to show in the small copy's output

_calls: list[str | None] = []  # of the probe that runs: what each took beside queries, keys and values


def _recomputed_attention(module, query, key, value, attention_mask, **options):
    _calls.append(next((extra for extra in _EXTRAS if options.get(extra) is not None), None))
    layer = attention_trace(module, query, key, value, options)
    valid = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool)
    valid[0, -_PADDING:] = False
    groups = query.shape[1] // key.shape[1]
    scores = layer.scale * query @ repeat_kv(key, groups).transpose(-1, -2)
    scores = scores.masked_fill(~_visible(valid, layer.geometry)[:, None], float("-inf"))
    return (scores.softmax(-1) @ repeat_kv(value, groups)).transpose(1, 2).contiguous(), None


AttentionInterface.register(_RECOMPUTED, _recomputed_attention)
AttentionMaskInterface.register(_RECOMPUTED, sdpa_mask)


def probe(
    config: PretrainedConfig, task: str, place: str, *, attention: bool, hidden: bool, lens: bool = False
) -> dict[int, Geometry]:
    """Raise UserError where the model cannot do the task, or where Capture would miss or misread what terms need.

    config: architecture of the model; place: the config key to name; attention, hidden: what is needed; lens: hidden
    states are to be read as if they were the last (by the final norm and the head).
    Returns which keys each layer sees, by layer counted from 1 (nothing without `attention`).
    """
    name = config.model_type
    if config.is_encoder_decoder:
        raise UserError(place, f"model type {name}, an encoder-decoder", "an encoder or a decoder")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            _check_size(_small_copy(config), task, place)
            model = auto_class(task).from_config(
                _small_copy(config), attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
            )
            model = model.float().eval()
            _sharpen(model)
            if task in LANGUAGE:
                _probe_language(model, place, causal=task == "causal_lm")
            if hidden:
                _probe_hidden(model, place)
            if lens:
                _probe_lens(model, place)
            if not attention:
                return {}
            _probe_attention(model, place)
            return _geometry(config, task)
        except UserError:
            raise
        except Exception as error:  # whatever an unknown architecture trips over
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                place,
                f"model type {name} ({reason[:100]})",
                f"an encoder or decoder of transformers for {task}",
            ) from error


def _check_size(small: PretrainedConfig, task: str, place: str) -> None:
    """Refuse a small copy that no memory holds, before any is taken: what it keeps may be beyond all models."""
    sizes = sorted(value for value in _numbers(small.to_dict()) if value < 2**40)
    if not sizes[1:] or sizes[-1] * sizes[-2] <= LARGEST // 8:
        return
    size = sum(parameter.numel() for parameter in skeleton(small, task, place).parameters())
    if size > LARGEST:
        raise UserError(place, f"a model of {size:,} values in two layers", f"at most {LARGEST:,}")


def _numbers(value: object) -> Iterator[int]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)
    elif isinstance(value, int):
        yield value


def rotates_queries(config: PretrainedConfig, task: str) -> bool:
    """Return whether queries or keys are captured after a rotation by their position (RoPE).

    Then they differ between positions even where all hidden states are the same, which a small random copy of the
    architecture is made to see. `config` passes `probe`.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = auto_class(task).from_config(_small_copy(config), attn_implementation=ATTENTION)
        model = model.float().eval()
        _sharpen(model)
        layers = layer_list(model)
        if layers is None:  # ALBERT and its like, which number positions in their embeddings
            return False
        layers[0].register_forward_pre_hook(_same_everywhere, with_kwargs=True)
        capture = Capture(model, attention=range(1, model.config.num_hidden_layers + 1))
        with capture.recording() as trace:
            model.base_model(**_inputs())
    return not all(
        torch.allclose(x, x[:, :, :1].expand_as(x), rtol=1e-3, atol=1e-4)
        for layer in trace.attention.values()
        for x in (layer.query[1:], layer.key[1:])  # the row without padding
    )


def _same_everywhere(layer, args, kwargs):
    """Give every token of a sequence the state of its first; this is a forward pre-hook."""
    states = args[0] if args else kwargs["hidden_states"]
    states = states[:, :1].expand_as(states).contiguous()
    return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})


def _inputs() -> dict[str, Tensor]:
    input_ids = torch.arange(2 * _LENGTH).reshape(2, _LENGTH) % 64 + 2
    mask = torch.ones(2, _LENGTH, dtype=torch.int64)
    mask[0, -_PADDING:] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


def _sharpen(model: PreTrainedModel) -> None:
    """Make attention peaked: as initialised it is nearly uniform, and parameters of 0 hide what they would do."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.mul_(4.0)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))


def _probe_language(model: PreTrainedModel, place: str, causal: bool) -> None:
    """The logits must be as Headless says; a causal model must predict from the left alone."""
    name, inputs = model.config.model_type, _inputs()
    headless, head = Headless(model, place), model.get_output_embeddings()
    output, logits = headless(**inputs).last_hidden_state, model(**inputs).logits
    if head is None or not torch.allclose(
        logits,
        softcapped(functional.linear(output, head.weight, head.bias), headless.form.softcap),
        rtol=1e-3,
        atol=1e-4,
    ):
        raise UserError(
            place,
            f"model type {name}, whose head is more than one linear map",
            "a language model whose logits are a linear map of its last hidden state",
        )
    if not causal:
        return
    inputs["input_ids"][1, -1] = 1
    if not torch.allclose(model(**inputs).logits[1, :-1], logits[1, :-1], rtol=1e-3, atol=1e-4):
        raise UserError(
            place, f"model type {name}, which sees the tokens that it is to predict", "a causal model"
        )


def _probe_hidden(model: PreTrainedModel, place: str) -> None:
    """What the hooks note must be the library's own hidden states (the last may have passed a norm there)."""
    name, depth = model.config.model_type, model.config.num_hidden_layers
    if layer_list(model) is None:
        raise UserError(
            place,
            f"model type {name}, which holds no list of its layers",
            "a model whose layers can be hooked",
        )
    with Capture(model, hidden=range(depth)).recording() as trace:
        states = model(**_inputs(), output_hidden_states=True).hidden_states
    if states is None or any(
        layer not in trace.hidden or not torch.equal(trace.hidden[layer], states[layer])
        for layer in range(depth)
    ):
        raise UserError(
            place,
            f"model type {name}, whose layers do not pass hidden states on",
            "a model whose layers can be hooked",
        )


def _probe_lens(model: PreTrainedModel, place: str) -> None:
    """The last layer's state must become what the head reads by the final norm alone."""
    depth, norm = model.config.num_hidden_layers, final_norm(model)
    with Capture(model, hidden=[depth]).recording() as trace:
        output = model.base_model(**_inputs())[0]
    last = trace.hidden[depth]
    if not torch.allclose(last if norm is None else norm(last), output, rtol=1e-3, atol=1e-4):
        raise UserError(
            place,
            f"model type {model.config.model_type}, whose last layer does not reach the head by a norm alone",
            "a language model with one final norm or none, or no fdd term",
        )


def _probe_attention(model: PreTrainedModel, place: str) -> None:
    """Attention recomputed from queries and keys must lead to the same hidden states as the library's."""
    name, depth, inputs = model.config.model_type, model.config.num_hidden_layers, _inputs()
    truth = model.base_model(**inputs)[0]
    _calls.clear()
    model.set_attn_implementation(_RECOMPUTED)
    got = model.base_model(**inputs)[0]
    if extra := next(filter(None, _calls), None):
        raise UserError(
            place,
            f"model type {name}, whose attention takes {extra}",
            "a model whose attention follows from its queries and keys, or no attention term",
        )
    if len(_calls) != depth:
        raise UserError(
            place,
            f"model type {name}, {len(_calls)} of {depth} attention layers captured",
            "a model that runs its attention through transformers' attention interface",
        )
    valid = inputs["attention_mask"].bool()
    if not torch.allclose(got[valid], truth[valid], rtol=1e-3, atol=1e-4):
        raise UserError(
            place,
            f"model type {name}, whose attention is more than softmax(scale·QKᵀ)·V (bias, soft cap or sink)",
            "a model whose attention follows from its queries and keys, or no attention term",
        )


def _geometry(config: PretrainedConfig, task: str) -> dict[int, Geometry]:
    """Return the geometry of every layer, from a small copy that keeps the windows."""
    model = (
        auto_class(task).from_config(_small_copy(config, window=None), attn_implementation=ATTENTION).eval()
    )
    capture = Capture(model)
    with capture.recording():
        model.base_model(**_inputs())
    by_kind = dict(zip(_kinds(config), capture.geometry.values(), strict=True))
    types = getattr(config, "layer_types", None) or [next(iter(by_kind))] * config.num_hidden_layers
    return {layer: by_kind[kind] for layer, kind in enumerate(types, start=1)}


def _kinds(config: PretrainedConfig) -> list[str]:
    """Return the kinds of the small copy's layers: one of each, but two at least.

    With one layer a model that shares its layer would pass.
    """
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ["full_attention"]))
    return kinds if len(kinds) > 1 else kinds * 2


def _small_copy(config: PretrainedConfig, window: int | None = _WINDOW) -> PretrainedConfig:
    """Return the architecture with few layers, tokens and feed-forward units; heads and head widths stay.

    window: of its sliding layers; None leaves the architecture's own.
    """
    small = copy.deepcopy(config)
    kinds = _kinds(config)
    small.num_hidden_layers = len(kinds)
    if getattr(config, "layer_types", None):
        small.layer_types = kinds
    small.vocab_size = 128
    for token in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        if getattr(small, token, None) is not None:
            setattr(small, token, 1)
    small.pad_token_id = 0
    for width in ("intermediate_size", "hidden_dim", "n_inner"):
        if isinstance(getattr(small, width, None), int):
            setattr(small, width, 64)
    for dropout in ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout"):
        if isinstance(getattr(small, dropout, None), float):
            setattr(small, dropout, 0.0)
    for key in ("sliding_window", "attention_chunk_size"):
        if window is not None and getattr(small, key, None):
            setattr(small, key, window)
    small.use_cache = False
    return small


def _visible(mask: Tensor, geometry: Geometry) -> Tensor:
    """Return (B, N, N) bool: which keys each query may see; mask (B, N) bool, True = valid."""
    position = torch.arange(mask.shape[1], device=mask.device)
    distance = position[:, None] - position[None, :]
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if geometry.causal:
        allowed &= distance >= 0
    if geometry.window is not None:
        allowed &= distance.abs() < geometry.window
    return allowed & mask[:, None, :]
