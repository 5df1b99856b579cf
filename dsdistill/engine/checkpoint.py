"""Checkpoints that survive a kill at any moment.

RUN/checkpoints/step-N/ holds what DeepSpeed saved, each rank's random state and a manifest of every file's size
and hash, taken while each rank writes its own; what a file would run when it is loaded is looked up before.
RUN/checkpoints/newest names the folder to resume from. DeepSpeed's own `latest` is not used: it can point at a
checkpoint that was still being written. Here the manifest is written after all ranks are done, and the pointer moves
only then, atomically; where what it names does not verify, resuming falls back to the newest checkpoint that does.
"""

import contextlib
import glob
import importlib.metadata
import json
import logging
import math
import os
import re
import stat
from collections.abc import Iterator

import numpy as np
import torch

from dsdistill import __version__, disk
from dsdistill.config import Config, SharedError, UserError
from dsdistill.config.embedding_checks import relates
from dsdistill.distributed import deepspeed
from dsdistill.distributed.ranks import Ranks
from dsdistill.distributed.writer import fingerprint
from dsdistill.engine.run_folder import CHECKPOINTS as FOLDER

log = logging.getLogger("dsdistill")

_MANIFEST = "manifest.json"
_STATE = "state.json"
_POINTER = "newest"
_STEP = re.compile(r"step-(\d+)")
_OFFLOADED = "offloaded_tensors/rank{:02d}"  # DeepSpeed's own copy of what a rank has offloaded to NVMe
# What a checkpoint's folder may hold of ours, by patterns.
MADE = (
    "*_optim_states.pt", "*_model_states.pt", "random-*.pt", deepspeed.FROZEN, _STATE, _MANIFEST,
    ".partial-*", "*.partial", "offloaded_tensors/*",
)  # fmt: skip
_LIMIT = 2**24  # bytes of a state or a manifest
_VERSIONS = ("torch", "deepspeed", "transformers")


class Unsaved(SharedError):
    """A checkpoint could not be saved; those of before are whole."""


class Saving:
    """A Saving is a checkpoint that is on its way; until finish() the one before counts."""

    def __init__(self, engine, run_dir: str, step: int, state: dict, ranks: Ranks):
        """Take a checkpoint of an engine whose checkpoint_engine is a Writer; arguments are those of begin()."""
        self.engine, self.writer, self.ranks, self.step = engine, engine.checkpoint_engine, ranks, step
        self.folder, self.tag = os.path.join(run_dir, FOLDER), tag_of(step)
        self.target = os.path.join(self.folder, self.tag)
        everything = state | {"step": step, "world_size": ranks.world_size, "versions": versions()}
        self.state = json.dumps(everything)  # as it is now

    def begin(self, later: bool, frozen: dict[str, torch.Tensor]) -> None:
        """Hand all that a resume needs to the Writer."""
        self.writer.begin(later)
        with _together(self.target, self.ranks):
            if self.ranks.first:
                _remove(self.target)  # what a killed run left half-written
                os.makedirs(self.target)
        with _together(self.target, self.ranks):
            self.engine.save_checkpoint(
                self.folder, tag=self.tag, save_latest=False, exclude_frozen_parameters=False
            )
            self.writer.save(random_state(), os.path.join(self.target, f"random-{self.ranks.rank}.pt"))
            if frozen:
                self.writer.save(frozen, os.path.join(self.target, deepspeed.FROZEN))
            for path in glob.glob(
                os.path.join(glob.escape(self.target), _OFFLOADED.format(self.ranks.rank), "**"),
                recursive=True,
            ):
                if os.path.isfile(path):
                    self.writer.add(path)

    @property
    def written(self) -> bool:
        """Return whether this rank's files are; finish() then waits for other ranks at most."""
        return self.writer.written

    def finish(self, keep: int) -> None:
        """Wait for all files of all ranks, then make this the checkpoint to go on from, and remove those beyond `keep`.

        Raises Unsaved, on every rank, where a file of any rank could not be written: the checkpoints of before are
        whole.
        """
        with _together(self.target, self.ranks):
            self.writer.commit()
        manifest = {}
        for prints in self.ranks.gather(self.writer.prints(self.target)):
            manifest |= prints
        with _together(self.target, self.ranks):
            if self.ranks.first:
                _write_whole(self.folder, self.tag, self.state, manifest)
        if self.ranks.first:
            there = _tags(self.folder)
            kept = sorted(name for name in there if name <= self.tag)[-keep:]  # later ones were passed over
            for old in sorted(set(there) - set(kept)):
                try:
                    _remove(os.path.join(self.folder, old))
                except OSError as error:  # NFS keeps what another process has open; the next save tries again
                    log.warning("checkpoint %s stays: %s", old, error)
        self.ranks.barrier()


