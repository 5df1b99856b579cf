"""Stop a run on request: a signal, or the end of the launcher above it.

Python's own handlers do not run while the main thread waits in a collective. So one thread reads each signal at once
and watches the deadlines, and another tells the other ranks through their store. During training steps nothing is
raised: the ranks vote in a collective that each step makes anyway, save, and leave together. Everywhere else `Stopped`
is raised in the main thread; if that does not end the process in time, the first thread does.
"""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator

from dsdistill.config import Stopped

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# If the ranks have several reasons, the first in this order counts.
_REASONS = (*(number.name for number in _SIGNALS), "the end of its launcher")
_ORPHANED = len(_SIGNALS)
_WAKE = signal.SIGURG  # from a thread to the main thread; without a handler it does nothing

ONE_REQUEST = 2.0  # seconds: one Ctrl-C reaches a rank from the terminal and again from its launcher
PROMPT = 5.0  # seconds that the main thread has to end outside of training
_LOOK = 0.25  # seconds between two checks of launchers or store
_KEY, _KNOWN = "dsdistill/stop", "dsdistill/stop/known"


class _Watch:
    """A _Watch receives the requests to stop one run, and ends it.

    grace: seconds from the request until training must have saved.
    """

    def __init__(self, grace: float):
        self.grace = grace
        self.reason: int | None = None  # of _REASONS
        self.since = self.deadline = 0.0  # on the monotonic clock
        self.training = self.saving = self.raised = self.spoken = self.closed = False
        self.first = os.environ.get("RANK", "0") == "0"
        self.connected, self.shared = False, threading.Event()
        self.heard = False  # whether another rank told of its request
        self.launchers = _launchers()
        self.ear, self.mouth = socket.socketpair()
        for end in (self.ear, self.mouth):
            end.setblocking(False)

    def note(self, reason: int) -> None:
        """Note the first request. A signal handler may call this between any two instructions, so it takes no lock."""
        if self.reason is None:
            self.since = time.monotonic()
            self.deadline = self.since + (self.grace if self.training else PROMPT)
            self.reason = reason

    def handle(self, number: int, _) -> None:
        if number != _WAKE:
            self.note(_SIGNALS.index(number))
        self.check()

    def check(self) -> None:
        """Raise Stopped, once, if a request came and no training step runs that would handle it at its end."""
        if self.reason is not None and not self.training and not self.raised:
            raise self.stopped("")

    def stopped(self, place: str, what: str = "") -> Stopped:
        self.raised = True
        return Stopped(
            f"{place}stopped by {_REASONS[self.reason]}{what}; the same command continues the run", self.code
        )

    @property
    def code(self) -> int:
        return 128 + (signal.SIGINT if _REASONS[self.reason] == "SIGINT" else signal.SIGTERM)

    def listen(self) -> None:
        """Listen for signals, launchers and deadlines until the run or the process ends."""
        while not self.closed:
            if select.select([self.ear], [], [], _LOOK)[0]:
                for number in filter(_SIGNALS.__contains__, self.ear.recv(64)):
                    self.note(_SIGNALS.index(number))
                    if time.monotonic() - self.since > ONE_REQUEST:
                        self.leave(f" and {signal.Signals(number).name}, and exited immediately")
            elif self.reason is None and any(map(_gone, self.launchers)):
                self.note(_ORPHANED)
                self.wake()
            if self.reason is not None and not self.saving and time.monotonic() > self.deadline:
                late = f"; no step was finished and saved within run.grace ({self.grace:g} s)"
                self.leave(late if self.training else "")

    def share(self, store, size: int) -> None:
        """Exchange requests with the other ranks; this has its own thread, since any call may wait for rank 0."""
        try:
            while self.reason is None:
                if not self.connected:
                    return
                if store.check([_KEY]):
                    self.heard = True
                    self.note(int(store.get(_KEY)))
                    self.wake()
                else:
                    time.sleep(_LOOK)
            self.heard = self.heard or store.check([_KEY])
            store.set(_KEY, str(self.reason))
            store.add(_KNOWN, 1)
            while self.first and store.add(_KNOWN, 0) < size:
                time.sleep(_LOOK / 5)
        except RuntimeError:  # rank 0, which holds the store, is gone: the main thread notices that too
            return
        self.shared.set()

    def wake(self) -> None:
        signal.pthread_kill(threading.main_thread().ident, _WAKE)

    def leave(self, what: str) -> None:
        """End the process from the listening thread."""
        if self.first and not self.spoken:
            line = f"dsdistill: {self.stopped('', what)}\n"
            with contextlib.suppress(OSError):  # standard error may be closed
                os.write(2, f"\n{line}".encode() if self.training else line.encode())  # below the bar
        os._exit(self.code)


