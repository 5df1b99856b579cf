"""Measure how stable a run is: how far its representations of the dev set change between points in training.

These points, `evaluation.rcs` of them, are what the papers call stages; they are not the stages of a config.
"""

import os

import numpy as np
from torch import Tensor

from dsdistill import disk
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.run_folder import REPRESENTATIONS
from dsdistill.evaluation.structure import change
from dsdistill.report.summary import metric


def points(count: int, steps: int) -> list[int]:
    """Return the steps after which representations are kept: `count`, evenly spaced, the last at the run's end."""
    return sorted({max(1, round(steps * (index + 1) / count)) for index in range(count)})


def keep(run_dir: str, step: int, states: Tensor, ranks: Ranks) -> None:
    """Write the (examples, D) states of a step."""
    with ranks.first_alone():
        if ranks.first:
            with disk.writing(_path(run_dir, step), binary=True) as file:
                np.save(file, states.numpy())


def kept(run_dir: str, until: int) -> list[np.ndarray]:
    """Return what keep() wrote up to this step, in order."""
    folder = os.path.join(run_dir, REPRESENTATIONS)
    names = (
        sorted(name for name in os.listdir(folder) if name.startswith("step-"))
        if os.path.isdir(folder)
        else []
    )
    return [
        np.load(os.path.join(folder, name)) for name in names if name <= os.path.basename(_path("", until))
    ]


def stability(scores: dict[str, float], run_dir: str, step: int) -> dict[str, float]:
    """Return RCS and 1 − debiased CKA between the points up to `step`; nothing if fewer than two were kept.

    A model that never changes has an RCS of 0, the best value. So both are left out unless `scores` also shows how near
    the student is to its teacher (the KL, or teacher_spearman for vectors).
    """
    states = kept(run_dir, step)
    if len(states) < 2 or not {"kl", "teacher_spearman"} & set(map(metric, scores)):
        return {}
    moved = change(states)
    return {"rcs": moved.rcs, "cka_distance": moved.cka_distance}


def _path(run_dir: str, step: int) -> str:
    return os.path.join(run_dir, REPRESENTATIONS, f"step-{step:08d}.npy")
