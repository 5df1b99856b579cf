"""Make a small random copy of an architecture, to test what its modelling code does before any weight is loaded."""

import copy
import re
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dsdistill.config import UserError
from dsdistill.models.build import auto_class, skeleton, text_alone
from dsdistill.models.capture import layer_list
from dsdistill.models.settings import per_layer, setting, text_config

VOCABULARY = 128
WINDOW = 8  # window of sliding layers; trial texts are longer
LARGEST = 2**28  # largest number of values of a copy
DEEPEST = 32  # largest number of layers of a copy
_HEADS = 4
_EXPERTS = 4

_INNER = re.compile(r"(intermediate_size(_mlp)?|hidden_dim|n_inner|ffn_dim|ffn_hidden_size|inner_dim|d_ff)$")
_WINDOWS = re.compile(r"(sliding_window|chunk_size|local_attention|window_size)$")
_EXPERT_COUNTS = re.compile(r"(^|_)(num|n|local|routed)_?(local_|routed_)?experts?$")
_EXPERTS_CHOSEN = re.compile(r"experts_per_tok(en)?$|^moe_(top_?)?k$|^top_k_experts$|^num_experts_per_group$")
_STATE_HEADS = re.compile(r"(mamba_(n|num)|n_mamba)_heads$")
_SAME_WIDTH = re.compile(r"(size|dim|embd|width|model)$")
_INDEX = re.compile(r"(^|_)(idx|index|id|number)$")


def layer_kinds(config: PretrainedConfig, task: str, place: str) -> list[int]:
    """Return for each layer the index, from 0, of the first layer that is built like it.

    Layers are built alike if their modules have the same classes, shapes and settings; the names in a config do not
    matter. A model without a list of layers (ALBERT) has one kind.
    """
    tried = copy.deepcopy(config)
    text_config(tried).pad_token_id = 0  # within a small vocabulary; the tokenizer has its own
    layers = layer_list(skeleton(tried, task, place))
    if layers is None:
        return [0] * text_config(config).num_hidden_layers
    signatures = [signature(layer) for layer in layers]
    return [signatures.index(signature) for signature in signatures]


def signature(layer: nn.Module) -> tuple:
    """Return classes, shapes and settings of a layer's modules, which are equal for layers that are built alike."""
    modules = [
        (name, type(module).__name__, tuple(module_settings(module).items()))
        for name, module in layer.named_modules()
    ]
    return (*modules, *((name, tuple(value.shape)) for name, value in layer.named_parameters()))


def module_settings(module: nn.Module, *, fractions: bool = False) -> dict[str, object]:
    """Return the plain settings of a module, without the numbers that only count layers.

    fractions: include settings of type float, which some families compute from a layer's depth.
    """
    kinds = (bool, int, str, type(None)) + (float,) * fractions
    return {
        key: value
        for key, value in sorted(vars(module).items())
        if isinstance(value, kinds)
        and not key.startswith("_")
        and key != "training"
        and not _INDEX.search(key)
    }


def copied_layers(kinds: list[int]) -> int:
    """Return how many first layers contain one of each kind; at least two, if the model has two.

    With only one layer, a model that shares one layer could not be distinguished from others.
    """
    deep = len(kinds) > DEEPEST // 4
    counted = set(
        kinds[:-1] if deep else kinds
    )  # if only the last layer is of its kind, the copy's last layer is, too
    return min(len(kinds), max([2, *(kind + 1 for kind in counted if kind < DEEPEST)]))


def small_copies(
    config: PretrainedConfig, layers: int, window: int | None = WINDOW
) -> Iterator[PretrainedConfig]:
    """Yield copies of an architecture with `layers` layers, the smallest first.

    The first copy has few heads (their ratio stays), experts and features. Some families tie these numbers to other
    settings and refuse this, so later copies keep more of them. window: the window of sliding layers; None keeps the
    architecture's.
    """
    for shrinks in ((_narrow, _thin, _few_experts), (_thin, _few_experts), (_narrow, _thin), (_thin,), ()):
        small = copy.deepcopy(config)
        text = text_config(small)
        _shorten(text, layers)
        _plain(text, window)
        for part in _others(small, text):
            _shorten(part, 1)
        for shrink in shrinks:
            shrink(text)
        yield small


