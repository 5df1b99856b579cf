"""Run the command line on real ranks, one run after the other; each is told to stop at another place.

[deepspeed --num_gpus 2] stop_worker.py FOLDER NAME=WHAT[@RANK][+WHAT@RANK] ...
Each rank runs FOLDER/NAME.yaml in a process of its own, forked when everything is imported, so that imports are
paid once; a single one runs in the rank itself. WHAT: of PLACES, below, on that rank or on each.
FOLDER/NAME-RANK.err and .code are what each leaves.
"""

import hashlib
import os
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path

# Else each fork would import some of these: DeepSpeed needs inductor, which takes seconds.
import matplotlib.figure  # noqa: F401
import torch
import torch._inductor.compile_fx
import transformers.models.bert.modeling_bert  # noqa: F401

from dsdistill import cli
from dsdistill.distributed import stopping
from dsdistill.engine import checkpoint, run
from dsdistill.engine.passes import dev_scores
from dsdistill.engine.train import Trainer
from tests.engine.launch import heed

RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
STEP = 5  # of 10 steps


def tell(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def stuck() -> None:
    """The main thread is in C code for minutes, as in a collective."""
    hashlib.pbkdf2_hmac("sha512", b"", b"", 10**9)


def wait() -> None:
    """Wait in Python code, where a signal handler can raise an error."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.1)


def before(module: object, name: str, act) -> None:
    """Make a function do something else first."""
    function = getattr(module, name)

    def told(*arguments, **options):
        act()
        return function(*arguments, **options)

    setattr(module, name, told)


def in_step(act) -> None:
    train_step = Trainer.train_step

    def told(trainer, batches, following):
        if trainer.progress.step + 1 == STEP:
            act()
        return train_step(trainer, batches, following)

    Trainer.train_step = told


def slowly() -> None:
    before(Trainer, "train_step", lambda: time.sleep(0.3))


def ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    in_step(lambda: tell(signal.SIGHUP))


def in_preparation(*acts) -> None:
    stopping.PROMPT = 1.5
    before(run, "prepare", lambda: [act() for act in acts])


def not_finite() -> None:
    def broken(trainer, batch, counts):
        value, parts = loss(trainer, batch, counts)
        return value * torch.nan, parts * torch.nan

    loss = Trainer._loss
    in_step(lambda: [setattr(Trainer, "_loss", broken), tell()])


def in_save() -> None:
    """The first save takes longer than `run.grace`."""
    told = []

    def slowly() -> None:
        if not told:
            told.append(tell())
            time.sleep(2)

    before(checkpoint, "random_state", slowly)


def twice() -> None:
    tell()
    time.sleep(stopping.ONE_REQUEST + 0.5)
    tell()
    stuck()


def with_few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))


def at_a_port_in_use() -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    os.environ |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(taken.getsockname()[1])
    before(run, "running", lambda: taken)  # keeps the file open


PLACES = {
    "nothing": lambda: None,
    "slow": slowly,
    "INT": lambda: in_step(lambda: [tell(signal.SIGINT), tell(signal.SIGTERM)]),  # as under a launcher
    "HUP": lambda: in_step(lambda: tell(signal.SIGHUP)),
    "USR1": lambda: in_step(lambda: tell(signal.SIGUSR1)),
    "STOP": lambda: in_step(lambda: tell(signal.SIGSTOP)),
    "ignored": ignored,
    "twice": lambda: in_step(twice),
    "grace": lambda: in_step(lambda: [tell(), stuck()]),
    "save": in_save,
    "not finite": not_finite,
    "preparation": lambda: in_preparation(tell, wait),
    "stuck preparation": lambda: in_preparation(tell, stuck),
    "long preparation": lambda: in_preparation(wait),
    "told while it waits": lambda: before(run, "run", threading.Timer(1.5, tell).start),
    "few files": with_few_files,
    "port in use": at_a_port_in_use,
    "evaluation": lambda: before(dev_scores, "evaluate", lambda: [tell(), wait()]),
}


def run_one(config: Path, place: str = "nothing") -> None:
    """Do in the fork what a user's process does."""
    output = os.open(config.with_name(f"{config.stem}-{RANK}.err"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    heed()
    PLACES[place]()
    sys.argv = ["dsdistill", "train", str(config)]
    cli.main()


def see(process: int, folder: Path, name: str) -> None:
    """Wait for the fork and for the other rank's fork; kill one that hangs once the other has ended."""
    others = [folder / f"{name}-{rank}.code" for rank in range(SIZE) if rank != RANK]

    def meet() -> None:
        while not all(other.exists() for other in others):
            time.sleep(0.05)

    _, status = os.waitpid(process, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        meet()
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
    partial = folder / f"{name}-{RANK}.partial"
    partial.write_text(str(os.waitstatus_to_exitcode(status)))
    partial.rename(partial.with_suffix(".code"))
    meet()


if __name__ == "__main__":
    folder, *scenarios = (a for a in sys.argv[1:] if not a.startswith("--local_rank"))
    for scenario in scenarios:
        name, _, what = scenario.partition("=")
        places = [place.partition("@")[::2] for place in what.split("+")]
        mine = [place for place, rank in places if rank in ("", str(RANK))]
        process = os.fork() if len(scenarios) > 1 else 0
        if not process:
            run_one(Path(folder, f"{name}.yaml"), *mine)
        see(process, Path(folder), name)
