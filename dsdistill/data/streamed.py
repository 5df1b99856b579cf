"""Read a train set in order, part by part, so that it may be larger than the disk. Each part is a small store.

HOME/                   in the cache, for one run
  source.json           the revision that is read
  parts.jsonl           a line for each part so far, see Note; it stays when parts are removed, for an exact resume
  writer.lock           held by the process that makes parts
  00012/                a part: its store and its blocks; at most KEPT of them exist
    complete            exists once all else is complete; readers hold its lock

Every rank can make parts, but only the one that holds the lock does. If that rank ends, another one continues. Ranks on
several machines need nothing from each other, whether they share the cache or not.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dsdistill import disk
from dsdistill.config.bounded import read_json
from dsdistill.config.errors import UserError
from dsdistill.data.examples import Examples, Packed
from dsdistill.data.hub import Mark
from dsdistill.data.store import key
from dsdistill.data.table import Row, Stream

log = logging.getLogger("dsdistill")

KEPT = 4  # parts
CHARACTERS = 2**26  # of a part, about 2**24 tokens
LEAST = 2**12  # fewest characters of the last part, so that it holds an example
POLL = 0.1  # seconds between two checks for what another process makes
SHOWN = 2.0  # seconds of waiting before a message
COMPLETE, NOTES, LOCK, SOURCE = "complete", "parts.jsonl", "writer.lock", "source.json"
T = TypeVar("T")


class Source(Protocol):
    """Give rows in order, from any row on."""

    @property
    def place(self) -> str:
        """Return its name in messages."""

    @property
    def identity(self) -> dict[str, Any]:
        """Return values that change when the contents do."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the names of all columns, if they are known."""

    def rows(self, mark: Mark | None = None) -> Iterator[tuple[Row, Mark]]:
        """Yield numbered rows from a mark on, each with its own mark."""


@dataclass(frozen=True)
class Note:
    """Describe one part, whether its files exist or not."""

    examples: int
    digest: str  # of its store
    next: Mark | None  # where the part after it begins; None: the source ends here

    @property
    def contents(self) -> tuple[Any, ...]:
        """Return the values that are the same each time the part is made."""
        return self.examples, self.digest, self.next and self.next["row"]


