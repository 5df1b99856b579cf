"""Read and write what a sentence-transformers folder holds in addition to its model: pooling and prompts.

Such a folder names its modules in modules.json: the transformer, 1_Pooling, and perhaps one that normalises. Folders
with other modules (dense layers, convolutions over word vectors) are refused, because these are not trained here.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsdistill.config import UserError
from dsdistill.config.bounded import read_bytes, read_json
from dsdistill.models.settings import CONFIG_BYTES, find

MODULES, LENGTH, OPTIONS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
POOLING = "1_Pooling"
# The library's names of pooling modes → ours; before its version 6 each mode had a separate switch.
_WAYS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_SWITCHES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_DOCUMENTS = ("document", "passage", "corpus")  # names that the library looks for, in this order
_FOLDER = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Sentence:
    """Describe how a model turns a text into a vector."""

    pooling: str = "mean"  # mean, cls or last
    prompts: Mapping[str, str] = field(default_factory=dict)  # by name; a prompt is put before a text
    default_prompt: str | None = None  # name of the prompt for texts that are neither query nor document
    lower: bool = False  # the library lower-cases texts before tokenising them

    def prompts_of(self, texts: int) -> tuple[str, ...]:
        """Return the prompt of each of an example's texts; for two texts the prompts of query and document."""
        if texts == 1:
            return (self.prompts.get(self.default_prompt or "", ""),)
        document = next((name for name in _DOCUMENTS if name in self.prompts), "")
        return self.prompts.get("query", ""), self.prompts.get(document, "")


def read_sentence(source: str, place: str) -> Sentence | None:
    """Return the sentence settings of a folder or hub id; None if it holds a plain model.

    Raises UserError for modules or pooling modes that are not supported, and for files that cannot be read.
    """
    path = find(source, MODULES)
    if path is None:
        return None
    try:
        modules = json.loads(read_bytes(path, CONFIG_BYTES))
        kinds = [(str(module["type"]).rpartition(".")[2], str(module["path"])) for module in modules]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(
            place, f"{source} with a damaged {MODULES}", "a list of modules with their types"
        ) from None
    names = [kind for kind, _ in kinds]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or kinds[0][1]:
        got = f"{source}, whose modules are {', '.join(names)[:80]}"
        raise UserError(place, got, "a Transformer in the folder itself, Pooling and perhaps Normalize")
    if not _FOLDER.fullmatch(kinds[1][1]):
        raise UserError(place, f"{source} with pooling in {kinds[1][1]!r}", "the name of a folder")
    pooled = _settings(source, f"{kinds[1][1]}/config.json")
    options = _settings(source, OPTIONS)
    prompts = options.get("prompts") or {}
    texts = [*prompts, *prompts.values()] if isinstance(prompts, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(place, f"{source} with prompts {str(prompts)[:60]}", "a mapping of names to texts")
    if pooled.get("include_prompt") is False and any(prompts.values()):
        raise UserError(place, f"{source}, which leaves out prompts when it pools", "include_prompt: true")
    default = options.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise UserError(
            place, f"{source} with the default prompt {default!r}", "the name of one of its prompts"
        )
    lower = _settings(source, LENGTH).get("do_lower_case") is True
    return Sentence(_way(source, pooled, place), prompts, default, lower)


def write_sentence(folder: str, sentence: Sentence, width: int, length: int) -> None:
    """Add files to a plain model's folder, so that SentenceTransformer loads it with the same, normalised vectors.

    The files have the form of the library's version 2, which later versions read too.

    width: size of the vectors. length: longest text, in tokens.
    """
    package, kinds = "sentence_transformers.models", ("Transformer", "Pooling", "Normalize")
    paths = ("", POOLING, "2_Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"{package}.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    for path in paths[1:]:
        os.makedirs(os.path.join(folder, path), exist_ok=True)
    way = next(theirs for theirs, ours in _WAYS.items() if ours == sentence.pooling)
    pooled = {"word_embedding_dimension": width, "include_prompt": True}
    files: dict[str, Any] = {
        MODULES: modules,
        f"{POOLING}/config.json": pooled | {switch: name == way for switch, name in _SWITCHES.items()},
        LENGTH: {"max_seq_length": length, "do_lower_case": False},
        OPTIONS: {
            "prompts": dict(sentence.prompts),
            "default_prompt_name": sentence.default_prompt,
            "similarity_fn_name": "cosine",
        },
    }
    for name, content in files.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def named_prompts(prompts: tuple[str, ...]) -> tuple[dict[str, str], str | None]:
    """Return the prompts of one or two texts by the library's names, and the name of the default prompt."""
    if not any(prompts):
        return {}, None
    if len(prompts) == 1:
        return {"text": prompts[0]}, "text"
    return {"query": prompts[0], "document": prompts[1]}, None


def _way(source: str, pooled: dict[str, Any], place: str) -> str:
    named = pooled.get("pooling_mode")
    ways = named if isinstance(named, list) else [named]
    if named is None:
        ways = [way for switch, way in _SWITCHES.items() if pooled.get(switch) is True] or ["mean"]
    if len(ways) != 1 or ways[0] not in _WAYS:
        raise UserError(place, f"{source}, which pools by {ways}", "one of mean, cls and lasttoken")
    return _WAYS[ways[0]]


def _settings(source: str, name: str) -> dict[str, Any]:
    path = find(source, name)
    return {} if path is None else read_json(path, CONFIG_BYTES)
