"""Run configs one after the other in one set of ranks, and note how each went: done, or the line of its refusal.

deepspeed --num_gpus 2 family_worker.py CONFIG.yaml ...
"""

import logging
import sys
from pathlib import Path

from dsdistill.config import UserError, load
from dsdistill.distributed import deepspeed
from dsdistill.distributed.leave import leave
from dsdistill.engine.run import run


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    paths = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    ranks = deepspeed.start(10.0)
    for path in paths:
        try:
            run(load([path]), ranks)
            verdict = "done"
        except UserError as error:  # every rank raises it, before anything is shared
            verdict = str(error)
        if ranks.first:
            Path(path).with_suffix(".verdict").write_text(verdict)
    deepspeed.stop()
    leave()


if __name__ == "__main__":
    main()
