"""Test tokenizers in a separate process before this one loads them."""

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dsdistill.config import UserError
from dsdistill.config.bounded import MIB, open_file, read_json
from dsdistill.models.settings import find, text_config

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TOKENIZER_BYTES = 512 * MIB
ENTRIES = 2**24  # largest number of ids
# `difference` compares these texts: empty, a pair, capitals, accents, spaces, line breaks, numbers, other scripts.
TEXTS = (
    ("",),
    ("a", "b"),
    ("The Quick brown fox's 12.5 metres: ÉCOLE, naïve façade, ﬁne ½.",),
    ("  two  spaces,\ta tab\n\nand lines\n",),
    ("中文 العربية हिन्दी 😀 x²≠y_1 <b>tag</b> https://example.org/?q=1",),
)
PATIENCE = 120  # seconds for the trial; its own limit counts only processor time
# Other files that the library reads if a folder has them.
_READ = re.compile(
    r"(tokenizer|vocab|special_tokens|added_tokens|chat_template|merges|spiece|sentencepiece|tekken).*|.*\.(model|tiktoken)"
)


def entries(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest id of a tokenizer plus one; vocabularies have gaps, and special tokens have ids above them."""
    vocabulary = max(tokenizer.get_vocab().values(), default=-1)
    frames = [*tokenizer("")["input_ids"], *tokenizer("", "")["input_ids"], *tokenizer.all_special_ids]
    return 1 + max([vocabulary, *(token for token in frames if token is not None)])


def difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """Return how a tokenizer differs from another, for a message; None if both give the same ids.

    Vocabularies are compared completely. The ids of a few texts are compared, too, as they also depend on the
    normalizer and on the special tokens around a text.
    """
    mine, theirs = one.get_vocab(), other.get_vocab()
    for token in sorted(mine.keys() | theirs.keys()) if mine != theirs else ():
        if (here := mine.get(token)) != (there := theirs.get(token)):
            ids = ["no such token" if i is None else f"id {i}" for i in (here, there)]
            return f"of {len(mine)} entries in which {token!r} is {ids[0]}, where it is {ids[1]} of {len(theirs)}"
    for texts in TEXTS:
        a, b = ([*tokenizer(*texts, verbose=False)["input_ids"]] for tokenizer in (one, other))
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            start = slice(max(0, at - 2), at + 3)
            shown = " + ".join(map(repr, texts))
            return f"that makes {a[start]} of a part of {shown}, where it is {b[start]}"
    return None


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of a tokenizer's vocabulary, its special tokens and the ids of a few texts."""
    made = [tokenizer(*texts, verbose=False)["input_ids"] for texts in TEXTS]
    parts = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.special_tokens_map.items()), made]
    return hashlib.sha256(json.dumps(parts, default=str).encode(errors="backslashreplace")).hexdigest()


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, model: PretrainedConfig, place: str, pairs: bool
) -> None:
    """Raise UserError for a tokenizer that gives ids or token types for which the model has no embedding.

    pairs: two texts are tokenized together.
    """
    model = text_config(model)
    if (count := entries(tokenizer)) > model.vocab_size:
        expected = f"at least {count}, the number of the tokenizer's entries"
        raise UserError(f"{place}.config.vocab_size", model.vocab_size, expected)
    types = getattr(model, "type_vocab_size", None)
    texts = ("a", "a") if pairs else ("a",)
    used = 1 + max(tokenizer(*texts).get("token_type_ids", ()), default=0)
    if isinstance(types, int) and 0 < types < used:
        raise UserError(
            f"{place}.config.type_vocab_size",
            types,
            f"at least {used}, the number of the tokenizer's token types",
        )


def check_tokenizer(source: str) -> dict[str, None]:
    """Check a tokenizer's files and test it; return the settings of tokenizer_config.json to leave out.

    Raises UserError for files that the library should not load.
    """
    for name in sorted(os.listdir(source)) if os.path.isdir(source) else ():
        path = os.path.join(source, name)
        if _READ.fullmatch(name) and os.path.exists(path) and not os.path.isdir(path):
            open_file(path, TOKENIZER_BYTES, "the largest that is read").close()
    options: dict[str, None] = {}
    if (settings := find(source, TOKENIZER_CONFIG)) is not None:
        options = _check_settings(read_json(settings, TOKENIZER_BYTES))
    if (tokenizer := find(source, TOKENIZER)) is not None:
        status = os.stat(tokenizer)
        try_tokenizer(tokenizer, (status.st_mtime_ns, status.st_size))
    return options


def _check_settings(settings: dict[str, Any]) -> dict[str, None]:
    """Raise UserError for settings that choose other files; return settings of paths, which must have no effect."""
    for key in ("init_inputs", "gguf_file", "fast_tokenizer_files", "tokenizer_object"):
        if settings.get(key):
            raise UserError(f"{TOKENIZER_CONFIG}.{key}", repr(settings[key]), "only the usual files")
    kind = settings.get("tokenizer_class")
    if kind is not None and not isinstance(kind, str):
        raise UserError(f"{TOKENIZER_CONFIG}.tokenizer_class", repr(kind), "the name of a class")
    return {
        key: None for key in settings if key.endswith("_file") or key in ("fix_mistral_regex", "from_slow")
    }


@functools.cache
def try_tokenizer(path: str, _version: tuple[int, int]) -> None:
    """Raise UserError if a short-lived process cannot load and use a tokenizer.json, or if its ids are out of bounds.

    _version: time and size of the file, so that a changed file is tested again.
    """
    quiet = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}
    command = [sys.executable, "-P", str(Path(__file__).with_name("try_tokenizer.py")), path]
    try:
        done = subprocess.run(
            command,
            env=os.environ | quiet,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
        )
        said: dict[str, Any] = (
            json.loads(done.stdout) if done.returncode == 0 else {"error": _death(done.returncode)}
        )
    except subprocess.TimeoutExpired:
        said = {"error": f"a tokenizer that does not finish within {PATIENCE} seconds"}
    except ValueError:
        said = {"error": "a tokenizer that gives no answer"}
    if "error" in said:
        raise UserError(path, said["error"], "a file that the tokenizers library can use")
    if said["largest"] >= ENTRIES:
        raise UserError(path, f"id {said['largest']}", f"ids below {ENTRIES:,}")


def _death(code: int) -> str:
    return {-24: "a tokenizer that does not finish", -9: "a tokenizer whose process was killed"}.get(
        code, f"a tokenizer whose process dies with code {code}"
    )
