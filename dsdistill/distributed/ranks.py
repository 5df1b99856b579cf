"""Represent the processes of a run and what they exchange."""

import contextlib
import functools
import ipaddress
import itertools
import os
import resource
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from dsdistill.config import RunError, SharedError, Stopped, UserError


@dataclass(frozen=True)
class Ranks:
    """Ranks holds a process's rank, the number of ranks, and the device that the process computes on."""

    rank: int
    world_size: int
    device: torch.device
    patient: dist.ProcessGroup | None = None  # for long waits, such as a download; None: the default group

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum values over the ranks, in place, on every rank."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value: object) -> list:
        """Return every rank's small picklable object, on every rank, in the order of the ranks."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def first_alone(self):
        """Let rank 0 run the block first, and the others after it, so that they find what it left in a cache.

        If rank 0 fails, the others fail too: else they would wait for it forever, or hide its one line among theirs.
        """
        if not self.first:
            failure = self._first_is_done(None)
            if failure is not None:
                kind, message, code = failure
                if kind is Stopped:
                    raise Stopped(message, code)
                if kind is UserError:
                    raise UserError("rank 0", message, "no failure")
                raise kind(f"rank 0: {message}")
        failure = None
        try:
            yield
        except Stopped as stopped:
            failure = (Stopped, str(stopped), stopped.code)
            raise
        except BaseException as error:
            kind = RuntimeError
            for refusal, told in ((UserError, UserError), (RunError, SharedError)):
                if isinstance(error, refusal):
                    kind = told
            failure = (kind, f"{type(error).__name__}: {error}", 1)
            raise
        finally:
            if self.first:
                self._first_is_done(failure)

    def _first_is_done(self, failure: tuple | None) -> tuple | None:
        """Return rank 0's argument on every rank, once rank 0 has called this."""
        shared = [failure]
        if self.world_size > 1:
            dist.broadcast_object_list(shared, src=0, group=self.patient, device=torch.device("cpu"))
        return shared[0]


def environment() -> None:
    """Set the variables that torch.distributed reads, for one rank on this machine, unless a launcher has set them.

    Raises UserError if a launcher's variables contradict each other, or if the limit of open files is below what a
    rank's sockets and files need.
    """
    launched = "RANK" in os.environ
    if launched:
        _check_launch()
    _allow_files(
        64 + 8 * min(64, int(os.environ["WORLD_SIZE"] if launched else 1))
    )  # sockets, in several groups
    if launched:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def _allow_files(needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UserError("ulimit -n", soft, f"at least {needed} open files")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _check_launch() -> None:
    """Raise UserError if a launcher's variables contradict each other."""
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    if "LOCAL_RANK" in os.environ:
        _number("LOCAL_RANK")
    if rank >= size:
        raise UserError("RANK", rank, f"0 to {size - 1} (WORLD_SIZE)")
    if not os.environ.get("MASTER_ADDR"):
        raise UserError("MASTER_ADDR", "nothing", _BY_LAUNCHER)
    _number("MASTER_PORT")


_BY_LAUNCHER = "the value that deepspeed or torchrun sets, or no RANK for one process"


def private_store(timeout: timedelta) -> dist.Store | None:
    """Return the store of a run on this machine only; None if ranks of other machines may take part.

    The store of one rank does not listen; the store of several listens only on the loopback interface. Torch's own
    would accept anyone on every interface. Call this before any socket is opened: it also sets the interface of gloo
    and NCCL. Raises UserError if the port is taken. torchrun has its own store.
    """
    host = os.environ["MASTER_ADDR"].replace("localhost", "127.0.0.1")
    if not _loopback(host):
        return None
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    size = int(os.environ["WORLD_SIZE"])
    if size == 1:
        return dist.HashStore()
    store = _loopback_store(host, int(os.environ["MASTER_PORT"]), size, os.environ["RANK"] == "0", timeout)
    return dist.PrefixStore(f"start-{next(_starts)}", store)


_starts = itertools.count()


@functools.cache  # its port stays taken until the process ends
def _loopback_store(host: str, port: int, size: int, first: bool, timeout: timedelta) -> dist.TCPStore:
    if not first:
        return dist.TCPStore(host, port, size, False, timeout)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=size + 128)
    except OSError as error:
        raise UserError(
            "MASTER_PORT", f"{port} ({os.strerror(error.errno)})", "a free port: deepspeed --master_port PORT"
        ) from None
    return dist.TCPStore(host, port, size, True, timeout, master_listen_fd=listener.detach())


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise UserError(name, repr(value) if value else "nothing", _BY_LAUNCHER)
    return int(value)
