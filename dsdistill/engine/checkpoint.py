"""Save and load checkpoints that survive a kill at any moment.

RUN/checkpoints/step-N/ holds what DeepSpeed saved, each rank's random state and a manifest of every file's size
and hash. Each rank computes size and hash while it writes its files. A file is searched for code before it is
unpickled. RUN/checkpoints/newest is a pointer: it names the folder to resume from. DeepSpeed's own `latest` is not
used, because it can name a checkpoint that was still being written. Here the manifest is written after all ranks are
done; then the pointer moves, atomically. If its checkpoint does not verify, a run resumes from the newest that does.
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
# Patterns of the files that a run writes into a checkpoint's folder.
MADE = (
    "*_optim_states.pt", "*_model_states.pt", "random-*.pt", deepspeed.FROZEN, _STATE, _MANIFEST,
    ".partial-*", "*.partial", "offloaded_tensors/*",
)  # fmt: skip
_LIMIT = 2**24  # bytes of a state or a manifest
_VERSIONS = ("torch", "deepspeed", "transformers")


class Unsaved(SharedError):
    """A checkpoint could not be saved; earlier ones are whole."""


class Saving:
    """A Saving is a checkpoint that is being written; until finish() is done, a resume uses the one before it."""

    def __init__(self, engine, run_dir: str, step: int, state: dict, ranks: Ranks):
        """Prepare to save an engine whose checkpoint_engine is a Writer; the arguments are those of begin()."""
        self.engine, self.writer, self.ranks, self.step = engine, engine.checkpoint_engine, ranks, step
        self.folder, self.tag = os.path.join(run_dir, FOLDER), tag_of(step)
        self.target = os.path.join(self.folder, self.tag)
        everything = state | {"step": step, "world_size": ranks.world_size, "versions": versions()}
        self.state = json.dumps(everything)  # serialised now, since training may change it before finish()

    def begin(self, later: bool, frozen: dict[str, torch.Tensor]) -> None:
        """Hand all that a resume needs to the Writer."""
        self.writer.begin(later)
        with _together(self.target, self.ranks):
            if self.ranks.first:
                _remove(self.target)  # what a killed run left half-written
                os.makedirs(self.target)
        with _together(self.target, self.ranks):
            self.engine.save_checkpoint(self.folder, tag=self.tag, save_latest=False)
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
        """Return whether this rank's files are written; finish() then waits only for other ranks."""
        return self.writer.written

    def finish(self, keep: int) -> None:
        """Wait for the files of all ranks, make this the checkpoint to resume from, and keep only the newest `keep`.

        Raises Unsaved, on every rank, if a file of any rank could not be written. Earlier checkpoints are whole.
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
            kept = sorted(name for name in there if name <= self.tag)[-keep:]  # later ones did not verify
            for old in sorted(set(there) - set(kept)):
                try:
                    _remove(os.path.join(self.folder, old))
                except OSError as error:  # NFS keeps what another process has open; the next save tries again
                    log.warning("checkpoint %s could not be removed: %s", old, error)
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

    state: includes the student's zero_stage, and at_once, the examples of all ranks in one micro-batch.
    later: copy to host memory, and let a thread write the copy while training goes on; only one checkpoint at a time.
    frozen: on rank 0, by name, the weights that do not train, as they were before the engine rounded them. The weights
        below a student's adapters are left out.

    Raises Unsaved, on every rank, if the folder cannot be made or written. Earlier checkpoints are whole.
    """
    saving = Saving(engine, run_dir, step, state, ranks)
    saving.begin(later, frozen or {})
    return saving


