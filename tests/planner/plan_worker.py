"""Train by several configs, one after the other, and write how far each raised this process's resident memory.

deepspeed --num_gpus 2 plan_worker.py WARM.yaml CONFIG.yaml ... OUT.json

The first config has models too small to count; it makes the process import everything.
"""

import gc
import json
import re
import sys
from pathlib import Path

from dsdistill.config import load
from dsdistill.distributed import deepspeed
from dsdistill.distributed.leave import leave
from dsdistill.engine.run import run


def resident(what: str) -> int:
    """Return bytes: VmRSS now, and the maximum VmHWM since the last `forget`."""
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def forget() -> None:
    """Reset VmHWM (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    *configs, out = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    ranks = deepspeed.start()
    try:
        peaks = []
        for path in configs:
            gc.collect()
            before = resident("VmRSS")
            forget()
            run(load([path]), ranks)
            peaks.append(resident("VmHWM") - before)
        everyone = ranks.gather(peaks[1:])
        if ranks.first:
            Path(out).write_text(json.dumps(everyone))
        ranks.barrier()
    finally:
        deepspeed.stop()
    leave()