class Streamed:
    """Read an endless set: after the last row of its source comes the first one again.

    Args:
        home: folder of its parts.
        source: where the rows are read from.
        load: makes the examples of a part from a stream and a folder, or maps them if they exist; the third argument
            says whether it is called to make them, which happens on a separate thread.
        settings: all settings that change the examples.
    """

    def __init__(
        self,
        home: Path,
        source: Source,
        load: Callable[[Stream, Path, bool], Examples | Packed],
        settings: dict[str, Any],
    ):
        self.home, self.source, self._load = home, source, load
        self.digest = key({"source": source.identity, "settings": settings})
        self._notes = _Notes(home / NOTES)
        self._window = range(1)  # the parts that this rank reads now
        self._first: Examples | Packed | None = None
        self._held: dict[
            int, tuple[Examples | Packed, int]
        ] = {}  # by place in the source; with a locked file
        self._guard = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __len__(self) -> int:
        return sys.maxsize

    def count(self, part: int) -> int:
        """Return how many examples a part has; wait until this is known.

        part: its number; after the last part of the source, numbers go on with the first part again.
        """

        def known() -> int | None:
            place = self._place(part)
            return None if place is None else self._notes.held[place].examples

        return self._waited(known, part)

    def part(self, part: int) -> Examples | Packed:
        """Return the examples of a part; wait until they are made."""
        self.count(part)
        place = self._place(part)
        assert place is not None
        with self._guard:
            if place not in self._held:
                file = self._waited(lambda: _shared(self._folder(place) / COMPLETE), part)
                self._held[place] = self._load(self._stream(place), self._folder(place), False), file
            return self._held[place][0]

    def first(self) -> Examples | Packed:
        """Return the first part, which is kept from then on, for passes that read examples by their numbers."""
        if self._first is None:
            before, self._window = self._window, range(1)
            self._first = self.part(0)
            self._window = before
        return self._first

    def need(self, first: int, last: int) -> None:
        """Say which parts are read now and next; earlier ones are released."""
        window = range(first, last + 1)
        wanted = self._wanted(window)
        with self._guard:
            for place in [place for place in self._held if place not in wanted]:
                os.close(self._held.pop(place)[1])
        self._window = window  # set last: now the released parts can be removed

    def close(self, finished: bool = True) -> None:
        """Stop making parts; if the run is finished, also remove the parts that no other rank reads.

        Otherwise they stay, so that the run can continue later.
        """
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        with self._guard:
            for _, file in self._held.values():
                os.close(file)
            self._held, self._first = {}, None
        if finished:
            with _leading(self.home) as leads:
                if leads:
                    self._tidy(set())

    def _place(self, part: int) -> int | None:
        """Return which part of the source a part is; None if that is not known yet."""
        self._notes.refresh()
        if self._notes.ended:
            return part % len(self._notes.held)
        return part if part < len(self._notes.held) else None

    def _folder(self, place: int) -> Path:
        return self.home / f"{place:05}"

    def _stream(self, place: int, rows: Callable[[], Iterator[Row]] = lambda: iter(())) -> Stream:
        mark = self._notes.begin(place)
        identity = self.source.identity | {"part": place, "row": 0 if mark is None else mark["row"]}
        identity["characters"] = [CHARACTERS, LEAST]
        # The run waits for the first part; later ones are made while its own progress bar moves.
        shown = not self._notes.held
        return Stream(self.source.place, rows, identity, "row", columns=self.source.columns, shown=shown)

    def _waited(self, ready: Callable[[], T | None], part: int) -> T:
        """Wait until `ready` returns something, and return it; meanwhile the thread is asked for the part."""
        started, told = time.monotonic(), False
        while (found := ready()) is None:
            if part not in self._window:
                self._window = range(part, part + 1)
            self._begin()
            if self._failure is not None:
                raise self._failure
            if not told and time.monotonic() - started > SHOWN:
                told = True
                log.info("waiting for part %d of %s", part + 1, self.source.place)
            time.sleep(POLL)
        self._begin()
        return found

    def _begin(self) -> None:
        if self._thread is None and not self._closed.is_set():
            self._thread = threading.Thread(target=self._make_parts, name="dsdistill-parts", daemon=True)
            self._thread.start()

    # The methods below run on the thread that makes parts.

    def _make_parts(self) -> None:
        try:
            while not self._closed.is_set():
                with _leading(self.home) as leads:
                    if leads:
                        self._lead()
                self._closed.wait(5 * POLL)
        except _Closed:
            pass
        except BaseException as error:
            self._failure = error

    def _lead(self) -> None:
        """Make missing parts until the set is closed."""
        self._notes.mend()
        reading = _Reading(self.source, self._closed)
        while not self._closed.is_set():
            window = self._window
            wanted = self._wanted(window)
            place = next((place for place in wanted if not (self._folder(place) / COMPLETE).exists()), None)
            if place is not None:
                others = {*self._tidy({*wanted})} - {place}
                # If a slower rank still reads an earlier part, only the parts needed now are made beyond KEPT.
                if len(others) < KEPT or place in wanted[: len(window) + (self._first is not None)]:
                    self._make(place, reading)
                    continue
            self._closed.wait(POLL)

    def _wanted(self, window: range) -> list[int]:
        """Return the parts of the source that must exist, the most urgent first.

        A part whose beginning is not known yet is replaced by the first unknown part, which must be made before it.
        """
        self._notes.refresh()
        known, found = len(self._notes.held), [] if self._first is None else [0]
        for part in range(window.start, max(window.stop, window.start + KEPT - len(found))):
            found.append(part % known if self._notes.ended else min(part, known))
        return list(dict.fromkeys(found))

    def _tidy(self, wanted: set[int]) -> list[int]:
        """Remove the parts that are not wanted and not being read; return those that are left."""
        left = []
        for folder in self.home.glob("[0-9]*/"):
            if int(folder.name) not in wanted:
                with _unshared(folder / COMPLETE) as free:
                    if free:
                        (folder / COMPLETE).unlink(missing_ok=True)
                        shutil.rmtree(folder, ignore_errors=True)
                        continue
            left.append(int(folder.name))
        return left

    def _make(self, place: int, reading: "_Reading") -> None:
        folder, mark = self._folder(place), self._notes.begin(place)
        with disk.explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            found = self._load(self._stream(place, lambda: reading.part(mark)), folder, True)
            # If the store was complete already, the end of the part is found by reading to it.
            if reading.begun != mark or not reading.done:
                deque(reading.part(mark), maxlen=0)
            own = found.parts if isinstance(found, Packed) else found
            note = Note(len(found), own.documents.digest, reading.next)
            if place == len(self._notes.held):
                self._notes.add(note)
            elif (before := self._notes.held[place]).contents != note.contents:
                raise UserError(
                    f"{self.source.place}, part {place + 1}",
                    f"contents that have changed ({note.examples} examples)",
                    f"what this run read before ({before.examples} examples)",
                )
            with disk.writing(folder / COMPLETE):
                pass


