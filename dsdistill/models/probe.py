"""Refuse, before anything heavy loads, a model that cannot do the task or that this package would misread.

A small random copy of every model is tried. With the run's attention implementation it must compute the same as with
the library's eager attention, with and without padding: an implementation that ignores position biases, soft caps or
sinks changes probabilities silently. Captured tensors are checked in the same way: attention recomputed from them must
be the attention of the layer.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

from dsdistill.config import UserError
from dsdistill.config.schema import LANGUAGE
from dsdistill.models.build import FLASH, Headless, first_line, flash_here, unsharded
from dsdistill.models.capture import Capture, attention_trace, body, final_norm, layer_list
from dsdistill.models.logits import softcapped
from dsdistill.models.settings import attention_layers, text_config
from dsdistill.models.small_copy import (
    copied_layers,
    layer_kinds,
    make_small,
    sharpen,
    small_copies,
)
from dsdistill.models.trace import Geometry

_LENGTH = 12  # tokens of the trial text; longer than the copy's windows
_PADDING = 3  # tokens at the end of its first row
_EXTRAS = ("softcap", "s_aux", "position_bias")  # may be too weak to show in the small copy's output
# Largest differences relative to the largest value; an ignored bias or cap makes far larger ones.
ROUNDING, HALF_ROUNDING = 1e-3, 5e-2


@dataclass(frozen=True)
class Seen:
    """Hold what the trial of a model found about its attention; empty if attention was not tried."""

    geometry: dict[int, Geometry]  # which keys each layer with attention sees, by layer counted from 1
    rotation: str = "none"  # none; seen: queries and keys can be captured before it; hidden: they cannot


@unsharded()
def probe(
    config: PretrainedConfig,
    task: str,
    place: str,
    *,
    attention: bool,
    hidden: bool,
    lens: bool = False,
    final: bool = False,
    implementation: str = "auto",
) -> Seen:
    """Raise UserError if the model cannot do the task, or if Capture would miss or misread what terms need.

    config: architecture of the model; place: the config key that errors name; attention, hidden: whether terms need
    them; lens: final norm and head read hidden states as if they were the last; final: the last layer's states are read
    after the final norm; implementation: the attention's, as `attn_implementation` in a config.
    """
    if config.is_encoder_decoder:
        raise UserError(
            place, f"model type {config.model_type}, an encoder-decoder", "an encoder or a decoder"
        )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return _probe(keyed(config), task, place, attention, hidden, lens, final, implementation)


@dataclass(frozen=True)
class Keyed:
    """Make an architecture hashable, so that it can be a key of a cache."""

    key: str
    config: PretrainedConfig

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keyed) and self.key == other.key


def keyed(config: PretrainedConfig) -> Keyed:
    """Return an architecture as a key of a cache."""
    return Keyed(config.to_json_string(use_diff=False), config)


@functools.lru_cache(
    maxsize=256
)  # a run calls this again for each stage's student, and so do its recipe and its plan
def _probe(
    keyed: Keyed,
    task: str,
    place: str,
    attention: bool,
    hidden: bool,
    lens: bool,
    final: bool,
    implementation: str,
) -> Seen:
    config = keyed.config
    try:
        kinds = layer_kinds(config, task, place)
        small, eager = smallest(config, task, place, copied_layers(kinds))
        model = under(implementation, small, task, place, eager)
        if task in LANGUAGE:
            _probe_language(model, place, causal=task == "causal_lm")
        if hidden:
            _probe_hidden(model, place)
        if lens:
            _probe_lens(model, place)
        if final:
            _probe_final(model, place)
        if not attention:
            return Seen({})
        _probe_attention(model, place)
        geometry = _geometry(config, task, place, kinds)
        return Seen(geometry, _rotation(model))
    except UserError:
        raise
    except Exception as error:  # an unknown architecture may raise anything
        raise UserError(
            place,
            f"model type {config.model_type} ({first_line(error)[:100]})",
            f"an encoder or decoder of transformers for {task}",
        ) from error


def smallest(
    config: PretrainedConfig, task: str, place: str, layers: int
) -> tuple[PretrainedConfig, PreTrainedModel]:
    """Return the smallest copy that runs under eager attention, and its model with peaked attention."""
    failure: Exception | None = None
    for small in small_copies(config, layers):
        try:
            model = make_small(small, task, place, "eager")
            start = {name: value.clone() for name, value in model.state_dict().items()}
            sharpen(model)
            if not all(torch.isfinite(value).all() for value in _outputs(model, _inputs())):
                model.load_state_dict(start)  # some families overflow with peaked attention
                _outputs(model, _inputs())
            return small, model
        except UserError as error:  # too large
            failure = failure or error
        except Exception as error:  # settings that belong together: the next copy keeps more of them
            failure = error
    assert failure is not None  # at least one copy has been tried
    raise failure


def under(
    implementation: str, small: PretrainedConfig, task: str, place: str, eager: PreTrainedModel
) -> PreTrainedModel:
    """Return the copy with the run's attention; raise UserError if it computes something else than with eager."""
    if implementation == FLASH and not flash_here():
        return eager  # check_attention() refuses it when training starts
    named = None if implementation == "auto" else implementation
    device = torch.device("cuda") if implementation == FLASH else torch.device("cpu")
    where = place if named is None else f"{place}.attn_implementation"
    try:
        model = make_small(small, task, place, named)
        model.load_state_dict(eager.state_dict())
        if implementation == FLASH:  # flash attention computes only in half precision
            for half in (model, eager):
                half.to(device, torch.bfloat16)  # type: ignore[arg-type]  # a decorator hides the arguments
        used = text_config(model.config)._attn_implementation
        if named is None and used == "eager":
            return model
        for inputs in _ways():
            inputs = {name: value.to(device) for name, value in inputs.items()}
            mine, truth = _outputs(model, inputs), _outputs(eager, inputs)
            tolerance = ROUNDING if named != FLASH else HALF_ROUNDING
            if not all(_agree(a, b, inputs, tolerance) for a, b in zip(mine, truth, strict=True)):
                raise UserError(
                    where,
                    f"model type {small.model_type}, which computes something else under {used} than under eager "
                    "attention",
                    "attn_implementation: eager",
                )
    except UserError:
        raise
    except Exception as error:
        if named is None:
            raise
        got = f"{named} for model type {small.model_type} ({first_line(error)[:100]})"
        raise UserError(where, got, "auto, or one that this model and machine support") from error
    if implementation == FLASH:
        model.cpu().float()
        eager.cpu().float()
        return eager
    return model


