"""Write a rank's files of a checkpoint and hash them at the same time, either at once or later from a copy."""

import copy
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from dsdistill import disk
from dsdistill.config.secrets import redacted
from dsdistill.distributed.deepspeed import deepspeed


class Writer(deepspeed.runtime.checkpoint_engine.checkpoint_engine.CheckpointEngine):
    """A Writer writes what DeepSpeed saves for a student's engine; failures are raised only by commit().

    It tells DeepSpeed that it is decoupled, so that DeepSpeed does not wait for its files. `checkpoint.Saving` waits
    for the files of all ranks together.
    """

    def __init__(self):
        super().__init__()
        self.name = "dsdistill"
        self._later = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="dsdistill-writer")
        self._files: dict[str, Future[dict]] = {}  # by path

    def begin(self, later: bool) -> None:
        """Begin a checkpoint. later: `save` copies to the host, and a thread writes the copies while training goes on.

        This first waits for files of an earlier checkpoint that was not committed.
        """
        wait(self._files.values())
        self._later, self._files = later, {}

    def create(self, info) -> None:
        """Do nothing: the folder exists already."""

    def save(self, state_dict: dict, path: str) -> None:
        """Write a file, now or later; a failure is kept for commit(), since DeepSpeed's collectives follow."""
        if "ds_config" in state_dict:
            state_dict = state_dict | {"ds_config": redacted(state_dict["ds_config"])}
        if self._later:
            self._make(path, lambda: self._pool.submit(_written, on_host(state_dict), path))
        else:
            self._make(path, lambda: _done(_written(state_dict, path)))

    def add(self, path: str) -> None:
        """Add a file that DeepSpeed itself has copied into the checkpoint."""
        if self._later:
            self._make(path, lambda: self._pool.submit(fingerprint, path))
        else:
            self._make(path, lambda: _done(fingerprint(path)))

    def _make(self, path: str, start: Callable[[], Future]) -> None:
        try:
            self._files[path] = start()
        except (
            OSError,
            RuntimeError,
        ) as error:  # RuntimeError: torch.save on a full disk, or torch out of memory
            self._files[path] = Future()
            self._files[path].set_exception(error)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Return what a file holds; the caller limits its classes by deepspeed.known_pickles."""
        return torch.load(path, map_location=map_location, weights_only=True)

    @property
    def written(self) -> bool:
        """Return whether all files are written, or have failed."""
        return all(file.done() for file in self._files.values())

    def commit(self, info=None) -> bool:
        """Wait until all files are synced to the disk; raise the first failure, OSError or RuntimeError."""
        wait(self._files.values())
        for file in self._files.values():
            file.result()
        return True

    def prints(self, folder: str) -> dict[str, dict]:
        """Return size and hash of each of this rank's files, by its path within `folder`; call it after commit()."""
        return {os.path.relpath(path, folder): file.result() for path, file in self._files.items()}

    def is_decoupled(self) -> bool:
        """Return True: DeepSpeed commits nothing itself."""
        return True

    def cleanup(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _done(value: dict) -> Future[dict]:
    made: Future[dict] = Future()
    made.set_result(value)
    return made


class _Hashed:
    """A _Hashed hashes what is written to a file, from its beginning to its end."""

    def __init__(self, file: BinaryIO):
        self.file, self.size, self.hash = file, 0, hashlib.sha256()

    def write(self, data) -> int:
        self.hash.update(data)
        self.size += self.file.write(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _written(state: dict, path: str) -> dict:
    """Write a file and sync it to the disk; return its size and hash."""
    with open(path, "wb") as file:
        made = _Hashed(file)
        torch.save(state, made)
    disk.sync(path)
    return {"size": made.size, "sha256": made.hash.hexdigest()}


def fingerprint(path: str) -> dict:
    """Return size and hash of an existing file."""
    with open(path, "rb") as file:
        return {"size": os.path.getsize(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def on_host(value: Any, copies: dict[int, torch.UntypedStorage] | None = None) -> Any:
    """Return a copy of a file's future content with all tensors on the host; those that share memory still share it.

    copies: copies made so far, by storage.
    """
    copies = {} if copies is None else copies
    if isinstance(value, Tensor):
        whole = value.untyped_storage()
        if whole._cdata not in copies:
            copies[whole._cdata] = whole.clone() if whole.device.type == "cpu" else whole.cpu()
        made = torch.empty(0, dtype=value.dtype)
        made.set_(copies[whole._cdata], value.storage_offset(), value.size(), value.stride())
        return nn.Parameter(made, value.requires_grad) if isinstance(value, nn.Parameter) else made
    if isinstance(value, dict):
        held = copy.copy(value)  # keeps its class and that class's attributes
        for key, item in value.items():
            held[key] = on_host(item, copies)
        return held
    if type(value) in (list, tuple):
        return type(value)(on_host(item, copies) for item in value)
    return copy.deepcopy(value)
