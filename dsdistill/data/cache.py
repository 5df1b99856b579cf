"""Keep costly results in a cache folder, which several runs, ranks and people may share."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dsdistill import disk
from dsdistill.config.errors import UserError

log = logging.getLogger("dsdistill")


def rows(path: Path, make: Callable[[], Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the rows of a JSON Lines file of the cache; if it is missing or damaged, they are made and kept there.

    If the cache cannot be written, nothing is kept, and one warning is logged.

    Raises:
        UserError: the cache exists and cannot be read.
    """
    if is_there(path):
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise _unreadable(path, error) from None
        except (ValueError, RecursionError):
            log.warning("%s is damaged and is made again", path)
    made = list(make())
    try:
        # Other ranks and runs may write the same file now: each writes a complete one, and the last to finish wins.
        with disk.writing(path) as file:
            file.writelines(json.dumps(row) + "\n" for row in made)
    except disk.Unwritable as error:
        log.warning("rows cannot be kept in the cache: %s", error)
    return made


def tokenizer(
    kind: str, texts: Iterable[str], size: int, cache: str, make: Callable[[list[str]], Any]
) -> str:
    """Return the folder of a tokenizer that is trained on texts; its name is a digest of kind, size and texts.

    Args:
        kind: text that distinguishes it from other tokenizers with the same texts and size.
        texts: all texts that it is trained on.
        size: most entries it may have.
        cache: folder that keeps it.
        make: makes a transformers tokenizer from the texts.

    Raises:
        UserError: the cache cannot be read or written.
    """
    texts = list(texts)
    digest = hashlib.sha256(f"{kind} {size} ".encode())
    for text in texts:
        digest.update(f"{len(text)} {text}".encode(errors="backslashreplace"))
    folder = Path(cache, f"tokenizer-{digest.hexdigest()[:16]}").expanduser()
    if is_there(folder):
        return str(folder)
    made = make(texts)
    try:
        # Another run may make the same one now: each writes its own, and the first to finish wins.
        with disk.replacing(folder) as written:
            made.save_pretrained(written)
    except disk.Unwritable as error:
        if not is_there(folder):
            wanted = "a cache that can be written, or one that has this tokenizer"
            raise UserError("data.cache", str(error), wanted) from None
    return str(folder)


def is_there(path: Path) -> bool:
    """Return whether the cache holds a file or folder; raise UserError if it may not be read."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    return True


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        "data.cache", f"{path} ({disk.reason(error)})", "a cache that can be read, or another folder"
    )
