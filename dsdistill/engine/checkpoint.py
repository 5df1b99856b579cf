"""Checkpoints that survive a kill at any moment.

RUN/checkpoints/step-N/ holds what DeepSpeed saved, each rank's random state and a manifest of every file's size
and hash; what a file would run when it is loaded is looked up before. RUN/checkpoints/newest names the folder to
resume from. DeepSpeed's own `latest` is not used: it can point at a checkpoint that was still being written. Here
the manifest is written after all ranks are done, and the pointer moves only then, atomically; where what it names
does not verify, resuming falls back to the newest checkpoint that does.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator

import numpy as np
import torch

from dsdistill.config import Config, UserError
from dsdistill.engine import deepspeed
from dsdistill.engine.ranks import Ranks
from dsdistill.engine.run_folder import CHECKPOINTS as FOLDER

log = logging.getLogger("dsdistill")

_MANIFEST = "manifest.json"
_STATE = "state.json"
_POINTER = "newest"
_STEP = re.compile(r"step-(\d+)")


def save(engine, run_dir: str, step: int, state: dict, ranks: Ranks, keep: int) -> None:
    """Save the engine, each rank's random state and `state` (plain JSON) as the checkpoint of `step`.

    state: among it zero_stage, the student's, and at_once, the examples of all ranks that meet in a micro-batch.
    """
    folder = os.path.join(run_dir, FOLDER)
    tag = tag_of(step)
    target = os.path.join(folder, tag)
    if ranks.first:
        shutil.rmtree(target, ignore_errors=True)  # what a killed run left half-written
        os.makedirs(target)
    ranks.barrier()
    engine.save_checkpoint(folder, tag=tag, save_latest=False, exclude_frozen_parameters=False)
    torch.save(random_state(), os.path.join(target, f"random-{ranks.rank}.pt"))
    ranks.barrier()
    if ranks.first:
        _write(
            os.path.join(target, _STATE),
            json.dumps(state | {"step": step, "world_size": ranks.world_size}),
        )
        manifest = {name: _fingerprint(os.path.join(target, name)) for name in _files(target)}
        _write(os.path.join(target, _MANIFEST), json.dumps(manifest))
        _write(os.path.join(folder, _POINTER), tag)
        kept = sorted(name for name in _tags(folder) if name <= tag)[-keep:]  # later ones were passed over
        for old in sorted(set(_tags(folder)) - set(kept)):
            try:
                shutil.rmtree(os.path.join(folder, old))
            except OSError as error:  # NFS keeps what another process has open; the next save tries again
                log.warning("checkpoint %s stays: %s", old, error)
    ranks.barrier()


def tag_of(step: int) -> str:
    return f"step-{step:08d}"


def newest(run_dir: str) -> str | None:
    """Tag of the newest checkpoint that verifies, or None; says so when it had to pass one over."""
    folder = os.path.join(run_dir, FOLDER)
    pointed = _pointed(folder)
    for tag in _candidates(folder):
        reason = damage(os.path.join(folder, tag))
        if reason is None:
            return tag
        if _pointed(folder) != pointed:  # a run that trains saved another meanwhile and removed this one
            return newest(run_dir)
        log.warning("checkpoint %s is passed over: %s", tag, reason)
    return None


def damage(folder: str) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        with open(os.path.join(folder, _MANIFEST), encoding="utf-8") as file:
            manifest = json.load(file)
    except (OSError, ValueError):
        return "no complete manifest (the save was interrupted)"
    if not isinstance(manifest, dict) or _STATE not in manifest:
        return "a manifest that save() did not write"
    for name, expected in manifest.items():
        path = os.path.join(folder, name)
        size = expected.get("size") if isinstance(expected, dict) else None
        try:
            if os.path.getsize(path) != size or _fingerprint(path) != expected:
                return f"{name} has changed"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if name.endswith(".pt") and (reason := deepspeed.foreign(path)):
            return f"{name} {reason}"
    added = [name for name in _files(folder) if name.endswith(".pt") and name not in manifest]
    return f"{added[0]} was not saved with it" if added else None


def check(run_dir: str, config: Config, world_size: int) -> str | None:
    """Tag of the checkpoint that a run goes on from; None before its first.

    Raises UserError where there were some and none verifies, or where a term relates the examples that meet and fewer
    or more would meet than before.
    """
    folder, tag = os.path.join(run_dir, FOLDER), newest(run_dir)
    if tag is not None:
        _check_relations(run_dir, tag, config, world_size)
        return tag
    # A save that was interrupted before any was whole leaves neither of these, and costs nothing.
    if _pointed(folder) or any(
        os.path.isfile(os.path.join(folder, name, _MANIFEST)) for name in _tags(folder)
    ):
        latest = _candidates(folder)[0]
        raise UserError(
            folder,
            f"no checkpoint that verifies ({latest}: {damage(os.path.join(folder, latest))})",
            f"a whole one: put it back, or remove {run_dir} to begin anew, or take another run.dir",
        )
    return None


def load(engine, run_dir: str, tag: str, ranks: Ranks, zero_stage: int, seed: int) -> dict:
    """Restore the engine and this rank's random state; returns the saved `state`.

    By as many ranks and in the ZeRO stage that saved it a run goes on exactly; by others up to rounding, and what
    chance draws in training (dropout) is drawn anew where the ranks are others.
    """
    folder, state = os.path.join(run_dir, FOLDER), read_state(run_dir, tag)
    same_ranks = state["world_size"] == ranks.world_size
    if same_ranks and state["zero_stage"] == zero_stage:
        deepspeed.load_same(engine, folder, tag)
    else:
        log.info(
            "%s was saved by %d rank(s) in ZeRO stage %d; this run goes on with %d in stage %d",
            *(tag, state["world_size"], state["zero_stage"], ranks.world_size, zero_stage),
        )
        deepspeed.load_reshaped(engine, os.path.join(folder, tag))
    if same_ranks:
        set_random_state(torch.load(os.path.join(folder, tag, f"random-{ranks.rank}.pt"), weights_only=True))
    else:
        drawn = np.random.SeedSequence([seed, state["step"], ranks.world_size, ranks.rank])
        torch.manual_seed(int(drawn.generate_state(1, np.uint64)[0]))
    return state


def read_state(run_dir: str, tag: str) -> dict:
    with open(os.path.join(run_dir, FOLDER, tag, _STATE), encoding="utf-8") as file:
        return json.load(file)


def _check_relations(run_dir: str, tag: str, config: Config, world_size: int) -> None:
    at_once = config.train.micro_batch_size * world_size
    related = [name for stage in config.parts for name, term in stage.terms.named().items() if term.relates]
    before = read_state(run_dir, tag)["at_once"]
    if related and before != at_once:
        raise UserError(
            f"{run_dir}, {tag}: train.micro_batch_size × ranks",
            at_once,
            f"{before}, as it was saved with: terms.{related[0]} relates the examples that meet",
        )


def random_state() -> dict[str, torch.Tensor]:
    """State of the generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _candidates(folder: str) -> list[str]:
    """Tags in the order in which to try them."""
    return list(dict.fromkeys([*_pointed(folder), *sorted(_tags(folder), reverse=True)]))


def _pointed(folder: str) -> list[str]:
    """The tag that the pointer names, where there is one."""
    try:
        with open(os.path.join(folder, _POINTER), encoding="utf-8") as file:
            tag = file.read().strip()
    except (OSError, ValueError):
        return []
    return [tag] if _STEP.fullmatch(tag) else []


def _tags(folder: str) -> list[str]:
    return [name for name in os.listdir(folder) if _STEP.fullmatch(name)] if os.path.isdir(folder) else []


def _files(folder: str) -> Iterator[str]:
    for base, _, names in os.walk(folder):
        for name in sorted(names):
            yield os.path.relpath(os.path.join(base, name), folder)


def _fingerprint(path: str) -> dict:
    with open(path, "rb") as file:
        return {"size": os.path.getsize(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write(path: str, text: str) -> None:
    """Whole or not at all."""
    partial = path + ".partial"
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
