"""Record digests of what a run is made from, and refuse to resume it if the contents under these names changed.

RUN/sources.json holds digests of the tokenised examples, of the tokenizer and of the weights of each named model.
"""

import hashlib
import json
import os
from collections.abc import Sequence

import numpy as np

from dsdistill import disk
from dsdistill.config import UserError
from dsdistill.config.bounded import read_json
from dsdistill.data import Examples, Mixture, Set, Splits, Streamed, texts_of
from dsdistill.engine.prepare import Prepared
from dsdistill.engine.run_folder import SOURCES, RunFolder
from dsdistill.models import tokenizer, weights

CONTENT = "2:"  # prefix of digests of examples; older ones lack it and hash every token
_BYTES = 2**20  # most bytes of a note


def origins(prepared: Prepared) -> dict[str, str]:
    """Return digests of what a run is made from, by the key of the config that names it.

    A model from the hub is noted by its commit, if the library knows it.
    """
    config, data = prepared.config, prepared.data
    found = {"data.tokenizer": tokenizer.fingerprint(prepared.tokenizer)}
    for name, part in {"data.train": data.train, **_dev_sets(data)}.items():
        found[name] = content(part, data.labels)
    if prepared.contrast is not None:
        for name, model in (
            ("data.domain", prepared.contrast.domain),
            ("data.general", prepared.contrast.general),
        ):
            digest = hashlib.sha256(model.keys.tobytes() + model.counts.tobytes())
            found[name] = digest.hexdigest()
    for name, section in (("teacher.path", config.teacher), ("student.path", config.student)):
        if section is not None and section.path is not None:
            found[name] = weights.fingerprint(section.path, name)
    return {name: value for name, value in found.items() if value is not None}


def _dev_sets(data: Splits) -> dict[str, Set]:
    return {f"data.dev.{name}" if name else "data.dev": dev for name, dev in data.devs.items()}


def content(examples: Set, classes: Sequence[str] = ()) -> str:
    """Return a digest of examples: of their stores' hashes, of the ranges of their tokens, and of their labels."""
    if isinstance(examples, Streamed):  # the data is not read yet: the revision of its source stands for it
        return f"{CONTENT}{examples.digest}"
    digest = hashlib.sha256(json.dumps(classes).encode())
    parts = examples.parts if isinstance(examples, Mixture) else (examples,)
    for part in parts:
        own = texts_of(part)
        digest.update(own.documents.digest.encode())
        for tensor in (own.starts, own.lengths, own.labels):
            if tensor is not None:
                digest.update(tensor.numpy().tobytes())
    if isinstance(examples, Mixture):
        digest.update(repr(examples.weights).encode())
    return f"{CONTENT}{digest.hexdigest()}"


def _former_content(examples: Set, classes: Sequence[str]) -> str:
    """Return the digest that runs wrote before there were stores: it hashes every token."""
    digest = hashlib.sha256(json.dumps(classes).encode())
    assert isinstance(examples, Examples)  # such runs have one source, and documents do not share rows
    rows = range(len(examples))
    for row in rows:
        digest.update(examples.tokens(row).astype(np.int32).tobytes())
    digest.update(np.cumsum([0, *examples.lengths.tolist()]).astype(np.int64).tobytes())
    if examples.labels is not None:
        digest.update(examples.labels.numpy().tobytes())
    if examples.prompted:
        digest.update(np.array([examples.context(row) for row in rows], dtype=np.int64).tobytes())
    return digest.hexdigest()


def check_origins(folder: RunFolder, found: dict[str, str], data: Splits[Set] | None = None) -> None:
    """Raise UserError if a run that has begun was made from other contents; runs without sources.json may go on.

    data: the sets whose digests `found` holds.
    """
    note = folder / SOURCES
    if not folder.begun or not os.path.lexists(note):
        return
    before = read_json(note, _BYTES)
    if data is not None:
        for name, examples in {"data.train": data.train, **_dev_sets(data)}.items():
            if not before.get(name, CONTENT).startswith(CONTENT):
                found = found | {name: _former_content(examples, data.labels)}
    changed = [name for name, value in found.items() if before.get(name, value) != value]
    if changed:
        raise UserError(
            f"{folder.path}: {', '.join(changed)}",
            "contents that differ from those at this run's start",
            "the same contents, or another run.dir",
        )


def write_origins(folder: RunFolder, found: dict[str, str]) -> None:
    """Write the note of a new run, or of an older one that has none."""
    note = folder / SOURCES
    if not folder.begun or not os.path.lexists(note):
        with disk.writing(note) as file:
            json.dump(found, file, indent=2)
            file.write("\n")