def begin(
    engine,
    run_dir: str,
    step: int,
    state: dict,
    ranks: Ranks,
    *,
    later: bool = False,
    frozen: dict[str, torch.Tensor] | None = None,
) -> Saving:
    """Begin to save the engine, each rank's random state and `state` (plain JSON) as the checkpoint of `step`.

    state: among it zero_stage, the student's, and at_once, the examples of all ranks that meet in a micro-batch.
    later: what is saved is copied to the host, and written by a thread while training goes on; only one at a time.
    frozen: weights that do not train and that the engine has rounded, by name, as they were before; of rank 0.

    Raises Unsaved, on every rank, where the folder cannot be made or written: the checkpoints of before are whole.
    """
    saving = Saving(engine, run_dir, step, state, ranks)
    saving.begin(later, frozen or {})
    return saving


def _write_whole(folder: str, tag: str, state: str, manifest: dict[str, dict]) -> None:
    """Write what makes a saved checkpoint one to go on from: its state, its manifest, the pointer to it.

    manifest: of what its ranks have written through to the disk. A power cut after the pointer has moved must find
    all of it whole.
    """
    target = os.path.join(folder, tag)
    _write(os.path.join(target, _STATE), state)
    for name in sorted(set(_files(target)) - set(manifest)):
        disk.sync(os.path.join(target, name))
        manifest[name] = fingerprint(os.path.join(target, name))
    disk.sync(target)
    _write(os.path.join(target, _MANIFEST), json.dumps(manifest, sort_keys=True))
    _write(os.path.join(folder, _POINTER), tag)


@contextlib.contextmanager
def _together(target: str, ranks: Ranks) -> Iterator[None]:
    """Let the ranks learn from each other whether all of them came through; where one did not, none goes on.

    The reason is found while the files that were too large still lie there; then rank 0 removes them.
    """
    failure = None
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save tells of a full disk by a RuntimeError
        if deepspeed.timed_out(error) or deepspeed.lost(error):
            raise
        there = target if os.path.isdir(target) else os.path.dirname(target)
        failure = "the disk is full" if disk.full(error, there) else disk.reason(error)
    failures = [reason for reason in ranks.gather(failure) if reason is not None]
    if not failures:
        return
    if ranks.first:
        with contextlib.suppress(OSError):
            _remove(target)
    ranks.barrier()
    raise Unsaved(f"no checkpoint could be saved in {os.path.dirname(target)}: {failures[0]}")


def _remove(target: str) -> None:
    """Remove a checkpoint: what save() writes, and what its manifest names; OSError where it holds something else."""
    try:
        named = _read(os.path.join(target, _MANIFEST))
    except (OSError, ValueError, RecursionError):
        named = ()
    disk.remove(target, [*MADE, *(glob.escape(name) for name in named if isinstance(name, str))])


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
        manifest = _read(os.path.join(folder, _MANIFEST))
    except (OSError, ValueError, RecursionError):
        return "no complete manifest (the save was interrupted)"
    if not isinstance(manifest, dict) or _STATE not in manifest:
        return "a manifest that save() did not write"
    for name, expected in manifest.items():
        path = os.path.join(folder, name)
        size = expected.get("size") if isinstance(expected, dict) else None
        if not name or os.path.isabs(name) or ".." in name.split(os.sep) or "\0" in name:
            return f"a manifest that names {name!r}"
        try:
            there = os.lstat(path)
            if not stat.S_ISREG(there.st_mode):
                return f"{name} is no plain file"
            if there.st_size != size or fingerprint(path) != expected:
                return f"{name} has changed"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if name.endswith(".pt") and (reason := deepspeed.foreign(path)):
            return f"{name} {reason}"
    added = [name for name in _files(folder) if name.endswith(".pt") and name not in manifest]
    if added:
        return f"{added[0]} was not saved with it"
    return _odd_state(folder)


