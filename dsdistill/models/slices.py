"""Cut a student's first weights out of its teacher's files, without building either model.

Names in files are not always those of the model: checkpoints of a base model lack its prefix, composites had other
names before transformers 5, and experts may be stored one by one. The written files keep the teacher's names and change
only the layer numbers, so that the library reads them as it would read the teacher.
"""

import itertools
import json
import os
import re
from collections.abc import Collection

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from dsdistill.models.build import skeleton, text_alone
from dsdistill.models.capture import layer_list
from dsdistill.models.weights import INDEX, SINGLE, headers, in_text_part, stored_dtype, ties

_NUMBERED = re.compile(r"(.+?)\.(\d+)\.")


def cut_files(
    folder: str,
    target: str,
    student: PretrainedConfig,
    teacher: PretrainedConfig,
    layers: tuple[int, ...],
    task: str,
    added: dict[str, Tensor],
) -> bool:
    """Write a student that is `layers` (counted from 1) of the teacher in `folder` into `target`: weights and config.

    Values are not changed. Each file of the teacher gives one file of the student; its tensors are only mapped into
    memory. added: weights, by the model's names, that replace those in the files or are added to them.

    Returns False and writes nothing if the names in the files do not show which layer a weight belongs to.
    """
    made, whole = skeleton(student, task, "student"), skeleton(teacher, task, "teacher")
    files = headers(folder, folder, "teacher")
    names = {name: name for file in files.values() for name in file}
    if text_alone(teacher, task) is not teacher:
        names = {name: own for name in names if (own := in_text_part(name)) is not None}
    names = {name: own for name, own in names.items() if own not in added}
    prefix = None
    if layer_list(whole) is not None and (prefix := _layers_prefix(names.values(), whole)) is None:
        return False
    renamed = {name: _moved(own, prefix, layers) for name, own in names.items()}
    for name, apart in _untied(names, made, whole).items():
        renamed[name] = [*renamed[name], *apart]
    parts = [
        (file, pairs)
        for file, held in files.items()
        if (pairs := [(name, new) for name in held for new in renamed.get(name, [])])
    ]
    os.makedirs(target, exist_ok=True)
    weight_map: dict[str, str] = {}
    copies = {name: value.detach().clone() for name, value in added.items()}  # files take no shared memory
    count, size = len(parts) + bool(copies), 0
    for number in range(1, count + 1):
        own = SINGLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
        given = _read(folder, *parts[number - 1]) if number <= len(parts) else copies
        save_file(given, os.path.join(target, own), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(given, own)
        size += sum(value.nbytes for value in given.values())
    if count > 1:
        with open(os.path.join(target, INDEX), "w", encoding="utf-8") as index:
            json.dump({"metadata": {"total_size": size}, "weight_map": weight_map}, index, indent=2)
    config = made.config
    config.architectures = [type(made).__name__]
    config.dtype = stored_dtype(folder, "teacher") or torch.float32
    config.save_pretrained(target)
    return True


def _read(folder: str, file: str, pairs: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Return tensors of a file by new names. A layer taken twice is copied: tensors in files must not share memory."""
    given: dict[str, Tensor] = {}
    seen: set[str] = set()
    with safe_open(os.path.join(folder, file), framework="pt") as source:
        for name, new in pairs:
            value = source.get_tensor(name)
            given[new] = value.clone() if name in seen else value
            seen.add(name)
    return given


def _layers_prefix(names: Collection[str], model: PreTrainedModel) -> str | None:
    """Return the prefix before a layer's number in the names of files, such as `model.layers`; None if none fits.

    If several lists have that length (a vision tower has layers, too), the one whose layers share the most names with
    the model's is taken; among equals, the one whose name ends like the model's.
    """
    layers = layer_list(model)
    assert layers is not None
    own = next(name for name, module in model.named_modules() if module is layers).split(".")
    inside = [set(layer.state_dict()) for layer in layers]
    found: dict[str, dict[int, set[str]]] = {}
    for name in names:
        if (match := _NUMBERED.match(name)) is not None:
            found.setdefault(match[1], {}).setdefault(int(match[2]), set()).add(name[match.end() :])

    def fit(prefix: str) -> tuple[int, int]:
        alike = sum(len(names & found[prefix][index]) for index, names in enumerate(inside))
        ends = zip(reversed(own), reversed(prefix.split(".")), strict=False)
        return alike, len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], ends)))

    lists = [prefix for prefix, by_index in found.items() if set(range(len(layers))) <= by_index.keys()]
    lists = sorted((prefix for prefix in lists if min(fit(prefix)) > 0), key=fit)
    if not lists or (len(lists) > 1 and fit(lists[-1]) == fit(lists[-2])):
        return None
    return lists[-1]


def _untied(
    names: dict[str, str], student: PreTrainedModel, teacher: PreTrainedModel
) -> dict[str, list[str]]:
    """Return, by name in files, the other names of each weight that the teacher ties and the student does not.

    Files hold only one of several tied weights.
    """
    held, found = {own: name for name, own in names.items()}, {}
    wanted = student.state_dict().keys() - {name for group in ties(student) for name in group}
    for group in ties(teacher):
        source = next((held[name] for name in group if name in held), None)
        source = source or next(
            (held[cut] for name in group if (cut := name.partition(".")[2]) in held), None
        )
        if source is not None:
            found[source] = [name for name in group if name not in held and name in wanted]
    return found


def _moved(name: str, prefix: str | None, layers: tuple[int, ...]) -> list[str]:
    """Return the names of a teacher weight in the student; none if its layer is left out."""
    match = _NUMBERED.match(name)
    if prefix is None or match is None or match[1] != prefix:
        return [name]
    rest = name[match.end() :]
    return [f"{prefix}.{place}.{rest}" for place, layer in enumerate(layers) if layer == int(match[2]) + 1]