def _inputs(padded: bool = True) -> dict[str, Tensor]:
    input_ids = torch.arange(2 * _LENGTH).reshape(2, _LENGTH) % 64 + 2
    mask = torch.ones(2, _LENGTH, dtype=torch.int64)
    if padded:
        mask[0, -_PADDING:] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


def _ways() -> tuple[dict[str, Tensor], ...]:
    """Return the two forms of input: with padding, and without."""
    return _inputs(), _inputs(padded=False)


def _outputs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return a model's last hidden states and its logits, or the states twice if it has no head."""
    states, outputs = body(model)(**inputs)[0], model(**inputs)
    return states, outputs["logits"] if "logits" in outputs else outputs[0]


def _agree(mine: Tensor, truth: Tensor, inputs: dict[str, Tensor], tolerance: float = ROUNDING) -> bool:
    """Return whether two outputs agree up to rounding, without padding."""
    if mine.shape[:2] == inputs["input_ids"].shape:
        valid = inputs["attention_mask"].bool()
        mine, truth = mine[valid], truth[valid]
    return bool((mine - truth).abs().max() <= tolerance * truth.abs().max().clamp_min(0.1))


def _probe_language(model: PreTrainedModel, place: str, causal: bool) -> None:
    """Check that Headless gives the same logits, and that a causal model does not read ahead."""
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
            place, f"model type {name}, which sees the tokens that it must predict", "a causal model"
        )