def pinned(home: Path, revision: Callable[[], str | None]) -> str | None:
    """Return the revision that a run has read from its beginning; `revision` returns the current one."""
    path = home / SOURCE
    if path.exists():
        return read_json(path, 2**20).get("revision")
    found = revision()
    with disk.writing(path) as file:
        json.dump({"revision": found}, file)
    return found


class _Closed(BaseException):
    """Signal that the set is closed while a part is made."""


class _Reading:
    """Go through a source part by part, and open it again only if a part is not the next one."""

    def __init__(self, source: Source, closed: threading.Event):
        self.source, self.closed = source, closed
        self.begun: Mark | None = {"row": -1}  # where the latest part begins; at first, where no part does
        self.next: Mark | None = None
        self.done = False
        self._rows: Iterator[tuple[Row, Mark]] = iter(())
        self._ahead: deque[tuple[Row, Mark]] = deque()

    def part(self, mark: Mark | None) -> Iterator[Row]:
        """Yield the rows of the part that begins at a mark."""
        if not (self.done and self.next is not None and self.next == mark):
            self._rows, self._ahead = self.source.rows(mark), deque()
        self.begun, self.done, self.next = mark, False, None
        size = 0
        while self._look(0):
            if size >= CHARACTERS and self._look(LEAST):
                self.next = self._ahead[0][1]
                break
            if self.closed.is_set():
                raise _Closed
            row, _ = self._ahead.popleft()
            size += _characters(row[1])
            yield row
        self.done = True

    def _look(self, characters: int) -> bool:
        """Return whether the remaining rows have at least this many characters."""
        held = 0
        for row, _ in chain(list(self._ahead), self._read()):
            held += _characters(row[1])
            if held >= characters:
                return True
        return False

    def _read(self) -> Iterator[tuple[Row, Mark]]:
        for found in self._rows:
            self._ahead.append(found)
            yield found


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value.strip())
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_characters, inner))


class _Notes:
    """Hold the notes of all parts so far, in a file that one process adds to and others read."""

    def __init__(self, path: Path):
        self.path, self.held = path, []
        self._read, self._guard = 0, threading.Lock()

    @property
    def ended(self) -> bool:
        """Return whether the source has been read to its end."""
        return bool(self.held) and self.held[-1].next is None

    def begin(self, place: int) -> Mark | None:
        """Return where a part begins; None: at the beginning of the source."""
        return None if place == 0 else self.held[place - 1].next

    def refresh(self) -> None:
        """Read the new lines."""
        with self._guard, contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            file.seek(self._read)
            new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            try:
                self.held += [Note(**json.loads(line)) for line in whole.splitlines()]
            except (ValueError, TypeError) as error:
                raise UserError(
                    str(self.path), f"a damaged file ({error})", "an intact one: remove it"
                ) from None
            self._read += len(whole)

    def mend(self) -> None:
        """Remove a last line that a process could not write completely."""
        self.refresh()
        with contextlib.suppress(FileNotFoundError):
            if os.path.getsize(self.path) > self._read:
                os.truncate(self.path, self._read)

    def add(self, note: Note) -> None:
        """Add a line."""
        disk.append(str(self.path), json.dumps(asdict(note)) + "\n")
        disk.sync(str(self.path))
        self.refresh()


@contextlib.contextmanager
def _leading(home: Path) -> Iterator[bool]:
    """Try to hold the lock of the process that makes parts; yield whether this process has it."""
    home.mkdir(parents=True, exist_ok=True)
    file = os.open(home / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        yield _locked(file, fcntl.LOCK_EX)
    finally:
        os.close(file)


def _locked(file: int, how: int) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _shared(path: Path) -> int | None:
    """Return a file that is locked for reading as long as it is open; None if it does not exist."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if _locked(file, fcntl.LOCK_SH):
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(file).st_ino:  # else it was removed in between
                return file
    os.close(file)
    return None


@contextlib.contextmanager
def _unshared(path: Path) -> Iterator[bool]:
    """Try to hold the lock of a file; yield True if no process reads it or if it does not exist."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    try:
        yield _locked(file, fcntl.LOCK_EX)
    finally:
        os.close(file)
