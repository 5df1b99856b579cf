"""Check the settings of a config.json or a `config:` before the library builds anything from it.

A config.json comes with another person's model. It could make the library fetch and run code, read other files, or use
sizes without bound.
"""

import inspect
import json
import logging
import os
import re
from typing import Any

import torch
from transformers import CONFIG_MAPPING, GenerationConfig, PretrainedConfig
from transformers.utils import cached_file

from dsdistill.config import UserError
from dsdistill.config.bounded import MIB, read_json

log = logging.getLogger("dsdistill")

CONFIG, ADAPTER, GENERATION = "config.json", "adapter_config.json", "generation_config.json"
CONFIG_BYTES = 16 * MIB
DEPTH = 16  # largest number of levels of a config.json

# Settings that are refused, and what is expected instead.
_REFUSED = {
    "quantization_config": "weights in full precision",
    "compression_config": "weights in full precision",
    "transformers_weights": "weights in model.safetensors",
    "configuration_files": "one config.json",
    "fusion_config": "a model without fused modules",
    "distributed_config": "no settings of devices",
    "kernel_config": "no kernels from elsewhere",
    "use_kernels": "no kernels from elsewhere",
    "attribute_map": "the library's own names",
    "sub_configs": "the library's own parts",
    "sub_configs_defaults": "the library's own parts",
}
# Settings of how the library computes, which dsdistill chooses; in a config.json they have no effect.
_OURS = ("attn_implementation", "experts_implementation", "_attn_implementation", "_experts_implementation")
# The library reads these from a config object's own attributes, but only those of its class may be used.
_OF_THE_CLASS = (
    "auto_map",
    "base_model_tp_plan",
    "base_model_pp_plan",
    "base_model_ep_plan",
    "base_model_fsdp_plan",
)

# Every family has these names, or maps them by its attribute_map. Their values are 1 or more.
SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
_BY_LAYER = re.compile(r"layer|block|attention|window|pattern|types|_size$")
# By parts of a setting's name: its smallest and largest allowed value, and what it counts.
_LIMITS = (
    (re.compile(r"vocab_size$|vocab_size_|vocabulary"), 0, 2**26, "entries"),
    (
        re.compile(r"window|chunk|positions?$|position_embeddings$|n_ctx$|seq_len|_length$"),
        -1,
        2**24,
        "tokens",
    ),
    (re.compile(r"num_labels$"), 0, 2**20, "classes"),
    (re.compile(r"experts?($|_)"), 0, 2**16, "experts"),
    # A number below 0 counts from the end, as in vision_feature_layer.
    (re.compile(r"(layers?|blocks|groups?|group_num|stages|depth)$"), -1024, 1024, "layers"),
    (
        re.compile(r"(size|dims?|rank|width|inner|embd|model|_ff|_kv|units|channels|state|kernel)$"),
        -1,
        2**20,
        "features",
    ),
    (re.compile(r"heads?($|_)"), -1, 4096, "heads"),
)


def read_settings(folder: str) -> dict[str, Any]:
    """Return the settings in a model folder's config.json.

    Raises UserError if it cannot be read, if the folder holds an adapter instead of a model, or if another file that
    the library reads cannot be read.
    """
    if os.path.lexists(os.path.join(folder, ADAPTER)):
        raise UserError(ADAPTER, "an adapter", "a whole model: merge the adapter into its model first")
    if os.path.lexists(path := os.path.join(folder, GENERATION)):
        read_json(path, CONFIG_BYTES)
    return read_json(os.path.join(folder, CONFIG), CONFIG_BYTES)


def find(source: str, name: str) -> str | None:
    """Return the path of a file of a folder or hub id, or None if there is none."""
    if os.path.isdir(source):
        path = os.path.join(source, name)
        return path if os.path.exists(path) else None
    return cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


# Generation settings whose numbers are ids of the vocabulary.
_IDS = re.compile(
    r"(_token_id|_tokens_ids?|_token_ids|_words_ids|decoder_ids|suppress_tokens|sequence_bias)$"
)