_watch: _Watch | None = None


@contextlib.contextmanager
def watch(grace: float = 60.0) -> Iterator[None]:
    """Watch for requests to stop during the block, a whole run; raise Stopped if one came.

    grace: seconds in which training is to save. After Stopped the process must end; the watch goes on until then.
    """
    global _watch
    _watch = this = _Watch(grace)
    # A signal that this process was started to ignore stays ignored, such as SIGHUP under nohup.
    taken = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, this.handle) for number in (*taken, _WAKE)}
    signal.set_wakeup_fd(this.mouth.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=this.listen, name="stopping", daemon=True).start()
    try:
        yield
    except Stopped:
        this.deadline = time.monotonic() + grace
        # Rank 0 holds the store, so it waits until all ranks know; the others wait until rank 0 can know.
        if this.connected:
            this.shared.wait(3.0 if this.first else 1.0)
        this.spoken = True
        raise
    finally:
        if not this.spoken:
            this.raised = this.closed = True
            _watch = None
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)


def connect(store, size: int) -> None:
    """Exchange requests between ranks that share a c10d store."""
    if _watch is not None and size > 1:
        _watch.connected = True
        threading.Thread(target=_watch.share, args=(store.clone(), size), name="sharing", daemon=True).start()


def disconnect() -> None:
    """Note that the store is about to be closed."""
    if _watch is not None:
        _watch.connected = False


@contextlib.contextmanager
def training() -> Iterator[None]:
    """Mark a block of steps that vote: until the grace period is over, a request raises nothing in the block."""
    if _watch is None:
        yield
        return
    _watch.deadline = time.monotonic() + _watch.grace
    _watch.training = True
    try:
        yield
    finally:
        _watch.deadline = time.monotonic() + PROMPT
        _watch.training = False
    _watch.check()


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Mark a save: it may finish even after the grace period is over."""
    if _watch is None:
        yield
        return
    _watch.saving = True
    try:
        yield
    finally:
        _watch.deadline = max(_watch.deadline, time.monotonic() + PROMPT)
        _watch.saving = False


def votes() -> list[int]:
    """Return this rank's request as counts, one for each reason, to be summed over the ranks."""
    return [int(_watch is not None and _watch.reason == reason) for reason in range(len(_REASONS))]


def agreed(counts: list[int]) -> bool:
    """Return whether the summed votes say that the ranks stop; from then on all give the same reason."""
    reason = next((reason for reason, count in enumerate(counts) if count), None)
    if reason is None or _watch is None:
        return False
    _watch.note(reason)
    _watch.reason = reason
    return True


def stopped(place: str, what: str) -> Stopped:
    """Return the exception that every rank raises once they have agreed.

    place: the beginning of its message. what: whether the step was saved.
    """
    return _watch.stopped(place, what)


def requested() -> bool:
    return _watch is not None and _watch.reason is not None


def consequence() -> Stopped | None:
    """Return Stopped if an error may come from another rank that was told to stop; else None."""
    this = _watch
    if this is None or (this.reason is None and not this.connected):
        return None
    if this.reason is None:
        this.raised = (
            True  # a signal from now on is the launcher's, which ends all ranks after another rank's fault
        )
        time.sleep(4 * _LOOK)  # the other thread may still learn of a request
        if not this.heard:
            return None
    return this.stopped("")


def _launchers() -> list[tuple[int, str]]:
    """Return process id and start time of each launcher above this process, nearest first."""
    ancestors, parent = [], os.getppid()
    while parent > 1 and _launches(parent) and (stat := _stat(parent)) is not None:
        ancestors.append((parent, stat[19]))
        parent = int(stat[1])
    return ancestors


def _launches(process: int) -> bool:
    try:
        with open(f"/proc/{process}/cmdline", encoding="utf-8", errors="replace") as file:
            words = file.read().split("\0")
    except OSError:
        return False
    names = {os.path.basename(word) for word in words[:5]}
    return bool(names & _LAUNCHERS) or ("dsdistill" in names and "compare" in words)


_LAUNCHERS = {"deepspeed", "ds", "deepspeed.launcher.runner", "deepspeed.launcher.launch"} | {
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
}


def _stat(process: int) -> list[str] | None:
    """Return state, parent and further fields of a living process; None for others."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields if fields[0] not in "ZX" else None


def _gone(launcher: tuple[int, str]) -> bool:
    process, start = launcher
    try:
        stat = _stat(process)
    except OSError:  # such as too many open files: this tells nothing about the process
        return False
    return stat is None or stat[19] != start
