"""Compare methods: run each config with each seed, one after the other, and print means and deviations."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from dsdistill import disk
from dsdistill.config import Stopped, UserError, as_begun, load
from dsdistill.config.bounded import read_yaml
from dsdistill.config.resume import check_same
from dsdistill.report.methods import HEAD, table


def read_methods(path: str) -> tuple[list[int], dict[str, list[str]]]:
    """Return the seeds, and the config files and overrides of each method by its name.

    The file: `seeds: [0, 1, 2]` and `methods: {NAME: [FILE or KEY=VALUE, ...], ...}`, files as `train` takes them.
    """
    try:
        settings = yaml.safe_load(read_yaml(path))
    except UserError:
        raise
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(path, str(error).split("\n")[0], "a readable YAML file") from None
    known = {"seeds", "methods"}
    if not isinstance(settings, dict) or set(settings) != known:
        raise UserError(
            path,
            list(settings) if isinstance(settings, dict) else type(settings).__name__,
            "seeds and methods",
        )
    seeds, methods = settings["seeds"], settings["methods"]
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise UserError(f"{path}: seeds", seeds, "a list of whole numbers")
    if not isinstance(methods, dict) or not methods:
        raise UserError(f"{path}: methods", methods, "a mapping of names to lists of files")
    for name, sources in methods.items():
        if not isinstance(sources, list) or not sources or not all(isinstance(s, str) for s in sources):
            raise UserError(
                f"{path}: methods.{name}", sources, "a list of config files and key=value overrides"
            )
    methods = {str(name): sources for name, sources in methods.items()}
    folders: dict[str, str] = {}
    for name in methods:
        other = folders.setdefault(_folder(name), name)
        if other != name:
            raise UserError(
                f"{path}: methods", f"{other!r} and {name!r}", "names that differ in letters or digits"
            )
    return seeds, methods


def compare(path: str, out: str, overrides: list[str]) -> str:
    """Run what is not finished yet, in OUT/METHOD/seed-N; return the table and write it to OUT/table.md.

    Raises UserError, before the first run starts, for a config that is refused or differs from a finished run's there.
    """
    seeds, methods = read_methods(path)
    disk.check_writable(out, "--out")
    written = Path(out, "table.md")
    if os.path.lexists(written) and not _is_table(written):
        raise UserError("--out", f"{written}, which no comparison wrote", "another folder")
    runs = []
    for name, sources in methods.items():
        for seed in seeds:
            run = os.path.join(out, _folder(name), f"seed-{seed}")
            settings = [*sources, *overrides, f"run.seed={seed}", f"run.dir={run}"]
            _check(run, settings)
            runs.append((name, seed, run, settings))
    rows: dict[str, list[dict]] = {}
    with _passing_on() as call:
        for name, seed, run, settings in runs:
            print(f"{name}, seed {seed}: {run}", file=sys.stderr, flush=True)
            _run(run, settings, call)
            rows.setdefault(name, []).append(json.loads(Path(run, "summary.json").read_text()))
    text = table(rows)
    with disk.writing(written) as file:
        file.write(text)
    return text


def _is_table(path: Path) -> bool:
    """Return whether a comparison wrote this file, so that the next one may replace it."""
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline(100).startswith(HEAD)


def _folder(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def _check(run: str, sources: list[str]) -> None:
    """Raise UserError for a config that is refused, or that differs from that of a finished run there."""
    config, saved = load(sources), os.path.join(run, "config.yaml")
    if os.path.isfile(os.path.join(run, "summary.json")) and os.path.isfile(saved):
        check_same(saved, as_begun(config, saved))


@contextlib.contextmanager
def _passing_on() -> Iterator[Callable[[list[str]], int]]:
    """Yield a function that runs a command and returns its exit code.

    Signals are passed on to the command, which saves; Stopped is raised if none runs. If the comparison is killed, the
    command notices that by itself.
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
            raise Stopped(f"stopped by {signal.Signals(told).name}: the same command goes on", code)

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
