"""The command line's `train` on real ranks, with a fault at a given step.

deepspeed --num_gpus 2 fault_worker.py CONFIG.yaml FAULT RANK STEP
FAULT: of FAULTS, below.
"""

import io
import math
import os
import resource
import signal
import sys
import time

import torch

from dsdistill import cli
from dsdistill.engine import checkpoint
from dsdistill.engine.train import Trainer


def hang() -> None:
    """The rank never comes to its next collective."""
    time.sleep(3600)


def fail() -> None:
    raise ArithmeticError("a rank that raises")


def full_disk() -> None:
    """No file can grow any more."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def not_a_number() -> None:
    """From here on this rank's losses are none."""
    loss = Trainer._loss

    def broken(trainer, batch, counts):
        value, parts = loss(trainer, batch, counts)
        return value * math.nan, parts * math.nan

    Trainer._loss = broken


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_file() -> None:
    """Killed with half of its shard written."""

    def half(state, path, *_, **__):
        whole = io.BytesIO()
        write(state, whole)
        with open(path, "wb") as file:
            file.write(whole.getvalue()[: whole.tell() // 2])
        die()

    write, torch.save = torch.save, half


def die_between_files() -> None:
    """Killed with every shard written and no manifest."""
    checkpoint._fingerprint = die


FAULTS = {
    "hang": hang,
    "raise": fail,
    "full disk": full_disk,
    "nan": not_a_number,
    "kill in a file": die_in_file,
    "kill between files": die_between_files,
}


def inject(fault: str, step: int) -> None:
    train_step = Trainer.train_step

    def faulty(trainer, batches):
        if trainer.progress.step + 1 == step:
            FAULTS[fault]()
        return train_step(trainer, batches)

    Trainer.train_step = faulty


if __name__ == "__main__":
    config, fault, rank, step = (a for a in sys.argv[1:] if not a.startswith("--local_rank"))
    if os.environ["RANK"] == rank:
        inject(fault, int(step))
    sys.argv = ["dsdistill", "train", config]
    cli.main()
