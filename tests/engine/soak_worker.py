"""Run a config and write each rank's resident memory after every step.

deepspeed --num_gpus 2 soak_worker.py CONFIG.yaml OUT.json
"""

import json
import os
import sys

from dsdistill.config import load
from dsdistill.distributed import deepspeed
from dsdistill.distributed.leave import leave
from dsdistill.engine.run import run
from dsdistill.engine.train import Trainer

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Return the bytes that this process has in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * PAGE


if __name__ == "__main__":
    config, out = sys.argv[-2:]
    seen: list[int] = []
    step = Trainer.train_step

    def watched(self, batches, following):
        found = step(self, batches, following)
        seen.append(resident())
        return found

    Trainer.train_step = watched
    ranks = deepspeed.start()
    try:
        run(load([config]), ranks)
        everyone = ranks.gather(seen)
        if ranks.first:
            with open(out, "w", encoding="utf-8") as file:
                json.dump(everyone, file)
        ranks.barrier()
    finally:
        deepspeed.stop()
    leave()
