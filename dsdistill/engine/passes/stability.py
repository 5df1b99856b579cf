"""Representations of the dev set that a run keeps on its way, for the representation consistency score."""

import os

import numpy as np
from torch import Tensor

from dsdistill import disk
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.run_folder import REPRESENTATIONS


def points(count: int, steps: int) -> list[int]:
    """The steps after which representations are kept: `count`, evenly spread, the last the run's end."""
    return sorted({max(1, round(steps * (index + 1) / count)) for index in range(count)})


def keep(run_dir: str, step: int, states: Tensor, ranks: Ranks) -> None:
    """Write the (examples, D) states of a step."""
    with ranks.first_alone():
        if ranks.first:
            with disk.writing(_path(run_dir, step), binary=True) as file:
                np.save(file, states.numpy())


def kept(run_dir: str, until: int) -> list[np.ndarray]:
    """What keep() wrote up to this step, in order."""
    folder = os.path.join(run_dir, REPRESENTATIONS)
    names = (
        sorted(name for name in os.listdir(folder) if name.startswith("step-"))
        if os.path.isdir(folder)
        else []
    )
    return [
        np.load(os.path.join(folder, name)) for name in names if name <= os.path.basename(_path("", until))
    ]


def _path(run_dir: str, step: int) -> str:
    return os.path.join(run_dir, REPRESENTATIONS, f"step-{step:08d}.npy")
