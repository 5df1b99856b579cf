"""Run with a folder as the hub: deepspeed streamed_worker.py HUB [CONFIG.yaml[@STEP] | evaluate:RUN] ..."""

import datasets

from dsdistill.data import streamed
from dsdistill.distributed.leave import leave
from dsdistill.engine.evaluate import evaluate_run
from tests.data.test_streamed import local
from tests.engine.worker import deepspeed, run_all, start

if __name__ == "__main__":
    (home, *whats), ranks = start()
    datasets.load_dataset = local(home)
    streamed.CHARACTERS, streamed.LEAST, streamed.POLL = 500, 50, 0.02
    try:
        run_all([what for what in whats if not what.startswith("evaluate:")], ranks)
    finally:
        deepspeed.stop()
    for what in whats:
        if what.startswith("evaluate:"):
            evaluate_run(what.removeprefix("evaluate:"))
    leave()