def _others(config: PretrainedConfig, text: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Yield the configs of a composite's other parts, such as a vision tower."""
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig) and part is not text:
            yield part


def _shorten(config: PretrainedConfig, layers: int) -> None:
    depth = getattr(config, "num_hidden_layers", None)
    if not isinstance(depth, int):
        return
    for key in per_layer(vars(config), depth):
        setattr(config, key, getattr(config, key)[:layers])
    config.num_hidden_layers = layers


def _plain(config: PretrainedConfig, window: int | None) -> None:
    """Remove the settings that depend on a vocabulary, on chance or on a long text."""
    for key, value in list(vars(config).items()):
        if "vocab_size" in key and isinstance(value, int) and value > 0:
            setattr(config, key, VOCABULARY)
        elif key in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id") and value is not None:
            setattr(config, key, 1)
        elif "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
        elif window is not None and _WINDOWS.search(key) and isinstance(value, int) and value > window:
            setattr(config, key, window)
    config.pad_token_id = 0
    config.use_cache = False


def _thin(config: PretrainedConfig) -> None:
    """Keep only a few features between the two maps of a feed-forward network."""
    for key, value in list(vars(config).items()):
        if not _INNER.search(key):
            continue
        if isinstance(value, list):  # one entry for each layer
            setattr(config, key, [min(size, 64) for size in value])
        elif isinstance(value, int):
            setattr(config, key, min(value, 64))


def _few_experts(config: PretrainedConfig) -> None:
    for key, value in list(vars(config).items()):
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if _EXPERT_COUNTS.search(key):
            setattr(config, key, min(value, _EXPERTS))
        elif _EXPERTS_CHOSEN.search(key):
            setattr(config, key, min(value, 2))
        elif key in ("n_group", "topk_group", "num_expert_group"):
            setattr(config, key, min(value, 1))


def _narrow(config: PretrainedConfig) -> None:
    """Keep only a few heads of the same width, and as many features as these have together."""
    heads, width = config.num_attention_heads, config.hidden_size
    groups = setting(config, "num_key_value_heads") or heads
    ratio = min(heads // groups, _HEADS)
    fewer_groups = max(1, min(groups, _HEADS // ratio))
    head_width = setting(config, "head_dim") or width // heads
    narrow = min(width, ratio * fewer_groups * head_width)
    for key, value in list(vars(config).items()):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            continue
        if value % width == 0 and _SAME_WIDTH.search(key):
            setattr(config, key, value // width * narrow)
        elif _STATE_HEADS.search(key):
            setattr(config, key, max(1, value * narrow // width))
    config.hidden_size, config.num_attention_heads = narrow, ratio * fewer_groups
    if setting(config, "num_key_value_heads"):
        config.num_key_value_heads = fewer_groups


def make_small(
    config: PretrainedConfig, task: str, place: str, implementation: str | None
) -> PreTrainedModel:
    """Return the model of a small copy in float32, in evaluation mode; raise UserError if it is too large."""
    size = sum(parameter.numel() for parameter in skeleton(config, task, place).parameters())
    if size > LARGEST:
        layers = text_config(config).num_hidden_layers
        raise UserError(place, f"a model of {size:,} values in {layers} layers", f"at most {LARGEST:,}")
    own = copy.deepcopy(
        text_alone(config, task)
    )  # a model asks its config, at each call, which attention to use
    model = auto_class(task).from_config(
        own, attn_implementation=implementation, dtype=torch.float32, trust_remote_code=False
    )
    return model.float().eval()


def sharpen(model: PreTrainedModel) -> None:
    """Make attention peaked. At initialisation it is nearly uniform, and parameters of 0 have no visible effect."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.mul_(4.0)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
