"""Run the command line's `train` on real ranks, with a fault at a given step.

deepspeed --num_gpus 2 fault_worker.py CONFIG.yaml FAULT RANK STEP
FAULT: of FAULTS, below.
"""

import atexit
import io
import math
import os
import resource
import signal
import sys
import threading
import time

import torch

from dsdistill import cli
from dsdistill.distributed.writer import Writer
from dsdistill.engine import checkpoint
from dsdistill.engine.train import Trainer

step_of_fault = 0


def hang() -> None:
    """The rank never reaches its next collective."""
    time.sleep(3600)


def fail() -> None:
    raise ArithmeticError("a rank that raises")


def full_disk() -> None:
    """From the next checkpoint on no file can grow."""

    def begin(writer: Writer, later: bool) -> None:
        whole(writer, later)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    whole, Writer.begin = Writer.begin, begin


def not_a_number() -> None:
    """From here on this rank's losses are not numbers."""
    loss = Trainer._loss

    def broken(trainer, batch, counts):
        value, parts = loss(trainer, batch, counts)
        return value * math.nan, parts * math.nan

    Trainer._loss = broken


def no_gradient() -> None:
    """From here on one parameter's gradients are not numbers; the losses stay as they were."""
    _spoil(steps=99)


def one_without_gradient() -> None:
    """The same in this step only."""
    _spoil(steps=1)


def _spoil(steps: int) -> None:
    loss, first = Trainer._loss, None

    def spoilt(trainer, batch, counts):
        nonlocal first
        if first is None:
            first = trainer.progress.step
            trainer.module.body.classifier.weight.register_hook(
                lambda gradient: gradient * math.nan if trainer.progress.step < first + steps else gradient
            )
        return loss(trainer, batch, counts)

    Trainer._loss = spoilt


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_file() -> None:
    """The rank is killed when half of a file is written."""

    def half(state, file):
        if tag not in file.file.name:  # a file of an earlier checkpoint, still being written
            return write(state, file)
        whole = io.BytesIO()
        write(state, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        die()

    tag = checkpoint.tag_of(step_of_fault)
    write, torch.save = torch.save, half


def die_between_files() -> None:
    """The rank is killed when every shard is written, but no manifest."""

    def finish(saving: checkpoint.Saving, keep: int) -> None:
        saving.writer.commit()
        (die if saving.step == step_of_fault else whole)(saving, keep)

    whole, checkpoint.Saving.finish = checkpoint.Saving.finish, finish


def die_between_own_files() -> None:
    """The rank is killed when its shard is written, but not its random state."""
    checkpoint.random_state = die


def die_before_pointer() -> None:
    """The rank is killed when the manifest is written, while the pointer still names the checkpoint before."""

    def write(path: str, text: str) -> None:
        (die if path.endswith(checkpoint._POINTER) and text == tag else whole)(path, text)

    tag = checkpoint.tag_of(step_of_fault)
    whole, checkpoint._write = checkpoint._write, write


FAULTS = {
    "nothing": lambda: None,
    "hang": hang,
    "raise": fail,
    "full disk": full_disk,
    "nan": not_a_number,
    "nan gradient": no_gradient,
    "one nan gradient": one_without_gradient,
    "kill in a file": die_in_file,
    "kill between files": die_between_files,
    "kill between own files": die_between_own_files,
    "kill before the pointer": die_before_pointer,
}


def want_the_interpreter_at_the_end() -> None:
    """Start a thread of torch's that waits for the interpreter as the process ends, as gloo's thread may do."""
    ending = threading.Event()

    def add() -> None:
        ending.wait()
        ones = torch.ones(10)
        while True:
            ones + ones

    threading.Thread(target=add, daemon=True).start()
    atexit.register(ending.set)


def inject(fault: str, step: int) -> None:
    train_step = Trainer.train_step

    def faulty(trainer, batches, following):
        if trainer.progress.step + 1 == step:
            FAULTS[fault]()
        return train_step(trainer, batches, following)

    Trainer.train_step = faulty


LATE = "late "  # prefix for runs that read a step's values after the next step, as runs on GPUs do

if __name__ == "__main__":
    config, fault, rank, step = (a for a in sys.argv[1:] if not a.startswith("--local_rank"))
    if fault.startswith(LATE):
        Trainer._waits, fault = property(lambda _: True), fault.removeprefix(LATE)
    if os.environ["RANK"] == rank:
        step_of_fault = int(step)
        inject(fault, step_of_fault)
    want_the_interpreter_at_the_end()
    sys.argv = ["dsdistill", "train", config]
    cli.main()
