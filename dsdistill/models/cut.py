"""Cut a student from its teacher: make its architecture, check that the layers fit there, and copy the weights."""

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dsdistill.config import UserError
from dsdistill.models.build import configured, may_be_new, override, skeleton
from dsdistill.models.capture import layer_list
from dsdistill.models.settings import check_settings, per_layer, text_config
from dsdistill.models.small_copy import module_settings

# Settings that list some layers by their index from 0.
_INDICES = re.compile(r"layer_(indices|ids|idxs)$")


def cut_architecture(
    teacher: PretrainedConfig, layers: tuple[int, ...], overrides: dict[str, Any] | None, place: str
) -> PretrainedConfig:
    """Return the teacher's architecture with only `layers` (counted from 1) of its layers.

    A composite (images and text) stays a composite, and its text part is cut.
    """
    text = text_config(teacher)
    for layer in layers:
        if layer > text.num_hidden_layers:
            expected = f"layers 1 to {text.num_hidden_layers} of the teacher"
            raise UserError(f"{place}.from_teacher", f"layer {layer}", expected)
    check_settings({"num_hidden_layers": len(layers)}, f"{place}.from_teacher")
    settings = teacher.to_dict()
    inner = next((name for name in teacher.sub_configs if getattr(teacher, name, None) is text), None)
    _cut(settings if inner is None else settings[inner], text, layers)
    kind = settings.pop("model_type")
    return override(configured(kind, settings, place), overrides or {}, place)


def _cut(settings: dict[str, Any], text: PretrainedConfig, layers: tuple[int, ...]) -> None:
    depth = text.num_hidden_layers
    for key in per_layer(settings, depth):  # such as layer_types, which have an entry for each layer
        settings[key] = [settings[key][layer - 1] for layer in layers]
    for key, value in settings.items():
        if _INDICES.search(key) and isinstance(value, list):
            settings[key] = [place for place, layer in enumerate(layers) if layer - 1 in value]
    own = settings.get("per_layer_config")
    if isinstance(own, dict):  # settings of single layers, by index from 0 (Gemma 4)
        by_index = {int(index): changes for index, changes in own.items()}
        chosen = {place: by_index.get(layer - 1) for place, layer in enumerate(layers)}
        settings["per_layer_config"] = {place: changes for place, changes in chosen.items() if changes}
    if (
        "attention_types" in settings and "attention_layers" in settings
    ):  # GPT-Neo makes the latter of the former
        settings["attention_types"] = [[[kind], 1] for kind in settings["attention_layers"]]
    settings["num_hidden_layers"] = len(layers)
    # If the family uses another name for the depth (n_layer, n_layers), both would be given, so only one is kept.
    if alias := text.attribute_map.get("num_hidden_layers"):
        settings[alias] = settings.pop("num_hidden_layers")


def check_cut(
    student: PretrainedConfig,
    teacher: PretrainedConfig,
    layers: tuple[int, ...],
    task: str,
    place: str,
    missing: Collection[str] = (),
) -> list[list[str]]:
    """Raise UserError if the student cannot be made of the teacher and its chosen layers; no weights are needed.

    Some families build some layers differently: ModernBERT's first layer has no norm before its attention. In other
    families a layer computes with a number that depends on its place or on the model's depth: MiniCPM3 scales what a
    layer adds, DiffLlama scales what it subtracts.

    missing: weights that the teacher's files lack. Returns the names of weights that the student ties: these must be
    equal in the teacher.
    """
    made, whole = (skeleton(model, task, place) for model in (student, teacher))
    into, source = layer_list(made), layer_list(whole)
    if into is not None and source is not None:
        # A difference that `config:` makes is intended. A difference that follows from the layer's place alone is not.
        plain = _plain_layers(teacher, layers, task, place)
        for position, (target, layer) in enumerate(zip(into, layers, strict=True), start=1):
            moved = source[layer - 1]
            name = _difference(_shapes(target), _shapes(moved)) or _difference(
                _numbers(target),
                _numbers(moved),
                _numbers(plain[position - 1]) if plain is not None else None,
            )
            if name is not None:
                raise UserError(
                    f"{place}.from_teacher",
                    f"teacher layer {layer} as student layer {position}, but the two differ in {name}",
                    f"{teacher.model_type} layers of the same structure, or a student.config that makes them equal",
                )
    elif not _shares_its_layer(made, whole):
        raise UserError(
            f"{place}.from_teacher", f"model type {teacher.model_type}", "a model with a list of its layers"
        )
    check_rest(made, whole, task, place, missing)
    return [names for _, names in outside(made, whole, missing) if len(names) > 1]


