"""Manage the folder of a run: its marker, its lock, its resolved config, its log and its summary."""

import contextlib
import fcntl
import json
import logging
import os
import stat
import time
from typing import Any

from dsdistill import __version__, disk
from dsdistill import config as configs
from dsdistill.config import Config, RunError, UserError
from dsdistill.config.bounded import read_json
from dsdistill.config.resume import check_same
from dsdistill.data.sources import dev_sets, names, parts

log = logging.getLogger("dsdistill")

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
TEACHER = "teacher.txt"  # path of the teacher that a recipe made
SOURCES = "sources.json"  # digests of what the run is made from
CHECKPOINTS = "checkpoints"
LOCK = "lock"
MARKER = "dsdistill-run.txt"  # marks a folder whose files a run may replace and remove

INIT = "init"  # the student's architecture, tokenizer and, if cut from a teacher, first weights
LAYERS = "layers.json"  # the pairs that cka_offline found
MAPS = "domain_maps.safetensors"  # the fitted maps of the teacher's states
SAMPLING = "sampling.npy"  # the teacher's values of the train examples, for a sampler
SHARES = "shares.json"  # the shares of the sources, and the step from which they hold
STAGES = "stages"  # the weights that each stage hands on
REPRESENTATIONS = "representations"  # the states of dev examples during training
BASELINE = "baseline"  # a run of its own
MODEL = "model"  # what a recipe's run exports
BAD, SPIKES = "bad_steps.jsonl", "spikes.jsonl"  # written by Guard
GENERATED, PREDICTIONS = "generated.jsonl", "predictions.jsonl"
PLOT, PAGE = "loss.png", "report.html"
NOTES = (BAD, SPIKES, GENERATED, PREDICTIONS, PLOT, PAGE)
# What a resumed run does not make again; for folders, patterns of the files in them (`disk.remove`).
KEPT = {
    INIT: (
        "*config.json",
        "model*.safetensors*",
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab*",
        "merges.txt",
        "spiece.model",
        "*.model",
        "chat_template*",
        "additional_chat_templates/*",
    ),
    LAYERS: (),
    MAPS: (),
    SAMPLING: (),
    SHARES: (),
    STAGES: ("*.safetensors", "*.partial"),
    REPRESENTATIONS: ("step-*.npy", "partial.npy"),
}
OWN = (CONFIG, METRICS, SUMMARY, TEACHER, SOURCES, CHECKPOINTS, LOCK, MARKER, *KEPT, *NOTES, BASELINE, MODEL)
_MANIFEST, _MANIFEST_BYTES = "manifest.json", 2**24
_REDIRECTED = (".log", ".out", ".err")  # what a shell or Slurm writes into a folder before the run begins
_WAITING = 10_000  # most log lines that are kept in memory while the disk is full

_held: dict[str, "_Lock"] = {}  # the locks of this process, by folder