def _write_whole(folder: str, tag: str, state: str, manifest: dict[str, dict]) -> None:
    """Write the files that make a saved checkpoint the one to resume from: its state, its manifest and the pointer.

    manifest: lists the files that the ranks have synced to the disk. After a power cut that follows the pointer's
    move, all of them must be whole.
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
    """Raise Unsaved on every rank if the body failed on any rank.

    Each rank finds its reason before rank 0 removes the files, since their removal frees the disk.
    """
    failure = None
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
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
    """Remove a checkpoint: the files that a run writes and those in its manifest; raise OSError if it holds others."""
    try:
        named = _read(os.path.join(target, _MANIFEST))
    except (OSError, ValueError, RecursionError):
        named = ()
    disk.remove(target, [*MADE, *(glob.escape(name) for name in named if isinstance(name, str))])


def tag_of(step: int) -> str:
    return f"step-{step:08d}"


def newest(run_dir: str) -> str | None:
    """Return the tag of the newest checkpoint that verifies, or None; log each one that is passed over."""
    folder = os.path.join(run_dir, FOLDER)
    pointed = _pointed(folder)
    for tag in _candidates(folder):
        reason = damage(os.path.join(folder, tag))
        if reason is None:
            return tag
        if _pointed(folder) != pointed:  # a run in training has meanwhile saved another and removed this one
            return newest(run_dir)
        log.warning("checkpoint %s cannot be used: %s", tag, reason)
    return None


def damage(folder: str) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
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


# The counts that a run writes into state.json, with the least value of each.
_COUNTS = {"stage": 0, "zero_stage": 1, "at_once": 1, "tokens": 0, "counted": 0, "world_size": 1, "step": 1}


def _odd_state(folder: str) -> str | None:
    """Return why no run can have written this state.json, although its hash is right; None if a run can."""
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
    """Return the tag of the checkpoint that a run resumes from; None if it has saved none yet.

    Raises UserError if there are checkpoints and none verifies, or if a term relates the examples of a micro-batch and
    their number has changed.
    """
    folder, tag = os.path.join(run_dir, FOLDER), newest(run_dir)
    if tag is not None:
        _check_stage(run_dir, tag, config)
        _check_relations(run_dir, tag, config, world_size)
        tell_versions(read_state(run_dir, tag), tag)
        return tag
    # A first save that was interrupted leaves neither pointer nor manifest; the run then begins again.
    if _pointed(folder) or any(
        os.path.isfile(os.path.join(folder, name, _MANIFEST)) for name in _tags(folder)
    ):
        latest = _candidates(folder)[0]
        raise UserError(
            folder,
            f"no intact checkpoint ({latest}: {damage(os.path.join(folder, latest))})",
            f"an intact one: restore it, or remove {run_dir} to start again, or choose another run.dir",
        )
    return None


def load(engine, run_dir: str, tag: str, ranks: Ranks, zero_stage: int, seed: int) -> dict:
    """Restore the engine and this rank's random state; return the saved `state`.

    With the same number of ranks and the same ZeRO stage the run continues exactly, otherwise it differs by rounding.
    With another number of ranks, dropout is drawn again.
    """
    folder, state = os.path.join(run_dir, FOLDER), read_state(run_dir, tag)
    same_ranks = state["world_size"] == ranks.world_size
    if same_ranks and state["zero_stage"] == zero_stage:
        deepspeed.load_same(engine, folder, tag)
    else:
        log.info(
            "%s was saved by %d rank(s) in ZeRO stage %d; this run continues with %d in stage %d",
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
    """Return the JSON in a plain file; raise OSError or ValueError for anything else, without waiting."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, encoding="utf-8") as file:
        there = os.fstat(descriptor)
        if not stat.S_ISREG(there.st_mode) or there.st_size > _LIMIT:
            raise ValueError(f"{path} was not written by save()")
        return json.load(file)


def check_base(run_dir: str, tag: str, digest: str | None) -> None:
    """Raise UserError if the weights below a student's adapters are not those that a checkpoint's run began with.

    digest: that of these weights as they are now; None if the student has no adapters, or if it is not known.
    """
    before = read_state(run_dir, tag).get("base")
    if digest is not None and before is not None and before != digest:
        raise UserError(
            f"{run_dir}, {tag}: weights below the adapters",
            "other contents than this run began with",
            "the same as then in RUN/init or student.path",
        )


def versions() -> dict[str, str]:
    """Return the versions that a checkpoint is saved with, by package."""
    return {"dsdistill": __version__} | {name: importlib.metadata.version(name) for name in _VERSIONS}


def tell_versions(state: dict, tag: str) -> None:
    """Warn once, naming each package, if a checkpoint was saved with versions other than those that run now."""
    before, now = state.get("versions"), versions()
    if not isinstance(before, dict):  # the checkpoint is older than the note of versions
        return
    other = [f"{name} {before.get(name)} (now {now[name]})" for name in now if before.get(name) != now[name]]
    if other:
        log.warning("%s was saved with %s; losses may differ in their last digits", tag, ", ".join(other))


def _check_stage(run_dir: str, tag: str, config: Config) -> None:
    stage, stages = read_state(run_dir, tag)["stage"], len(config.run_stages)
    if stage >= stages:
        raise UserError(f"{run_dir}, {tag}: stage", stage, f"0 to {stages - 1}, the stages of the config")


def _check_relations(run_dir: str, tag: str, config: Config, world_size: int) -> None:
    at_once = config.train.micro_batch_size * world_size
    terms = [item for stage in config.run_stages for item in stage.terms.named().items()]
    related = [name for name, term in terms if relates(term, config.task)]
    before = read_state(run_dir, tag)["at_once"]
    if related and before != at_once:
        raise UserError(
            f"{run_dir}, {tag}: train.micro_batch_size × ranks",
            at_once,
            f"{before}, as in this checkpoint: terms.{related[0]} compares the examples of a micro-batch",
        )


def random_state() -> dict[str, torch.Tensor]:
    """Return the state of the generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _candidates(folder: str) -> list[str]:
    """Return tags in the order in which to try them."""
    return list(dict.fromkeys([*_pointed(folder), *sorted(_tags(folder), reverse=True)]))


def _pointed(folder: str) -> list[str]:
    """Return the tag that the pointer names, as a list; empty without one."""
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
    """Write a file whole or not at all."""
    with disk.writing(path) as file:
        file.write(text)
