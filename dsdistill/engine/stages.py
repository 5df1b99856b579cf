"""The stages of a run: where each ends, and what it hands to the next.

The set of trained parameters changes only between stages: after a checkpoint, a new engine is made around the student's
weights and the weights of terms that both stages have. RUN/stages/NAME.safetensors holds these weights. The next stage
begins with them, and its `smooth` term compares the student with a frozen copy that has them.
"""

import os

from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from dsdistill import disk
from dsdistill.config import Config, UserError
from dsdistill.distributed import deepspeed, engines
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine import checkpoint
from dsdistill.engine.module import StudentModule, restore
from dsdistill.engine.run_folder import STAGES
from dsdistill.models.tracer import Tracer, callee, freeze


def ends(config: Config, steps: int) -> list[int]:
    """Return the last step of each stage, from the stages' shares of `steps`."""
    shares = [stage.share for stage in config.run_stages]
    if steps < len(shares):
        raise UserError("train.steps", steps, f"at least one for each of {len(shares)} stages")
    last_steps, before = [], 0
    for index in range(len(shares)):
        end = round(steps * sum(shares[: index + 1]) / sum(shares))
        before = min(max(end, before + 1), steps - (len(shares) - 1 - index))  # a small share gets one step
        last_steps.append(before)
    return last_steps


def weights_path(run_dir: str, name: str) -> str:
    return os.path.join(run_dir, STAGES, f"{name}.safetensors")


def hand_over(run_dir: str, name: str, step: int, ranks: Ranks) -> str:
    """Write the weights of the stage that ends with `step`, unless they are there; return the file's path."""
    path = weights_path(run_dir, name)
    with ranks.first_alone():
        if ranks.first and not os.path.exists(path):
            weights = deepspeed.whole_weights(
                os.path.join(run_dir, checkpoint.FOLDER), checkpoint.tag_of(step)
            )
            # Tied weights have several names, and the format allows no shared memory: clone each.
            with disk.replacing(path) as made:
                save_file({key: value.detach().clone() for key, value in weights.items()}, made)
    return path


def load_weights(module: StudentModule, path: str) -> None:
    """Load the previous stage's weights into a StudentModule; terms new in this stage keep their initial weights."""
    given = load_file(path)
    own = module.state_dict()
    known = {name: value for name, value in given.items() if name in own}
    needed = own.keys() - module.base
    missing = [name for name in own if name.startswith("body.") and name in needed and name not in known]
    if missing:
        raise UserError(path, f"no weight {missing[0]}", "the weights of this run's student")
    engines.fill(module, known)


def earlier_student(
    config: Config,
    architecture: PretrainedConfig,
    init: str | None,
    path: str,
    layers: frozenset[int],
    ranks: Ranks,
) -> Tracer:
    """Return the student as a stage left it: frozen, whole on every rank, without dropout.

    init: path of the student's first weights; path: that stage's weights; layers: the layers to trace.
    """
    model = restore(config, architecture, init, load_file(path), path)
    made = callee(model, config.task, "student")
    freeze(made.module, deepspeed.DTYPES[config.train.dtype], ranks.device)
    return Tracer(made, layers)
