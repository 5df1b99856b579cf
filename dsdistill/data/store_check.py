"""Check stores, and the sources that they were made from, by the hashes of all bytes."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from dsdistill.config.bounded import read_json
from dsdistill.config.errors import UserError
from dsdistill.data.store import NOTE_BYTES, SHARD_NOTE, STORE

_AT_ONCE = 2**22  # bytes


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(_AT_ONCE):
            digest.update(part)
    return digest.hexdigest()


def verify_stores(paths: Iterable[str]) -> int:
    """Read stores and their sources completely, and return how many stores there are.

    A changed size or time of a source shows a change, unless somebody resets them; its hash always shows it.

    Raises:
        UserError: a store or a source has changed since the store was made.
    """
    count = 0
    for path in map(Path, dict.fromkeys(paths)):
        note = read_json(path / STORE, NOTE_BYTES)
        for name in note["shards"]:
            for column, before in read_json(path / name / SHARD_NOTE, NOTE_BYTES)["hashes"].items():
                file = path / name / f"{column}.bin"
                if file_hash(file) != before:
                    raise UserError(
                        str(file),
                        "a file that has changed since it was written",
                        f"an intact store: remove {path}",
                    )
        source, before = note["made_from"]["source"].get("path"), note["contents"]
        if source is not None and before is not None and file_hash(source) != before:
            raise UserError(
                source,
                f"a file that has changed since {path} was made from it",
                f"the same contents, or remove {path}",
            )
        count += 1
    return count