class RunFolder:
    """A RunFolder is the folder of a run, which only rank 0 writes and all ranks read.

    known: whether only runs make a folder at this path (a baseline, a recipe's teacher). An older folder without a
    marker then counts as a run's.
    """

    def __init__(self, path: str, known: bool = False):
        self.path, self.known = path, known
        self.tag: str | None = None  # of the checkpoint to go on from or to evaluate, on rank 0
        self._waiting: list[str] = []  # log lines that did not fit on a full disk

    def __truediv__(self, name: str) -> str:
        return os.path.join(self.path, name)

    def check(self) -> None:
        """Raise UserError unless the folder is unused or a run's, and can be written. Nothing is changed."""
        disk.check_writable(self.path)
        if not os.path.isdir(self.path):
            return
        try:
            there = sorted(os.listdir(self.path))
        except OSError as error:
            raise UserError(
                "run.dir", f"{self.path} ({error.strerror})", "a folder that can be read"
            ) from None
        check_plain(self.path)
        if self._marked or self.known or self._of_before:
            return
        used = [
            name
            for name in there
            if name != LOCK and not name.endswith(_REDIRECTED) and not disk.is_scratch(name)
        ]
        if used:
            wanted = f"a new or an empty folder, or that of a run (with {MARKER})"
            raise UserError("run.dir", f"{self.path}, which holds {', '.join(used[:5])} but no run", wanted)

    @property
    def _marked(self) -> bool:
        return os.path.isfile(self / MARKER)

    @property
    def _of_before(self) -> bool:
        """Return whether a version without markers ran here: it left a manifest, or both a summary and a config."""
        saved = self / CHECKPOINTS
        for name in sorted(os.listdir(saved)) if os.path.isdir(saved) else ():
            path = os.path.join(saved, name, _MANIFEST)
            with contextlib.suppress(UserError):
                if "state.json" in read_json(path, _MANIFEST_BYTES):
                    return True
        with contextlib.suppress(UserError):
            return self.summary() is not None and bool(configs.load_saved(self / CONFIG))
        return False

    def open(self, config: Config) -> None:
        """Make the folder, or check that it holds an earlier part of this run; write the config.

        If no checkpoint was saved, the config there is replaced, and what the earlier start prepared is made again: it
        may belong to another teacher or other data.
        """
        self.claim()
        self.agree(config)
        saved = self / CONFIG
        if not self.begun:
            for name in KEPT:
                self._forget(name)
        if not (os.path.exists(saved) and self.holds(config)) or configs.holds_secrets(saved):
            with disk.writing(saved) as file:
                file.write(configs.dump(config))

    def agree(self, config: Config) -> None:
        """Raise UserError if this config may not continue the run in the folder. Nothing is changed."""
        saved = self / CONFIG
        if not self.begun or not os.path.exists(saved):
            return
        if config.run.resume == "never":
            raise UserError(
                "run.dir", f"{self.path}, which holds a run", "an unused folder, or run.resume=auto"
            )
        check_same(saved, config)

    def holds(self, config: Config) -> bool:
        """Return whether config.yaml already holds what `dump` would write."""
        try:
            return configs.dump(configs.load_saved(self / CONFIG)) == configs.dump(config)
        except UserError:
            return False

    def _forget(self, name: str) -> None:
        """Remove what a start that failed prepared under this name."""
        if not os.path.lexists(self / name):
            return
        try:
            disk.remove(self / name, KEPT[name])
        except disk.Foreign as error:
            raise UserError("run.dir", f"{self / name} ({error.strerror})", "another folder") from None
        log.info("removed %s, which a failed start has left", self / name)

    def claim(self) -> None:
        """Lock and mark the folder, and remove scratch files; raise UserError if it is not a run's, or is locked."""
        self.check()
        if not self.lock():
            raise UserError(
                "run.dir",
                f"{self.path}, which another process is writing",
                "a folder that no other process uses",
            )
        if not self._marked:
            with disk.writing(self / MARKER) as file:
                file.write(
                    f"dsdistill {__version__} keeps a run in this folder: it replaces and removes its own files.\n"
                )
        disk.sweep(self.path, OWN)  # only ours: an export into this folder may have a scratch folder here too
        for name in (CHECKPOINTS, STAGES, REPRESENTATIONS):
            disk.sweep(self / name)

    def lock(self) -> bool:
        """Lock the folder until this process ends, however it ends; return False if another process has it."""
        home = os.path.realpath(self.path)
        try:
            os.makedirs(self.path, exist_ok=True)
            if home in _held and _held[home].renew():
                return True
            lock = _Lock.take(self.path)
        except OSError as error:
            raise RunError(f"{self.path} cannot be locked: {disk.reason(error)}") from None
        if lock is None:
            return False
        _held[home] = lock
        return True

    def keep(self) -> None:
        """Make sure, before a write, that this process still holds the folder's lock.

        Somebody may have removed the lock, or the whole folder. Raises RunError if another process has taken it since.
        """
        held = _held.get(os.path.realpath(self.path))
        if held is None or held.current():
            return
        try:
            renewed = held.renew()
        except OSError as error:
            raise RunError(f"{self.path} cannot be locked again: {disk.reason(error)}") from None
        if not renewed:
            what = "another process writes there now" if os.path.isdir(self.path) else "the folder is gone"
            raise RunError(f"{self.path}: the lock of this run was removed, and {what}")
        log.warning("the lock of %s was removed while this run writes there; it is locked again", self.path)

    def release(self) -> None:
        """Unlock the folder before this process ends."""
        _held.pop(os.path.realpath(self.path)).close()

    def wait(self, made: str) -> None:
        """Wait until the folder `made` is there, or until this run folder is locked for this process."""
        told = False
        while not os.path.isdir(made) and not self.lock():
            if not told:
                log.info("waiting for the process that writes %s", self.path)
                told = True
            time.sleep(1)

    @property
    def begun(self) -> bool:
        """Return whether there is something to lose: a checkpoint or a summary."""
        saved = self / CHECKPOINTS
        return os.path.exists(self / SUMMARY) or (
            os.path.isdir(saved) and not all(map(disk.is_scratch, os.listdir(saved)))
        )

    def pin_teacher(self, path: str) -> None:
        """Note which teacher this run learns from; raise UserError if it began with another."""
        note = self / TEACHER
        if self.begun and os.path.exists(note):
            with open(note, encoding="utf-8") as file:
                before = file.read().strip()
            if before != path:
                raise UserError(
                    "teacher.recipe",
                    f"a recipe or data that now lead to {path}",
                    f"{before}, as at this run's start",
                )
            return
        with disk.writing(note) as file:
            file.write(path + "\n")

    def summary(self) -> dict[str, Any] | None:
        """Return the summary of a finished run, or None."""
        try:
            with open(self / SUMMARY, encoding="utf-8") as file:
                summary = json.load(file)
        except (OSError, ValueError, RecursionError):
            return None
        return summary if isinstance(summary, dict) and isinstance(summary.get("models"), dict) else None

    def write_summary(self, summary: dict) -> None:
        with disk.writing(self / SUMMARY) as file:
            json.dump(summary, file, indent=2)
            file.write("\n")

    def log(self, record: dict) -> None:
        """Append one line to metrics.jsonl; while the disk is full, lines are kept in memory and training goes on."""
        self.keep()
        lines = [*self._waiting, json.dumps(record) + "\n"]
        try:
            disk.append(self / METRICS, "".join(lines))
        except OSError as error:
            if error.errno not in disk.FULL:
                raise RunError(f"{self / METRICS} cannot be written: {disk.reason(error)}") from None
            if not self._waiting:
                log.warning(
                    "%s cannot be written now, training continues: %s", self / METRICS, disk.reason(error)
                )
            self._waiting = lines[-_WAITING:]
            return
        if self._waiting:
            log.warning("%s is written again", self / METRICS)
        self._waiting = []

    def start_scores(self) -> dict[str, float]:
        """Return the student's scores before its first step from metrics.jsonl; {} if there are none."""
        try:
            with open(self / METRICS, encoding="utf-8") as file:
                first = json.loads(file.readline())
        except (OSError, ValueError, RecursionError):
            return {}
        return first.get("evaluation", {}) if isinstance(first, dict) and first.get("step") == 0 else {}

    def rewind(self, step: int) -> None:
        """Drop the log lines of steps after `step`: a resumed run writes them again."""
        if not os.path.exists(self / METRICS):
            return
        kept = []
        with open(self / METRICS, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (ValueError, TypeError, KeyError, RecursionError):  # a line that a kill cut short
                    continue
        with disk.writing(self / METRICS) as file:
            file.writelines(kept)


class _Lock:
    """A _Lock is the open lock file of a folder, and the open folder itself if its file system locks folders.

    The file alone would not suffice: if it is removed, a second process can lock a new one.
    """

    def __init__(self, folder: str, own: int, file: int):
        self.folder, self.own, self.file = folder, own, file

    @classmethod
    def take(cls, folder: str) -> "_Lock | None":
        """Lock an existing folder; return None if another process has it."""
        own = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if _lock(own, needed=False) and (file := _lock_file(folder)) is not None:
                return cls(folder, own, file)
        except OSError:
            os.close(own)
            raise
        os.close(own)
        return None

    def current(self) -> bool:
        """Return whether the folder and the lock file at their paths are still those that are held."""
        return _is(self.own, self.folder) and _is(self.file, os.path.join(self.folder, LOCK))

    def renew(self) -> bool:
        """Lock a new lock file if the old one was removed.

        Return False if the folder was replaced or another process has the lock.
        """
        if not _is(self.own, self.folder):
            return False
        if not self.current():
            file = _lock_file(self.folder)
            if file is None:
                return False
            os.close(self.file)
            self.file = file
        return True

    def close(self) -> None:
        os.close(self.own)
        os.close(self.file)


def _lock_file(folder: str) -> int | None:
    """Return the descriptor of a folder's locked lock file; None if another process has it."""
    path = os.path.join(folder, LOCK)
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if not _lock(file):
            os.close(file)
            return None
        if _is(file, path):
            return file
        os.close(file)  # somebody removed it between opening and locking


def _lock(descriptor: int, needed: bool = True) -> bool:
    """Lock without waiting; return False if another process has it.

    needed: raise OSError if the file system cannot lock this; NFS, for example, locks no folders.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        if needed:
            raise
    return True


def _is(descriptor: int, path: str) -> bool:
    """Return whether a path leads to the open file or folder; a link is followed only if it leads to a folder."""
    try:
        there = os.stat(path, follow_symlinks=os.path.isdir(path))
        return os.path.samestat(os.fstat(descriptor), there)
    except OSError:
        return False


def check_plain(path: str) -> None:
    """Raise UserError if a run folder holds a link, a pipe or the like under one of its own names.

    Otherwise anyone who may write into a shared folder could make a run read or write files elsewhere, or hang.
    """
    places = [os.path.join(path, name) for name in OWN]
    while places:
        place = places.pop()
        try:
            mode = os.lstat(place).st_mode
        except OSError:
            continue
        if stat.S_ISDIR(mode):
            with contextlib.suppress(OSError):
                places += [os.path.join(place, name) for name in os.listdir(place)]
        elif not stat.S_ISREG(mode):
            kind = "a link" if stat.S_ISLNK(mode) else "no plain file"
            raise UserError(
                "run.dir", f"{path}, in which {place} is {kind}", "only a run's files and folders"
            )


def as_begun(config: Config) -> Config:
    """Return the config; if it resumes a run, with the defaults of the version that began that run."""
    folder = RunFolder(config.run_dir)
    return (
        configs.as_begun(config, folder / CONFIG)
        if folder.begun and os.path.isfile(folder / CONFIG)
        else config
    )


def check_sources(config: Config, sources: list[str]) -> None:
    """Raise UserError if a run would overwrite or remove what it is to read.

    sources: files and overrides of the command line.
    """
    RunFolder(config.run_dir).check()
    target = os.path.join(config.run_dir, CONFIG)
    named = any(
        os.path.isfile(source) and os.path.exists(target) and os.path.samefile(source, target)
        for source in sources
    )
    if named and not RunFolder(config.run_dir).holds(config):
        raise UserError(
            "run.dir",
            f"{config.run_dir}, whose {CONFIG} is the config of this run",
            "another folder, or a copy of that file",
        )
    teacher, data = config.teacher, config.data
    read = {"student.path": config.student.path, "data.tokenizer": data.tokenizer}
    if teacher is not None:
        read |= {"teacher.path": teacher.path, "teacher.recipe": teacher.recipe}
    files = [(part, name) for *_, part in parts(data) for name in names(part.train)]
    files += [
        (data, name) for name in (*dev_sets(data).values(), *(data.domain or ()), *(data.general or ()))
    ]
    read |= {f"data: {name}": os.path.join(of.root or "", name) for of, name in files if of.source == "files"}
    home = os.path.realpath(config.run_dir)
    for place, path in read.items():
        if path is None or not os.path.exists(path):
            continue
        below = os.path.relpath(os.path.realpath(path), home).split(os.sep)[0]
        if below in OWN:
            raise UserError(place, f"{path}, which the run writes itself", "another run.dir, or a copy")
