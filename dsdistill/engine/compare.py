"""Compare methods: run each config with each seed, one after the other, and print means and deviations."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from dsdistill import disk
from dsdistill.config import Stopped, UserError, as_begun, load
from dsdistill.config.resume import check_same
from dsdistill.engine.studies import folder, read_plan
from dsdistill.report.axis_plot import PICTURE, axis_plot
from dsdistill.report.methods import HEAD, table


def compare(path: str, out: str, overrides: list[str], scale: str = "small", dry: bool = False) -> str:
    """Run what is not finished yet, in OUT/METHOD/seed-N; return the table and write it to OUT/table.md.

    Args:
        path: the plan; `studies.read_plan` says what it holds.
        out: folder of the runs. It also gets study.json and, if the plan has an axis, axis.png.
        overrides: files and overrides that come after those of every method.
        scale: which sources to use if a plan has different sources for each scale.
        dry: only check every config; return the list of runs.

    Raises UserError, before the first run starts, for a config that is refused, or that differs from
    the config of a finished run in the same folder.
    """
    seeds, methods, study = read_plan(path, scale)
    disk.check_writable(out, "--out")
    written = Path(out, "table.md")
    if os.path.lexists(written) and not _is_table(written):
        raise UserError("--out", f"{written}, which was not written by a comparison", "another folder")
    runs = []
    for name, sources in methods.items():
        for seed in seeds:
            run = os.path.join(out, folder(name), f"seed-{seed}")
            settings = [*sources, *overrides, f"run.seed={seed}", f"run.dir={run}"]
            _check(run, settings)
            runs.append((name, seed, run, settings))
    if dry:
        return "\n".join(f"{name}, seed {seed}: {run}{_how_far(run)}" for name, seed, run, _ in runs)
    study.write(out)
    rows: dict[str, list[dict]] = {}
    with _passing_on() as call:
        for name, seed, run, settings in runs:
            print(f"{name}, seed {seed}: {run}", file=sys.stderr, flush=True)
            _run(run, settings, call)
            rows.setdefault(name, []).append(json.loads(Path(run, "summary.json").read_text()))
    text = table(rows, study)
    with disk.writing(written) as file:
        file.write(text)
    if study.axis:
        with disk.replacing(Path(out, PICTURE)) as made:
            axis_plot(study, rows, made)
    return text


def _how_far(run: str) -> str:
    """Return the state of a run that has begun, as the list of runs shows it."""
    if os.path.isfile(os.path.join(run, "summary.json")):
        return " (finished)"
    return " (begun)" if os.path.isdir(run) else ""


def _is_table(path: Path) -> bool:
    """Return whether a comparison wrote this file, so that the next one may replace it."""
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline(100).startswith(HEAD)


def _check(run: str, sources: list[str]) -> None:
    """Raise UserError if the config is refused, or differs from that of a finished run in the folder."""
    config, saved = load(sources), os.path.join(run, "config.yaml")
    if os.path.isfile(os.path.join(run, "summary.json")) and os.path.isfile(saved):
        check_same(saved, as_begun(config, saved))


@contextlib.contextmanager
def _passing_on() -> Iterator[Callable[[list[str]], int]]:
    """Yield a function that runs a command and returns its exit code.

    Signals are passed on to the command, which saves; Stopped is raised if no command runs. If the comparison is
    killed, the command notices this and stops too.
    """
    child, told = None, None

    def stop(number: int, _) -> None:
        nonlocal told
        told = number
        if child is None:
            check()
        child.send_signal(number)

    def check() -> None:
        if told is not None:
            code = 128 + (told if told == signal.SIGINT else signal.SIGTERM)
            raise Stopped(f"stopped by {signal.Signals(told).name}; the same command continues it", code)

    def call(command: list[str]) -> int:
        nonlocal child
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        code = child.wait()
        child = None
        if not code:
            check()
        return code if code >= 0 else 128 - code

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    taken = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in taken}
    try:
        yield call
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(run: str, sources: list[str], call: Callable[[list[str]], int]) -> None:
    summary = Path(run, "summary.json")
    done = json.loads(summary.read_text()) if summary.is_file() else {}
    commands = [] if done.get("finished") else [["train", *sources]]
    if not commands and "evaluated" in done:
        return
    for command in (*commands, ["evaluate", run]):
        if code := call([sys.executable, "-m", "dsdistill", *command]):
            raise SystemExit(code)  # the command has said why on standard error
