"""Runs several configs one after the other in one set of ranks: the launcher's start-up is paid once.

deepspeed --num_gpus 2 worker.py CONFIG.yaml ...
"""

import logging
import sys

from dsdistill.config import load
from dsdistill.engine import deepspeed
from dsdistill.engine.run import run

if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("dsdistill").setLevel(logging.INFO)
    ranks = deepspeed.start()
    try:
        for path in (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")):
            run(load([path]), ranks)
        if ranks.first:
            print("all configs done", flush=True)
    finally:
        deepspeed.stop()
