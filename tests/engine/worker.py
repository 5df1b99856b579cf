"""Run several configs one after the other in one set of ranks, so that the launcher starts only once.

deepspeed --num_gpus 2 worker.py CONFIG.yaml[@STEP] ...
"""

import logging
import shutil
import sys
from pathlib import Path

from dsdistill.config import load
from dsdistill.distributed import deepspeed
from dsdistill.distributed.leave import leave
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine import checkpoint
from dsdistill.engine.run import run


def take_back(run_dir: Path, step: int) -> None:
    """Leave a run as a kill after that step's checkpoint would leave it."""
    (run_dir / "summary.json").unlink()
    (run_dir / checkpoint.FOLDER / "newest").write_text(checkpoint.tag_of(step))
    for path in (run_dir / checkpoint.FOLDER).glob("step-*"):
        if path.name > checkpoint.tag_of(step):
            shutil.rmtree(path)


def run_all(configs: list[str], ranks: Ranks) -> None:
    for path, _, step in (config.partition("@") for config in configs):
        config = load([path])
        with ranks.first_alone():
            if step and ranks.first:
                take_back(Path(config.run_dir), int(step))
        run(config, ranks)
    if ranks.first:
        print("all configs done", flush=True)


def start() -> tuple[list[str], Ranks]:
    """Arguments of the command line but the launcher's, and the ranks."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("dsdistill").setLevel(logging.INFO)
    return [
        argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")
    ], deepspeed.start()


if __name__ == "__main__":
    configs, ranks = start()
    try:
        run_all(configs, ranks)
    finally:
        deepspeed.stop()
    leave()
