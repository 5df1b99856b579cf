"""Check weight files before anything is loaded from them."""

import os
import re

from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from dsdistill.config import UserError
from dsdistill.config.bounded import MIB, read_json
from dsdistill.config.schema import LANGUAGE
from dsdistill.models.build import locate, skeleton

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
INDEX_BYTES = 256 * MIB
# What several ranks saved each a part of; the library takes such files before all others.
_SHARD = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors$")


def check_weights(path: str, model: PretrainedConfig, task: str, place: str) -> None:
    """Raise UserError where a local folder's weights are missing, pickled, damaged or of other shapes than its config.

    Reads headers alone. A hub id is left to the download, which takes safetensors alone too.
    """
    folder = locate(path, f"{place}.path")
    if not os.path.isdir(folder):
        return
    theirs: dict[str, list[int]] = {}
    for name in _files(folder, f"{place}.path"):
        try:
            with safe_open(os.path.join(folder, name), framework="pt") as file:
                theirs |= {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{place}.path", f"{path} with {name} ({error})", "weights that are whole"
            ) from None
    ours = skeleton(model, task, place)
    prefix = f"{ours.base_model_prefix}."
    for name, value in ours.state_dict().items():
        if task not in LANGUAGE and not name.startswith(prefix):
            continue  # a head of classes may be another: build_model() makes a new one
        shape = theirs.get(name) or theirs.get(name.removeprefix(prefix))
        if shape is not None and shape != list(value.shape):
            raise UserError(
                f"{place}.path",
                f"{path} with {name} of shape {shape}",
                f"{list(value.shape)}, as its config.json says",
            )


def _files(folder: str, place: str) -> list[str]:
    """Return the names of the safetensors files that hold a folder's weights."""
    if shards := [name for name in os.listdir(folder) if _SHARD.match(name)]:
        raise UserError(place, f"{folder} with {min(shards)}, a checkpoint's shard", SINGLE)
    if os.path.isfile(os.path.join(folder, SINGLE)):
        return [SINGLE]
    if not os.path.lexists(path := os.path.join(folder, INDEX)):
        there = sorted(name for name in os.listdir(folder) if name.endswith((".bin", ".pt", ".pth", ".h5")))
        kept = f"{folder} with {', '.join(there)} alone" if there else f"{folder} without weights"
        raise UserError(place, kept, f"{SINGLE}: files that can hold code are not opened")
    try:
        names = read_json(path, INDEX_BYTES).get("weight_map")
    except UserError as error:
        raise UserError(place, f"{folder} ({error})", "a list of weight files") from None
    if not isinstance(names, dict) or not names:
        raise UserError(place, f"{INDEX} without a weight_map", "a list of weight files")
    for name in names.values():
        plain = isinstance(name, str) and name == os.path.basename(name) and "\0" not in name
        if not plain or not name.endswith(".safetensors"):
            raise UserError(place, f"{INDEX}, which names {name!r}", "safetensors files beside it")
    return sorted(set(names.values()))
