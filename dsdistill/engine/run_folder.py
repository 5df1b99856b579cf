"""The folder of a run: its resolved config, its log, its summary."""

import fcntl
import json
import logging
import os
import shutil
import time

from dsdistill import config as configs
from dsdistill.config import Config, UserError
from dsdistill.config.resume import check_same

log = logging.getLogger("dsdistill")

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
TEACHER = "teacher.txt"  # where the teacher that a recipe made lies
CHECKPOINTS = "checkpoints"
LOCK = "lock"

INIT = "init"  # the student's architecture, tokenizer and, where cut from a teacher, first weights
LAYERS = "layers.json"  # the pairs that cka_offline found
MAPS = "domain_maps.safetensors"  # of the teacher's states
SAMPLING = "sampling.npy"  # what the teacher says of the train examples
STAGES = "stages"  # what each hands on
REPRESENTATIONS = "representations"  # of the dev set, on the way
KEPT = (INIT, LAYERS, MAPS, SAMPLING, STAGES, REPRESENTATIONS)  # all that a resumed run does not make again

_held: dict[str, object] = {}  # open lock files of this process, by folder


class RunFolder:
    """Written by rank 0 alone; read by all."""

    def __init__(self, path: str):
        self.path = path
        self.tag: str | None = None  # of the checkpoint to go on from or to evaluate, on rank 0

    def __truediv__(self, name: str) -> str:
        return os.path.join(self.path, name)

    def open(self, config: Config) -> None:
        """Make the folder, or check that what lies there is an earlier part of this run; write the config.

        A start that failed before its first checkpoint binds nobody: its config is replaced, and what it prepared, of
        another teacher or other data perhaps, is made again.
        """
        self.claim()
        if not self.begun:
            for name in KEPT if os.path.exists(self / CONFIG) else ():  # else they are somebody else's
                _remove(self / name)
        elif os.path.exists(self / CONFIG):
            if config.run.resume == "never":
                raise UserError(
                    "run.dir", f"{self.path}, which holds a run", "an unused folder, or run.resume=auto"
                )
            check_same(self / CONFIG, config)
        partial = self / (CONFIG + ".partial")
        with open(partial, "w", encoding="utf-8") as file:
            file.write(configs.dump(config))
        os.replace(partial, self / CONFIG)

    def claim(self) -> None:
        """Take the folder for this process; raise UserError where it cannot be written, or another process has it."""
        check_writable(self.path)
        if not self.lock():
            raise UserError(
                "run.dir", f"{self.path}, which another process is writing", "a folder that no other has"
            )

    def lock(self) -> bool:
        """Take the folder for this process, until it ends however it ends; False where another has it."""
        if self.path in _held:
            return True
        os.makedirs(self.path, exist_ok=True)
        file = open(self / LOCK, "w")  # noqa: SIM115  closing it would give the lock back
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        _held[self.path] = file
        return True

    def release(self) -> None:
        """Give the folder back before this process ends."""
        _held.pop(self.path).close()

    def wait(self, made: str) -> None:
        """Return once `made` is there, or take the folder once no other process has it."""
        told = False
        while not os.path.isdir(made) and not self.lock():
            if not told:
                log.info("waiting for the process that writes %s", self.path)
                told = True
            time.sleep(1)

    @property
    def begun(self) -> bool:
        """Whether there is something to lose: a checkpoint or a summary."""
        saved = self / CHECKPOINTS
        return os.path.exists(self / SUMMARY) or (os.path.isdir(saved) and bool(os.listdir(saved)))

    def pin_teacher(self, path: str) -> None:
        """Note which teacher this run learns from; raise UserError where it began with another."""
        note = self / TEACHER
        if self.begun and os.path.exists(note):
            with open(note, encoding="utf-8") as file:
                before = file.read().strip()
            if before != path:
                raise UserError(
                    "teacher.recipe",
                    f"a recipe or data that now makes {path}",
                    f"{before}, as this run began",
                )
            return
        with open(note, "w", encoding="utf-8") as file:
            file.write(path + "\n")

    def summary(self) -> dict | None:
        """The summary of a finished run, or None."""
        try:
            with open(self / SUMMARY, encoding="utf-8") as file:
                return json.load(file)
        except (OSError, ValueError):
            return None

    def write_summary(self, summary: dict) -> None:
        partial = self / (SUMMARY + ".partial")
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(summary, file, indent=2)
            file.write("\n")
        os.replace(partial, self / SUMMARY)

    def log(self, record: dict) -> None:
        """Append one line to metrics.jsonl."""
        with open(self / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def rewind(self, step: int) -> None:
        """Drop lines of steps after `step`: a resumed run computes them again."""
        if not os.path.exists(self / METRICS):
            return
        kept = []
        with open(self / METRICS, encoding="utf-8") as file:
            for line in file:
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except ValueError:  # the line that a kill cut short
                    continue
        partial = self / (METRICS + ".partial")
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(kept)
        os.replace(partial, self / METRICS)


def _remove(path: str) -> None:
    """A file or a folder, where there is one."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)


def check_writable(folder: str, key: str = "run.dir") -> None:
    """Raise UserError unless a folder could be written there; makes nothing: what is refused leaves nothing behind."""
    place = os.path.abspath(folder)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise UserError(key, f"{folder} ({place} is no folder)", "a folder that can be written")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(key, f"{folder} ({place} is read-only)", "a folder that can be written")


def check_file(path: str | None, key: str) -> None:
    """Raise UserError unless a file could be written there; makes nothing."""
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        raise UserError(key, f"{path}, which is a folder", "a file to be written")
    if not os.path.isdir(folder):
        raise UserError(key, f"{path} ({folder} is no folder)", "a file in a folder that is there")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UserError(key, f"{path}, which is read-only", "a file that can be written")
