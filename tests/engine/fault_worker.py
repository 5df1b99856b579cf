"""The command line's `train` on real ranks, with a fault at a given step.

deepspeed --num_gpus 2 fault_worker.py CONFIG.yaml FAULT RANK STEP
FAULT: hang (the rank never comes to its next collective), raise, or disk (no file can grow any more).
"""

import os
import resource
import signal
import sys
import time

from dsdistill import cli
from dsdistill.engine.train import Trainer


def inject(fault: str, step: int) -> None:
    train_step = Trainer.train_step

    def faulty(trainer, batches):
        if trainer.progress.step + 1 == step:
            print(f"fault: {fault} in process {os.getpid()}", flush=True)
            if fault == "hang":
                time.sleep(3600)
            if fault == "raise":
                raise ArithmeticError("a rank that raises")
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        return train_step(trainer, batches)

    Trainer.train_step = faulty


if __name__ == "__main__":
    config, fault, rank, step = (a for a in sys.argv[1:] if not a.startswith("--local_rank"))
    if os.environ["RANK"] == rank:
        inject(fault, int(step))
    sys.argv = ["dsdistill", "train", config]
    cli.main()