# What a run writes into state.json, by the least value that it can have.
_COUNTS = {"stage": 0, "zero_stage": 1, "at_once": 1, "tokens": 0, "counted": 0, "world_size": 1, "step": 1}


def _odd_state(folder: str) -> str | None:
    """Return why a state.json, whose hash is right, is none that a run writes, or None."""
    try:
        state = _read(os.path.join(folder, _STATE))
    except (OSError, ValueError, RecursionError):
        return f"{_STATE} is no JSON"
    if not isinstance(state, dict):
        return f"{_STATE} is no mapping"
    for name, least in _COUNTS.items():
        value = state.get(name)
        if type(value) is not int or value < least:
            return f"{_STATE} has {name} {value!r}"
    for name in ("seconds", "losses"):
        value = state.get(name)
        if type(value) not in (int, float) or not math.isfinite(value):
            return f"{_STATE} has {name} {value!r}"
    if tag_of(state["step"]) != os.path.basename(folder):
        return f"{_STATE} has step {state['step']}"
    if not isinstance(state.get("objective"), dict):
        return f"{_STATE} has objective {state.get('objective')!r}"
    return None


def check(run_dir: str, config: Config, world_size: int) -> str | None:
    """Tag of the checkpoint that a run goes on from; None before its first.

    Raises UserError where there were some and none verifies, or where a term relates the examples that meet and fewer
    or more would meet than before.
    """
    folder, tag = os.path.join(run_dir, FOLDER), newest(run_dir)
    if tag is not None:
        _check_stage(run_dir, tag, config)
        _check_relations(run_dir, tag, config, world_size)
        tell_versions(read_state(run_dir, tag), tag)
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
    """Return the state of a checkpoint that verifies."""
    return _read(os.path.join(run_dir, FOLDER, tag, _STATE))


def _read(path: str):
    """Return the JSON in a plain file; raise OSError or ValueError for anything else, at once."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, encoding="utf-8") as file:
        there = os.fstat(descriptor)
        if not stat.S_ISREG(there.st_mode) or there.st_size > _LIMIT:
            raise ValueError(f"{path} is no file that save() writes")
        return json.load(file)


def versions() -> dict[str, str]:
    """Return what a checkpoint is saved with, by package."""
    return {"dsdistill": __version__} | {name: importlib.metadata.version(name) for name in _VERSIONS}


def tell_versions(state: dict, tag: str) -> None:
    """Warn once, naming each package, where a checkpoint was saved with other versions than those that run now."""
    before, now = state.get("versions"), versions()
    if not isinstance(before, dict):  # a checkpoint of before versions were noted
        return
    other = [f"{name} {before.get(name)} (now {now[name]})" for name in now if before.get(name) != now[name]]
    if other:
        log.warning("%s was saved with %s: losses may differ in their last digits", tag, ", ".join(other))


def _check_stage(run_dir: str, tag: str, config: Config) -> None:
    stage, stages = read_state(run_dir, tag)["stage"], len(config.run_stages)
    if stage >= stages:
        raise UserError(f"{run_dir}, {tag}: stage", stage, f"0 to {stages - 1}, as the config has stages")


def _check_relations(run_dir: str, tag: str, config: Config, world_size: int) -> None:
    at_once = config.train.micro_batch_size * world_size
    terms = [item for stage in config.run_stages for item in stage.terms.named().items()]
    related = [name for name, term in terms if relates(term, config.task)]
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
            tag = file.read(100).strip()
    except (OSError, ValueError):
        return []
    return [tag] if _STEP.fullmatch(tag) else []


def _tags(folder: str) -> list[str]:
    return [name for name in os.listdir(folder) if _STEP.fullmatch(name)] if os.path.isdir(folder) else []


def _files(folder: str) -> Iterator[str]:
    for base, _, names in os.walk(folder):
        for name in sorted(names):
            yield os.path.relpath(os.path.join(base, name), folder)


def _write(path: str, text: str) -> None:
    """Whole or not at all."""
    with disk.writing(path) as file:
        file.write(text)