def _probe_hidden(model: PreTrainedModel, place: str) -> None:
    """Check that the hooks record the library's own hidden states (the library's last may come after a norm)."""
    name, depth = model.config.model_type, text_config(model.config).num_hidden_layers
    if layer_list(model) is None:
        raise UserError(
            place,
            f"model type {name}, which has no list of its layers",
            "a model whose layers can be hooked",
        )
    inputs = _inputs()
    with Capture(model, hidden=range(depth)).recording() as trace:
        states = model(**inputs, output_hidden_states=True).hidden_states
    # Gemma 3n has four streams of states at once, so there is no (B, N, D) that a term could read.
    if states is None or any(
        layer not in trace.hidden
        or trace.hidden[layer].shape[:-1] != inputs["input_ids"].shape
        or not torch.equal(trace.hidden[layer], states[layer])
        for layer in range(depth)
    ):
        raise UserError(
            place,
            f"model type {name}, whose layers do not pass on hidden states",
            "a model whose layers can be hooked",
        )


def _probe_lens(model: PreTrainedModel, place: str) -> None:
    """Check that the final norm alone turns the last layer's state into the head's input."""
    depth, norm = text_config(model.config).num_hidden_layers, final_norm(model)
    with Capture(model, hidden=[depth]).recording() as trace:
        output = body(model)(**_inputs())[0]
    last = trace.hidden[depth]
    if not torch.allclose(last if norm is None else norm(last), output, rtol=1e-3, atol=1e-4):
        raise UserError(
            place,
            f"model type {model.config.model_type}, which has more than a norm between its last layer and its head",
            "a language model with at most one final norm there, or no fdd term",
        )


def _probe_final(model: PreTrainedModel, place: str) -> None:
    """Check that the states recorded after the final norm are the library's last hidden states."""
    depth, inputs = text_config(model.config).num_hidden_layers, _inputs()
    with Capture(model, hidden=[depth]).recording() as trace:
        states = model(**inputs, output_hidden_states=True).hidden_states
    mine = trace.state(depth, after=True)
    # OPT-350m's last states are as wide as its embeddings, not as its layers.
    if states is None or mine.shape != states[-1].shape or not _agree(mine, states[-1], inputs):
        raise UserError(
            place,
            f"model type {model.config.model_type}, whose last hidden states are not its last layer's after a norm",
            "terms with final_norm: before",
        )


class _Judge(Capture):
    """Capture every layer, and compare its attention with attention recomputed from the captured tensors."""

    def __init__(self, model: PreTrainedModel, valid: Tensor):
        super().__init__(model, attention=range(1, text_config(model.config).num_hidden_layers + 1))
        self.valid = valid
        self.extra: str | None = None  # name of an additional input of some layer's attention
        self.wrong = False

    def attend(self, function, module, query, key, value, *arguments, **options):
        result = super().attend(function, module, query, key, value, *arguments, **options)
        if module not in self._places and self._places:
            return result
        self.extra = self.extra or next((extra for extra in _EXTRAS if options.get(extra) is not None), None)
        expected = _recomputed(module, query, key, value, options, self.valid)
        rows = {"input_ids": self.valid, "attention_mask": self.valid}
        self.wrong = self.wrong or not _agree(result[0].reshape(expected.shape), expected, rows)
        return result


def _recomputed(module: nn.Module, query, key, value, options: dict[str, Any], valid: Tensor) -> Tensor:
    """Return attention by its definition from the contents of a trace, (B, N, H, D_v)."""
    layer = attention_trace(module, query, key, value, options)
    groups = query.shape[1] // key.shape[1]
    scores = layer.scale * query @ repeat_kv(key, groups).transpose(-1, -2)
    scores = scores.masked_fill(~_visible(valid, layer.geometry)[:, None], float("-inf"))
    return (scores.softmax(-1) @ repeat_kv(value, groups)).transpose(1, 2)


def _probe_attention(model: PreTrainedModel, place: str) -> None:
    """Check that attention recomputed from queries and keys equals the layers' attention."""
    name, inputs = model.config.model_type, _inputs()
    claimed = attention_layers(model.config)
    judge = _Judge(model, inputs["attention_mask"].bool())
    with judge.recording():
        body(model)(**inputs)
    if judge.extra is not None:
        raise UserError(
            place,
            f"model type {name}, whose attention has the further input {judge.extra}",
            "a model whose attention depends only on queries and keys, or no attention term",
        )
    if dict(judge.calls) != dict.fromkeys(claimed, 1):
        raise UserError(
            place,
            f"model type {name}, with {judge.calls.total()} of {len(claimed)} attention layers captured",
            "a model that runs its attention through transformers' attention interface",
        )
    if judge.wrong:
        raise UserError(
            place,
            f"model type {name}, whose attention is more than softmax(scale·QKᵀ)·V (bias, soft cap or sink)",
            "a model whose attention depends only on queries and keys, or no attention term",
        )


