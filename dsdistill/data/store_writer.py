"""Write a store of tokenised documents on all cores, while the source is read. Its shards are complete or absent."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from dsdistill import disk
from dsdistill.config.bounded import read_json
from dsdistill.config.errors import UserError
from dsdistill.data import store
from dsdistill.data.documents import Document, Item, Reader, batches
from dsdistill.data.store import COLUMNS, NOTE_BYTES, SHARD_NOTE, STORE, Documents
from dsdistill.data.store_check import file_hash
from dsdistill.data.table import Bad, Row, Stream

log = logging.getLogger("dsdistill")

SHARD = 2**24  # tokens; a stopped run loses less than one shard
AT_ONCE = 2**20  # characters that are tokenised together
MOST = 4096  # items that are tokenised together, at most
AHEAD = 2  # batches that are read while others are tokenised
SHOWN = 1.0  # seconds before a progress bar appears, and between its updates


@dataclass(frozen=True)
class Limit:
    """Limit how much of a source is read, from its beginning; None: all."""

    documents: int | None = None
    tokens: int | None = None

    def reached(self, documents: int, tokens: int) -> bool:
        """Return whether this many documents and tokens are enough."""
        return (self.documents is not None and documents >= self.documents) or (
            self.tokens is not None and tokens >= self.tokens
        )


def stored(
    path: Path,
    stream: Stream,
    reader: Reader,
    entries: int,
    settings: dict[str, Any],
    limit: Limit,
    bad: Bad | None = None,
) -> Documents:
    """Return a store's documents; if it does not exist, one process writes it and others wait for it.

    Args:
        path: folder of the store.
        entries: number of entries of the tokenizer.
        settings: what the store is made from, for its note.
        bad: gets the error of each row that cannot be used, which is then left out; without it the first is raised.

    Raises:
        UserError: a row cannot be used, the source has no text, or the store is damaged.
        disk.Unwritable: there is no room, or the cache cannot be written; finished shards are kept.
    """
    if store.is_complete(path):
        return store.open_store(path)
    writer = partial(_Writer, stream=stream, reader=reader, entries=entries, settings=settings, limit=limit)
    with disk.explained(path), alone(path):
        if not store.is_complete(path):
            if bad is not None:
                return _without_bad_rows(path, writer, bad)
            writer(path).write()
    return store.open_store(path)


def _without_bad_rows(path: Path, writer: "Callable[..., _Writer]", bad: Bad) -> Documents:
    """Return the documents of a source's good rows; if there are bad rows, the store is not kept for later runs.

    If no row is good, raises the UserError of the first row.
    """
    first: UserError | None = None

    def told(error: UserError) -> None:
        nonlocal first
        first = first or error
        bad(error)

    aside = path.with_name(f"{path.name}-partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        try:
            writer(aside, bad=told).write()
        except UserError as error:  # nothing is left
            raise first or error from None
        if first is None:
            shutil.rmtree(path, ignore_errors=True)  # what a stopped process left
            os.replace(aside, path)
            return store.open_store(path)
        return store.open_store(aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # what is mapped stays readable


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock of a store; wait while another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name, told = f"{path}.lock", False
    while True:
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not told:
                log.info("waiting for another process that tokenises %s", path)
            told = True
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.sameopenfile(file, there := os.open(name, os.O_RDONLY)):
                os.close(there)
                break
            os.close(there)
        os.close(file)  # the last holder removed this file while we waited: try again
    try:
        yield
    finally:
        os.unlink(name)
        os.close(file)


@dataclass
class _Shard:
    """Hold the files of a shard that is being written."""

    folder: Path
    dtype: str
    files: dict[str, BinaryIO] = field(default_factory=dict)
    hashes: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    documents: int = 0

    def add(self, name: str, values: np.ndarray) -> None:
        """Append to a column."""
        if name not in self.files:
            self.files[name] = open(self.folder / f"{name}.bin", "wb")  # noqa: SIM115, closed in `close`
            self.hashes[name] = hashlib.sha256()
        data = np.ascontiguousarray(values, dtype=COLUMNS[name][0] or self.dtype)
        self.files[name].write(data.data)
        self.hashes[name].update(data.data)

    def append(self, document: Document) -> None:
        """Append a document, or a piece that continues the one before."""
        if document.item.begins:
            self.add("begins", np.array([self.tokens]))
            self.add("lines", np.array([document.item.line]))
            self.documents += 1
        if document.ranges is not None:
            self.add("ranges", document.ranges + self.tokens)
        if document.spans is not None:
            order = np.argsort(document.spans[:, 0], kind="stable")
            self.add("spans", document.spans[order] + np.array([self.tokens, self.tokens, 0]))
        self.add("ids", document.ids)
        if document.types is not None:
            self.add("types", document.types)
        self.tokens += len(document.ids)

    def close(self) -> None:
        for file in self.files.values():
            file.close()


class _Writer:
    """Write one store, beginning with the first missing shard."""

    def __init__(
        self,
        path: Path,
        stream: Stream,
        reader: Reader,
        entries: int,
        settings: dict[str, Any],
        limit: Limit,
        bad: Bad | None = None,
    ):
        self.path, self.stream, self.reader = path, stream, reader
        self.settings, self.limit, self.bad = settings, limit, bad
        self.dtype = "uint16" if entries <= 2**16 else "int32"
        self.notes: list[dict[str, Any]] = []  # of complete shards
        self.last: Item | None = None
        self.bar: tqdm | None = None
        self.begun = time.monotonic()
        self.new = 0  # tokens that this process has made
        self.rows = 0  # rows of the source that have been read

    def write(self) -> None:
        """Write the missing shards, and the note that completes the store."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_over()
        if not (self.notes and self.notes[-1]["ended"]):
            try:
                with self._bar() as self.bar:
                    self._shards()
            finally:
                shutil.rmtree(self._folder(), ignore_errors=True)
                if not self.notes:
                    shutil.rmtree(self.path, ignore_errors=True)
        documents, tokens = self._sum("documents"), self._sum("tokens")
        if not documents:
            shutil.rmtree(self.path, ignore_errors=True)
            got = "no rows" if not self.rows else f"only blank rows in column {self.reader.columns[0]}"
            raise UserError(self.stream.place, "an empty file" if self.stream.plain else got, "some text")
        hashes = [[note["hashes"], note["tokens"]] for note in self.notes]
        note = {
            "format": store.FORMAT,
            "place": self.stream.place,
            "dtype": self.dtype,
            "documents": documents,
            "tokens": tokens,
            "truncated": self._sum("truncated"),
            "shards": [f"{index:05}" for index in range(len(self.notes))],
            "hash": hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest(),
            "contents": self._contents(),
            "made_from": self.settings,
        }
        with disk.writing(self.path / STORE) as file:
            json.dump(note, file, indent=1, default=str)
        seconds = time.monotonic() - self.begun
        if self.new and self.stream.shown:
            log.info(
                "%s: %s documents, %s tokens, %s tokens/s",
                self.stream.place,
                f"{documents:,}",
                f"{tokens:,}",
                f"{self.new / max(seconds, 1e-9):,.0f}",
            )

    def _contents(self) -> str | None:
        """Return the hash of the source; None if it is not a file."""
        path = self.stream.identity.get("path")
        return None if path is None else file_hash(path)

    def _sum(self, name: str) -> int:
        return sum(note[name] for note in self.notes)

    def _folder(self, index: int | None = None) -> Path:
        """Return the folder of a shard; index None: of the shard that is being written."""
        return self.path / ("partial" if index is None else f"{index:05}")

    def _take_over(self) -> None:
        """Find the shards that a stopped process completed."""
        while (note := self._folder(len(self.notes)) / SHARD_NOTE).exists():
            self.notes.append(read_json(note, NOTE_BYTES))
        if self.notes:
            log.info("%s: continuing after %d shards", self.stream.place, len(self.notes))

    def _shards(self) -> None:
        after = self.notes[-1]["reached"] if self.notes else [0, -1]
        documents = self._documents(after)
        ended = False
        while not ended:
            shutil.rmtree(self._folder(), ignore_errors=True)
            self._folder().mkdir()
            shard = _Shard(self._folder(), self.dtype)
            truncated = 0
            try:
                for document in documents:
                    shard.append(document)
                    self.last, truncated = document.item, truncated + document.truncated
                    if self._enough(shard):
                        ended = True
                        break
                    if shard.tokens >= SHARD:
                        break
                else:
                    ended = True
            finally:
                shard.close()
            if shard.tokens:
                self._complete(shard, truncated, ended)
            elif self.notes:
                self.notes[-1]["ended"] = True

    def _enough(self, shard: _Shard) -> bool:
        return self.limit.reached(
            self._sum("documents") + shard.documents, self._sum("tokens") + shard.tokens
        )

    def _complete(self, shard: _Shard, truncated: int, ended: bool) -> None:
        assert self.last is not None
        note = {
            "tokens": shard.tokens,
            "documents": shard.documents,
            "truncated": truncated,
            "hashes": {name: digest.hexdigest() for name, digest in shard.hashes.items()},
            "reached": [self.last.row, self.last.piece],
            "ended": ended,
        }
        for name in ("begins", "lines"):  # a shard may be a part of one document
            (shard.folder / f"{name}.bin").touch()
        with disk.writing(shard.folder / SHARD_NOTE) as file:
            json.dump(note, file)
        os.replace(shard.folder, self._folder(len(self.notes)))
        disk.sync(str(self.path))
        self.notes.append(note)

    def _documents(self, after: list[int]) -> Iterator[Document]:
        """Yield the documents after a place in the source; the next texts are read while others are tokenised."""
        row, piece = after
        with ThreadPoolExecutor(1) as pool:
            waiting: list[Any] = []
            try:
                for batch in batches(self._items(row, piece), AT_ONCE, MOST):
                    waiting.append(pool.submit(self.reader.documents, batch, self.stream.place))
                    if len(waiting) >= AHEAD:
                        yield from self._told(waiting.pop(0).result())
                while waiting:
                    yield from self._told(waiting.pop(0).result())
            finally:
                for future in waiting:
                    future.cancel()

    def _told(self, documents: list[Document]) -> list[Document]:
        """Move the progress bar; return the documents."""
        self.new += sum(len(document.ids) for document in documents)
        if self.bar is not None:
            rate = self.new / max(time.monotonic() - self.begun, 1e-9)
            self.bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            self.bar.update(round(self.bar.total * self.stream.done()) - self.bar.n)
        return documents

    def _items(self, row: int, piece: int) -> Iterator[Item]:
        """Yield the items of the source that come after a piece of a row."""
        rows = self._rows()
        if not self.stream.plain:  # the lines of a text file are one row
            rows = (numbered for numbered in rows if numbered[0] >= row)
        if self.bad is None or self.stream.plain:
            items = self.reader.items(self.stream, rows)
        else:
            items = chain.from_iterable(self._forgiven(numbered) for numbered in rows)
        return (item for item in items if (item.row, item.piece) > (row, piece))

    def _rows(self) -> Iterator[tuple[int, Row]]:
        for number, row in enumerate(self.stream.rows(self.bad)):
            self.rows = number + 1
            yield number, row

    def _forgiven(self, numbered: tuple[int, Row]) -> list[Item]:
        assert self.bad is not None
        try:
            return list(self.reader.items(self.stream, iter([numbered])))
        except UserError as error:
            self.bad(error)
            return []

    def _bar(self) -> tqdm:
        return tqdm(
            total=1000,
            desc=f"tokenising {os.path.basename(self.stream.place)}",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            delay=SHOWN,
            mininterval=SHOWN,
            leave=False,
            disable=not self.stream.shown,
            file=sys.stderr,
        )