def _shares_its_layer(student: PreTrainedModel, teacher: PreTrainedModel) -> bool:
    """Return whether both models run one layer's weights repeatedly, as ALBERT does. Then only their depth differs."""
    mine, other = (
        {name: value.shape for name, value in model.state_dict().items()} for model in (student, teacher)
    )
    return layer_list(student) is None and layer_list(teacher) is None and mine == other


def _plain_layers(
    teacher: PretrainedConfig, layers: tuple[int, ...], task: str, place: str
) -> nn.ModuleList | None:
    """Return the student's layers as they are without a `config:`; None if such a student cannot be made."""
    try:
        return layer_list(skeleton(cut_architecture(teacher, layers, None, place), task, place))
    except UserError:
        return None


def _shapes(layer: nn.Module) -> dict[str, Any]:
    return {name: list(value.shape) for name, value in layer.state_dict().items()}


def _numbers(layer: nn.Module) -> dict[str, Any]:
    """Return the settings of a layer's modules by name."""
    return {
        f"{name}.{key}".lstrip("."): value
        for name, module in layer.named_modules()
        for key, value in module_settings(module, fractions=True).items()
    }


def _difference(
    mine: dict[str, Any], other: dict[str, Any], plain: dict[str, Any] | None = None
) -> str | None:
    """Return the name of an entry that differs, with both values; None if none differs.

    plain: `mine` without the changes of a `config:`; if it agrees with `other`, the difference is intended.
    """
    for name in sorted(mine.keys() | other.keys()):
        if any(_same(found.get(name), other.get(name)) for found in (mine, plain) if found is not None):
            continue
        both = name in mine and name in other
        return f"{name} ({_short(other[name])} and {_short(mine[name])})" if both else name
    return None


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _same(mine: Any, other: Any) -> bool:
    if isinstance(mine, float) and isinstance(other, float):
        return abs(mine - other) <= 1e-9 * max(abs(mine), abs(other))
    return mine == other


def copy_layers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    layers: tuple[int, ...],
    missing: Collection[str] = (),
) -> None:
    """Copy the chosen teacher layers (counted from 1), and all other weights of equal name and shape, to the student.

    missing: weights that are random in the teacher. Raises UserError if the student ties weights that differ in the
    teacher: only one of them could be copied.
    """
    into, source = layer_list(student), layer_list(teacher)
    if into is not None and source is not None:  # otherwise one layer is shared, outside any list
        for target, layer in zip(into, layers, strict=True):
            target.load_state_dict(source[layer - 1].state_dict())
    given, own = teacher.state_dict(), student.state_dict()
    for names, sources in outside(student, teacher, missing):
        for other in sources[1:]:
            if not torch.equal(given[sources[0]], given[other]):
                raise untied(sources[0], other, "teacher")
        if sources:
            own[names[0]].copy_(given[sources[0]])


def check_rest(
    student: PreTrainedModel, teacher: PreTrainedModel, task: str, place: str, missing: Collection[str] = ()
) -> None:
    """Raise UserError if a weight of the student outside its layers cannot be copied from the teacher.

    Only a classification head may be new. missing: weights that are random in the teacher because its files lack them.
    """
    given = teacher.state_dict()
    for own, names in outside(student, teacher, missing):
        if names or may_be_new(own[0], student, task):
            continue
        shape = list(student.state_dict()[own[0]].shape)
        there = (
            f"teacher weights without {own[0]}"
            if own[0] in missing
            else f"{own[0]} of shape {shape}, where the teacher has {list(given[own[0]].shape)}"
            if own[0] in given
            else f"{own[0]}, which the teacher does not have"
        )
        raise UserError(
            f"{place}.from_teacher", there, "a student that equals the teacher outside the layers"
        )


def outside(
    student: PreTrainedModel, teacher: PreTrainedModel, missing: Collection[str]
) -> list[tuple[list[str], list[str]]]:
    """Return each weight and buffer of the student outside its layers as two lists of names.

    The first list holds the student's names of the weight, several if it is tied. The second list holds those of these
    names under which the teacher has a tensor that can be copied.
    """
    layers = layer_list(student)
    inside = set() if layers is None else {id(value) for value in _tensors(layers).values()}
    saved, given = student.state_dict(), _tensors(teacher)
    tied: dict[int, list[str]] = {}
    for name, value in _tensors(student).items():
        if name in saved and id(value) not in inside:
            tied.setdefault(id(value), []).append(name)
    return [
        (
            own,
            [
                name
                for name in own
                if name in given and name not in missing and given[name].shape == saved[own[0]].shape
            ],
        )
        for own in tied.values()
    ]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name. A tied one appears under each of its names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def untied(first: str, second: str, model: str) -> UserError:
    """Return the error for a student that ties two weights that differ in the model from which it is made."""
    got = f"tied weights, but {first} and {second} of the {model} differ"
    return UserError("student.config.tie_word_embeddings", got, "false")