def _geometry(config: PretrainedConfig, task: str, place: str, kinds: list[int]) -> dict[int, Geometry]:
    """Return the geometry of every layer with attention, from a small copy that keeps the windows."""
    for small in small_copies(config, copied_layers(kinds), window=None):
        try:
            model = make_small(small, task, place, None)
            capture = Capture(model, attention=range(1, text_config(small).num_hidden_layers + 1))
            with capture.recording():
                body(model)(**_inputs())
            break
        except Exception as error:  # settings that belong together: the next copy keeps more of them
            failure = error
    else:
        raise failure
    seen = capture.geometry
    # If no other layer is built like the model's last one, the last layer of the copy represents it.
    last = max(seen, default=0)
    return {
        layer: seen.get(kind + 1, seen[last])
        for layer, kind in enumerate(kinds, start=1)
        if layer in attention_layers(config)
    }


def _rotation(model: PreTrainedModel) -> str:
    """Return whether queries and keys are rotated by their position; see Seen.rotation."""
    if not _rotates(model):
        return "none"
    every = range(1, text_config(model.config).num_hidden_layers + 1)
    capture = Capture(model, attention=every, unrotated=True)
    with capture.recording() as trace:
        body(model)(**_inputs())
    for layer in trace.attention.values():
        for before, after in (
            (layer.unrotated_query, layer.query),
            (layer.unrotated_key, layer.key),
        ):
            if before is None or before.shape != after.shape or not _only_turned(before, after):
                return "hidden"
    return "seen"


def _only_turned(before: Tensor, after: Tensor) -> bool:
    """Return whether a rotation by position explains the difference: lengths stay, and position 0 does not change.

    Some families also multiply the rotated vectors by one number (YaRN).
    """
    lengths = [torch.linalg.vector_norm(x.double(), dim=-1) for x in (before, after)]
    scale = lengths[1] / lengths[0].clamp_min(1e-12)
    one = scale.median()
    first = torch.allclose(after[..., 0, :], one.to(after.dtype) * before[..., 0, :], rtol=1e-3, atol=1e-4)
    return first and bool(((scale - one).abs() <= 1e-3 * one).all())


def _rotates(model: PreTrainedModel) -> bool:
    """Return whether queries or keys differ between positions even if each layer's input is equal at all positions."""
    layers = layer_list(model)
    if layers is None:  # models such as ALBERT, which add positions in their embeddings
        return False
    capture = Capture(model, attention=range(1, text_config(model.config).num_hidden_layers + 1))
    hooks = [layer.register_forward_pre_hook(_same_everywhere, with_kwargs=True) for layer in layers]
    try:
        with capture.recording() as trace:
            body(model)(**_inputs())
    finally:
        for hook in hooks:
            hook.remove()
    return not all(
        torch.allclose(x, x[:, :, :1].expand_as(x), rtol=1e-3, atol=1e-4)
        for layer in trace.attention.values()
        for x in (layer.query[1:], layer.key[1:])  # the row without padding
    )


def _same_everywhere(layer, args, kwargs):
    """Give every token of a sequence the state of the first token, as a forward pre-hook."""
    states = args[0] if args else kwargs["hidden_states"]
    states = states[:, :1].expand_as(states).contiguous()
    return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})


def _visible(mask: Tensor, geometry: Geometry) -> Tensor:
    """Return which keys each query may see, (B, N, N) bool. mask: (B, N) bool, True = valid."""
    position = torch.arange(mask.shape[1], device=mask.device)
    distance = position[:, None] - position[None, :]
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if geometry.causal:
        allowed &= distance >= 0
    if geometry.window is not None:
        allowed &= distance.abs() < geometry.window
    return allowed & mask[:, None, :]
