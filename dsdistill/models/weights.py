"""Check weight files before anything is loaded from them."""

import contextlib
import copy
import hashlib
import os
import re
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from dsdistill.config import UserError
from dsdistill.config.bounded import MIB, read_json
from dsdistill.models.build import TEXT_PART, locate, may_be_new, skeleton, text_alone
from dsdistill.models.cut import untied
from dsdistill.models.settings import CONFIG, CONFIG_BYTES, find

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
INDEX_BYTES = 256 * MIB
SAMPLES, BLOCK = 64, 2**16  # blocks of a weight file in its fingerprint, and bytes of each
# Types that a model may have, as files name them.
_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_COMMIT = re.compile(r"snapshots[/\\]([0-9a-f]{40})[/\\]")
# Files of which each rank has saved one part; the library prefers them to all others.
_SHARD = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors$")


def check_weights(path: str, model: PretrainedConfig, task: str, place: str) -> set[str]:
    """Raise UserError if a local folder's weights are missing, pickled, damaged or of other shapes than its config's.

    Only headers are read. A hub id is not checked here; its download also accepts only safetensors.

    Returns the names of weights that would be random: those that the folder lacks, and those of a head for other
    classes. For a hub id it returns none.
    """
    folder = locate(path, f"{place}.path")
    if not os.path.isdir(folder):
        return set()
    theirs: dict[str, list[int]] = {}
    for held in headers(folder, path, place).values():
        theirs |= {name: shape for name, (shape, _) in held.items()}
    ours = skeleton(model, task, place)
    prefix = f"{ours.base_model_prefix}."
    for name, value in ours.state_dict().items():
        if may_be_new(name, ours, task):
            continue  # a classification head may differ: build_model() makes a new one
        shape = theirs.get(name) or theirs.get(name.removeprefix(prefix)) or theirs.get(f"{prefix}{name}")
        if shape is not None and shape != list(value.shape):
            raise UserError(
                f"{place}.path",
                f"{path} with {name} of shape {shape}",
                f"{list(value.shape)}, as in its config.json",
            )
    if task == "regression":
        model = copy.deepcopy(model)
        model.num_labels = 1
    whole = text_alone(model, task) is model
    return _missing(skeleton(model, task, place), theirs, None if whole else TEXT_PART)