def carry_generation(source: str, folder: str, entries: int) -> None:
    """Copy the generation settings of the model in `source` into a model's folder, if there are any.

    The library reads and writes the settings. Settings with ids beyond the vocabulary, and settings with names of the
    library's own code, are left out.

    source: a folder or hub id. entries: size of the vocabulary.
    """
    if (path := find(source, GENERATION)) is None:
        return
    try:
        settings = {
            key: value
            for key, value in read_json(path, CONFIG_BYTES).items()
            if not (_IDS.search(key) and not _inside(value, entries)) and not _is_code(GenerationConfig, key)
        }
        text = GenerationConfig.from_dict(settings).to_json_string(keys_to_pop=["compile_config"])
    except Exception as error:  # the library may raise anything
        log.warning(
            "%s cannot be read and is left out: %s",
            path,
            next(iter(str(error).splitlines()), type(error).__name__),
        )
        return
    with open(os.path.join(folder, GENERATION), "w", encoding="utf-8") as file:
        file.write(text)


def stop_generation(folder: str, ends: list[int]) -> None:
    """Add stop tokens to those in the generation settings of a model's folder."""
    path = os.path.join(folder, GENERATION)
    settings = read_json(path, CONFIG_BYTES) if os.path.exists(path) else {}
    named = settings.get("eos_token_id")
    known = named if isinstance(named, list) else [] if named is None else [named]
    if not set(ends) - set(known):
        return
    both = list(dict.fromkeys([*known, *ends]))
    settings["eos_token_id"] = both if len(both) > 1 else both[0]
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _inside(value: Any, entries: int) -> bool:
    """Return whether all ids of a setting, which may be nested lists, are inside the vocabulary."""
    if isinstance(value, list):
        return all(_inside(part, entries) for part in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return 0 <= value < entries
    return value is None or isinstance(value, float)  # a float is a bias beside its ids


def _is_code(kind: type, key: str) -> bool:
    """Return whether a setting has the name of a method or of another part of a class's code."""
    made = inspect.getattr_static(kind, key, None)
    return key.startswith("__") or inspect.isroutine(made) or isinstance(made, classmethod | staticmethod)


def check_settings(settings: dict[str, Any], place: str, *, ours: bool = False) -> None:
    """Raise UserError for a setting that loads files or code, and for sizes beyond those of any model.

    place: where the settings are from, for messages; ours: they are from a `config:`. Settings that dsdistill chooses
    itself are then refused, too.
    """
    kind = settings.get("model_type")
    known = CONFIG_MAPPING[kind] if isinstance(kind, str) and kind in CONFIG_MAPPING else None
    for key in settings:
        if _is_code(known or PretrainedConfig, str(key)):
            raise UserError(f"{place}.{key}", "the name of a part of the library's code", "a setting")
    _check(settings, known.attribute_map if known is not None else {}, place, ours, 0)


def _check(settings: dict[str, Any], usual: dict[str, str], place: str, ours: bool, depth: int) -> None:
    if depth > DEPTH:
        raise UserError(place, f"settings of more than {DEPTH} levels", f"at most {DEPTH}")
    names = {alias: name for name, alias in usual.items()}  # n_layer is num_hidden_layers
    for key, value in settings.items():
        where = f"{place}.{key}"
        if key in _REFUSED and value not in (None, False, {}, []):
            raise UserError(where, repr(value), _REFUSED[key])
        if ours and key in _OURS and value is not None:
            raise UserError(
                where,
                repr(value),
                "no such setting here: attn_implementation is a setting next to path and config",
            )
        if key in ("dtype", "torch_dtype") and not _is_dtype(value):
            raise UserError(where, repr(value), "a floating-point type such as float32")
        _check_size(names.get(key, str(key)), value, where)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                _check(part, {}, where, ours, depth + 1)


def _is_dtype(value: Any) -> bool:
    if value is None or isinstance(value, torch.dtype):
        return True
    dtype = getattr(torch, value, None) if isinstance(value, str) else None
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _check_size(name: str, value: Any, where: str) -> None:
    positive = name in SIZES
    whole = isinstance(value, int) and not isinstance(value, bool)
    if positive and isinstance(value, bool | float):
        raise UserError(where, repr(value), "a whole number")
    limits = next((limits for limits in _LIMITS if limits[0].search(name)), None)
    if limits is None:
        if whole and abs(value) >= 2**63:
            raise UserError(where, repr(value), "a number that fits in 64 bits")
        return
    _, least, most, what = limits
    for number in value if isinstance(value, list) else [value]:
        if not isinstance(number, int) or isinstance(number, bool):
            continue
        low = (
            0 if name == "head_dim" else 1 if positive else least
        )  # some families write 0 for a size that follows from others
        if not low <= number <= most:
            raise UserError(where, repr(number), f"{low} to {most:,} {what}")


def check_shape(config: PretrainedConfig, needed: tuple[str, ...], place: str) -> None:
    """Raise UserError for an architecture that lacks a size that a run needs, or whose sizes contradict each other."""
    for name in needed:
        value = setting(config, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(place, f"model type {config.model_type}, which has no {name}", "a text model")
        _check_size(name, value, f"{place}.config.{name}")
    heads, groups = config.num_attention_heads, setting(config, "num_key_value_heads")
    if isinstance(groups, int) and (groups < 1 or heads % groups):
        expected = f"a number that divides the {heads} heads"
        raise UserError(f"{place}.config.num_key_value_heads", groups, expected)
    if not (setting(config, "head_dim") or config.hidden_size // heads):
        got = f"{heads} heads for a width of {config.hidden_size}"
        raise UserError(f"{place}.config.num_attention_heads", got, "at least one feature per head")
    padding = getattr(config, "pad_token_id", None)
    if padding is not None and not isinstance(padding, int):
        raise UserError(f"{place}.config.pad_token_id", padding, "the id of one token")


def setting(config: PretrainedConfig, name: str) -> Any:
    """Return a setting of an architecture; None if it is missing or differs from layer to layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # the value differs between layers, so the library gives none (Gemma 4)
        return None


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the text part of a composite's (images and text) config, else the config itself."""
    return config.get_text_config(decoder=True)


def attention_layers(config: PretrainedConfig) -> tuple[int, ...]:
    """Return the layers, counted from 1, whose kind is named as attention; all layers if the config names no kinds.

    Hybrids have other layers, too (linear_attention, mamba, conv, moe). The probe checks that the names are right.
    """
    text = text_config(config)
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if not isinstance(kinds, list | tuple) or len(kinds) != text.num_hidden_layers:
        return tuple(range(1, text.num_hidden_layers + 1))
    return tuple(place for place, kind in enumerate(kinds, start=1) if _has_attention(str(kind)))


def _has_attention(kind: str) -> bool:
    return ("attention" in kind and "linear" not in kind) or "hybrid" in kind


def per_layer(settings: dict[str, Any], depth: int) -> list[str]:
    """Return the settings that have an entry for each of `depth` layers, such as layer_types or attention_window."""
    return [
        key
        for key, value in settings.items()
        if _BY_LAYER.search(key) and isinstance(value, list) and len(value) == depth
    ]


def make_ours(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config without settings that name code to run, such as kernels that the library would fetch."""
    for part in _parts(config):
        part._attn_implementation = part._experts_implementation = None
        for name in _OF_THE_CLASS:
            part.__dict__.pop(name, None)
    return config


def _parts(config: PretrainedConfig) -> list[PretrainedConfig]:
    inner = (getattr(config, name, None) for name in config.sub_configs)
    return [
        config,
        *(
            part
            for inner_config in inner
            if isinstance(inner_config, PretrainedConfig)
            for part in _parts(inner_config)
        ),
    ]