def headers(folder: str, path: str, place: str) -> dict[str, dict[str, tuple[list[int], str]]]:
    """Return the shape and type (such as BF16) of each weight in a folder, by file and name.

    path: the folder's name in the config. Raises UserError for a damaged file.
    """
    found = {}
    for name in weight_files(folder, f"{place}.path"):
        try:
            with safe_open(os.path.join(folder, name), framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                found[name] = {
                    key: (list(part.get_shape()), part.get_dtype()) for key, part in slices.items()
                }
        except (OSError, SafetensorError) as error:
            raise UserError(f"{place}.path", f"{path} with {name} ({error})", "undamaged weights") from None
    return found


def at_hand(path: str, place: str) -> str | None:
    """Return the folder with a model's weight files, fetching them from the hub if needed; None if it has none."""
    source = locate(path, f"{place}.path")
    if os.path.isdir(source):
        return source
    if (index := find(source, INDEX)) is None:
        single = find(source, SINGLE)
        return None if single is None else os.path.dirname(single)
    folder = os.path.dirname(index)
    fetched = [find(source, name) for name in weight_files(folder, f"{place}.path")]
    return None if None in fetched else folder


def in_text_part(name: str) -> str | None:
    """Return the name that a weight of a composite has in its text part; None for a weight of another part."""
    if name.startswith("lm_head."):  # it has this name there, too
        return name
    for pattern, own in TEXT_PART.items():
        if re.match(pattern, name):
            return re.sub(pattern, own, name)
    return None


def stored_dtype(path: str, place: str) -> torch.dtype | None:
    """Return the type of all weights in a model's files; None if there are several types or no files."""
    folder = at_hand(path, place)
    held = headers(folder, path, place).values() if folder is not None else ()
    kinds = {kind for file in held for _, kind in file.values()}
    return _TYPES.get(kinds.pop()) if len(kinds) == 1 else None


def mapped_dtype(path: str | None, model: PretrainedConfig, task: str, place: str) -> torch.dtype | None:
    """Return the type in which the library maps a model's files into memory without a copy; None if it must copy.

    It copies if weights have several types, or if it merges weights: files of some models hold experts one by one, so
    that their names differ from the model's.
    """
    if path is None or (dtype := stored_dtype(path, place)) is None:
        return None
    made = skeleton(model, task, place)
    names = {name for file in headers(at_hand(path, place) or path, path, place).values() for name in file}
    names |= {own for name in names if (own := in_text_part(name)) is not None}
    names |= {f"{made.base_model_prefix}.{name}" for name in names}
    names |= {name for group in ties(made) if names.intersection(group) for name in group}
    return dtype if made.state_dict().keys() <= names else None


def _missing(
    model: PreTrainedModel, theirs: dict[str, list[int]], key_mapping: dict[str, str] | None
) -> set[str]:
    """Return the names of weights that the library would leave random, given those in files by name and shape.

    The library itself decides this, on tensors without contents: it ties weights, and it knows other prefixes and
    older names.
    """
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    if all(theirs.get(name) == shape for name, shape in shapes.items()):
        return set()
    weights = {name: torch.empty(shape, device="meta") for name, shape in theirs.items()}
    with _silent():
        # The library's annotation is one model, but with output_loading_info it returns a pair.
        loaded: Any = type(model).from_pretrained(
            None,
            config=copy.deepcopy(model.config),  # the library writes into it
            state_dict=weights,
            key_mapping=key_mapping,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,
        )
    info = loaded[1]
    return {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep the library from printing what is missing, and from drawing a progress bar."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def check_ties(path: str, ties: list[list[str]], place: str) -> None:
    """Raise UserError if weights that the student ties differ in a local folder: only one of them could be used.

    ties: for each tied weight the list of its names; files may hold the names without their prefix, or with that of a
    composite. place: the model in the folder. A hub id is checked after its files have been fetched.
    """
    if not os.path.isdir(folder := locate(path, f"{place}.path")):
        return
    found: dict[str, torch.Tensor] = {}
    names = {name for group in ties for name in group}
    wanted = {name.partition(".")[2]: name for name in names} | {name: name for name in names}
    for name in weight_files(folder, f"{place}.path"):
        with safe_open(os.path.join(folder, name), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                if (own := wanted.get(key) or wanted.get(in_text_part(key) or "")) is not None:
                    found[own] = file.get_tensor(key)
    for first, *others in ([name for name in names if name in found] or [""] for names in ties):
        for other in others:
            if not torch.equal(found[first], found[other]):
                raise untied(first, other, place)


def own_ties(model: PretrainedConfig, task: str, place: str) -> list[list[str]]:
    """Return the names of each tied weight of an architecture."""
    return ties(skeleton(model, task, place))


def ties(model: PreTrainedModel) -> list[list[str]]:
    """Return the names of each tied weight of a model."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tied for tied in names.values() if len(tied) > 1]


def fingerprint(path: str, place: str) -> str | None:
    """Return a digest of a model's weights and config.json; for a hub id its commit, or None if that is not known.

    It covers each weight file's name, size, header and SAMPLES blocks of BLOCK bytes, evenly spaced. That is all of a
    small file, and enough of a large one to notice other weights without reading gigabytes at every start.
    """
    folder = locate(path, place)
    if not os.path.isdir(folder):
        found = _COMMIT.search(find(folder, CONFIG) or "")
        return found[1] if found is not None else None
    digest = hashlib.sha256()
    with open(os.path.join(folder, CONFIG), "rb") as file:
        digest.update(file.read(CONFIG_BYTES))
    for name in weight_files(folder, place):
        with open(os.path.join(folder, name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{name} {size} ".encode())
            header = 8 + int.from_bytes(file.read(8), "little")  # as the format defines it
            file.seek(0)
            digest.update(file.read(min(size, header)))
            for index in range(SAMPLES):
                file.seek(max(0, size - BLOCK) * index // (SAMPLES - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def holds_weights(folder: str) -> bool:
    """Return whether a folder has weight files."""
    return any(os.path.lexists(os.path.join(folder, name)) for name in (SINGLE, INDEX))


def weight_files(folder: str, place: str) -> list[str]:
    """Return the names of the safetensors files that hold a folder's weights."""
    if shards := [name for name in os.listdir(folder) if _SHARD.match(name)]:
        raise UserError(place, f"{folder} with {min(shards)}, a shard of a checkpoint", SINGLE)
    if os.path.isfile(os.path.join(folder, SINGLE)):
        return [SINGLE]
    if not os.path.lexists(path := os.path.join(folder, INDEX)):
        there = sorted(name for name in os.listdir(folder) if name.endswith((".bin", ".pt", ".pth", ".h5")))
        kept = f"{folder} with only {', '.join(there)}" if there else f"{folder} without weights"
        raise UserError(place, kept, f"{SINGLE}: files that may hold code are not opened")
    try:
        names = read_json(path, INDEX_BYTES).get("weight_map")
    except UserError as error:
        raise UserError(place, f"{folder} ({error})", "a list of weight files") from None
    if not isinstance(names, dict) or not names:
        raise UserError(place, f"{INDEX} without a weight_map", "a list of weight files")
    for name in names.values():
        plain = isinstance(name, str) and name == os.path.basename(name) and "\0" not in name
        if not plain or not name.endswith(".safetensors"):
            raise UserError(place, f"{INDEX}, which names {name!r}", "safetensors files in the same folder")
    return sorted(set(names.values()))
