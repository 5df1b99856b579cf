"""Shells, schedulers and launchers tell runs to stop: one line, an exit code, an exact resume."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from dsdistill.engine import checkpoint
from tests.conftest import small_run
from tests.engine.launch import heed, launch, launch_command, processes_of, wait_for_end
from tests.engine.test_resume import losses, steps_done, write

WORKER = Path(__file__).with_name("stop_worker.py")
GOES_ON = "; the same command continues the run"
SAVED = "step 5: stopped by {}, saved as step-00000005" + GOES_ON
# A single rank. For each case: where it gets the signal, changes of `run`, exit code, its line, newest checkpoint.
ALONE = {
    "undisturbed": ("nothing", {}, 0, None, 10),
    "clock": ("ignored", {"save_minutes": 1e-6, "keep": 99}, 0, None, 10),
    "INT": ("INT", {}, 130, SAVED.format("SIGINT"), 5),
    "USR1": ("USR1", {}, 143, SAVED.format("SIGUSR1"), 5),
    "twice": ("twice", {}, 143, f"stopped by SIGTERM and SIGTERM, and exited immediately{GOES_ON}", None),
    "grace": (
        "grace",
        {"grace": 1.0},
        143,
        f"stopped by SIGTERM; no step was finished and saved within run.grace (1 s){GOES_ON}",
        None,
    ),
    "save": ("save", {"grace": 1.0, "save_every": 4}, 143, SAVED.format("SIGTERM"), 5),
    "not finite": (
        "not finite",
        {"save_every": 4},
        143,
        f"step 5, which is not finite: stopped by SIGTERM, not saved{GOES_ON}",
        4,
    ),
    "preparation": ("preparation", {}, 143, f"stopped by SIGTERM{GOES_ON}", None),
    "stuck": ("stuck preparation", {}, 143, f"stopped by SIGTERM{GOES_ON}", None),
    "evaluation": ("evaluation", {}, 143, f"stopped by SIGTERM{GOES_ON}", 10),
    "few files": ("few files", {}, 2, "{}: ulimit -n: got 24, expected at least 72 open files", None),
    "port": (
        "port in use",
        {},
        2,
        r"{}: MASTER_PORT: got PORT (Address already in use), expected a free port: deepspeed --master_port PORT",
        None,
    ),
    "INT again": ("nothing", {"dir": "INT"}, 0, None, 10),
}
VAIN = "rank 0 waited 0.2 minutes (run.timeout) for another rank, which did not answer: "
# Two ranks, in the same form.
TWO = {
    "undisturbed": ("nothing", {}, 0, None, 10),
    "one rank": ("HUP@1", {}, 143, SAVED.format("SIGHUP"), 5),
    "stands still": ("STOP@1", {"save_every": 4}, 1, VAIN, 4),
    "evaluation": ("evaluation@1", {}, 143, f"stopped by SIGTERM{GOES_ON}", 10),
    "waits": (
        "long preparation@0+told while it waits@1",
        {},
        143,
        f"stopped by SIGTERM{GOES_ON}",
        None,
    ),
    "one rank again": ("nothing", {"dir": "one rank"}, 0, None, 10),
    "stands still again": ("nothing", {"dir": "stands still"}, 0, None, 10),
    "runner again": ("nothing", {"dir": "runner"}, 0, None, 10),
    "terminal again": ("nothing", {"dir": "terminal"}, 0, None, 10),
}


@pytest.fixture(scope="module")
def make(models_dir, data_dir, tmp_path_factory) -> Callable:
    """Return make(FOLDER, NAME, changes of run), which writes the config of a run of 10 steps with dropout."""
    root = tmp_path_factory.mktemp("signals")

    def make(folder: str, name: str, changes: dict) -> Path:
        (root / folder).mkdir(exist_ok=True)
        settings = small_run(models_dir, data_dir, root / folder)
        settings["student"]["config"] = {"hidden_dropout_prob": 0.2}
        settings["terms"] = {"task": {}, "soft_label": {}, "hidden": {}}
        settings["train"]["steps"] = 10
        settings["run"] |= {"timeout": 0.2}
        path = write(settings, root / folder, name)
        given = yaml.safe_load(path.read_text())
        given["run"] |= changes | {"dir": str(root / folder / changes.get("dir", name))}
        path.write_text(yaml.safe_dump(given))
        return path

    return make


def stop_all(make, folder: str, scenarios: dict, ranks: int) -> Path:
    paths = [make(folder, name, changes) for name, (_, changes, *_) in scenarios.items()]
    home = paths[0].parent
    told = [f"{name}={place}" for name, (place, *_) in scenarios.items()]
    done = launch(WORKER, home, *told, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return home


def spoken(log: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]+", log) if line.startswith("dsdistill: ")]


def check(home: Path, name: str, ranks: int, scenarios: dict) -> None:
    place, changes, code, line, newest = scenarios[name]
    for rank in range(ranks):
        log = (home / f"{name}-{rank}.err").read_text()
        left = int((home / f"{name}-{rank}.code").read_text())
        assert left == (-9 if place == f"STOP@{rank}" else code), log[-3000:]
        assert "Traceback" not in log
        wanted = [line.replace("{}", str(home / f"{name}.yaml"))] if line and rank == 0 else []
        got = [re.sub(r"got \d+ \(Addr", "got PORT (Addr", text) for text in spoken(log)]
        assert [
            text.removeprefix("dsdistill: ")[: len(w)] for text, w in zip(got, wanted, strict=True)
        ] == wanted
    if name.endswith(" again"):  # the checkpoint of the run before
        assert re.search(r"resuming from step-0000000[2-9]", (home / f"{name}-0.err").read_text())
    elif f"{name} again" in scenarios:
        return
    tag = checkpoint.newest(str(home / changes.get("dir", name)))
    assert tag == (newest and checkpoint.tag_of(newest))


@pytest.fixture(scope="module")
def alone(make) -> Path:
    return stop_all(make, "alone", ALONE, ranks=1)


@pytest.mark.parametrize("name", ALONE)
def test_one_rank(alone, name):
    check(alone, name, 1, ALONE)


def test_one_rank_goes_on_exactly(alone):
    assert len(losses(alone / "INT")) == 10 and losses(alone / "INT") == losses(alone / "undisturbed")


def test_the_clock_saves(alone):
    """The limit here is shorter than a step, so every step is saved."""
    assert len(list((alone / "clock" / checkpoint.FOLDER).glob("step-*"))) == 10
    assert losses(alone / "clock") == losses(alone / "undisturbed")


def start(command: list[object], log: Path, run: Path, steps: int = 2) -> subprocess.Popen:
    """Start a real command in a process group of its own, and wait until the run in that folder has done some steps."""
    words, environment = command
    with log.open("w") as file:
        process = subprocess.Popen(
            words, env=environment, stdout=file, stderr=file, start_new_session=True, preexec_fn=heed
        )
    deadline = time.time() + 120
    while steps_done(run) < steps:
        assert process.poll() is None and time.time() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)
    return process


def listened(path: Path) -> set[str]:
    """Return the addresses on which the processes that name a path listen."""
    opened = [c for process in processes_of(path) for c in psutil.Process(process).net_connections("tcp")]
    return {c.laddr.ip for c in opened if c.status == psutil.CONN_LISTEN}


# What happens to the launcher, its exit code, what the ranks print.
LAUNCHED = {
    "runner": (lambda runner: runner.terminate(), -15, "the end of its launcher"),
    "runner killed": (lambda runner: runner.kill(), -9, "the end of its launcher"),
    "terminal": (lambda runner: os.killpg(runner.pid, signal.SIGINT), -2, "SIGINT"),
}


@pytest.fixture(scope="module")
def launched(make) -> dict[str, tuple[int, set[str]]]:
    """Return the exit code of each launcher, and the addresses on which its ranks listened."""
    found = {}
    for name, (tell, *_) in LAUNCHED.items():
        path = make("two", name, {})
        log, run = path.with_suffix(".log"), path.with_suffix("")
        runner = start(launch_command(WORKER, path.parent, f"{name}=slow"), log, run)
        addresses = listened(path.parent)
        tell(runner)
        found[name] = runner.wait(60), addresses
        wait_for_end(path.parent, seconds=60)
    return found


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_launcher_that_is_told_or_gone(launched, make, name):
    home = make("two", name, {}).parent
    code, addresses = launched[name]
    assert code == LAUNCHED[name][1]
    assert addresses == {"127.0.0.1"}
    logs = [(home / f"{name}-{rank}.err").read_text() for rank in (0, 1)]
    (line,) = [line for log in logs for line in spoken(log)]
    found = re.fullmatch(r"dsdistill: step (\d+): stopped by (.*), saved as step-0*(\d+)" + GOES_ON, line)
    assert found and found[1] == found[3] and found[2] == LAUNCHED[name][2]
    assert not any("Traceback" in log for log in logs)
    assert checkpoint.tag_of(int(found[1])) in {p.name for p in (home / name / checkpoint.FOLDER).iterdir()}


@pytest.fixture(scope="module")
def two(launched, make) -> Path:
    return stop_all(make, "two", TWO, ranks=2)


@pytest.mark.parametrize("name", TWO)
def test_two_ranks(two, name):
    check(two, name, 2, TWO)


@pytest.mark.parametrize("name", [name for name in TWO if name.endswith(" again")])
def test_two_ranks_go_on_exactly(two, name):
    assert losses(two / name.removesuffix(" again")) == losses(two / "undisturbed")


def test_a_comparison(make):
    """If `compare` gets a signal, it passes it to its run; if it is killed, its run notices.

    Each time the run saves, and the comparison continues.
    """
    path = make("compared", "method", {})
    home = path.parent
    (home / "plan.yaml").write_text(yaml.safe_dump({"seeds": [0], "methods": {"one": [str(path)]}}))
    words = ["-m", "dsdistill", "compare", home / "plan.yaml", "--out", home / "out", "train.steps=4000"]
    command, run, log = launch_command(*words, ranks=1), home / "out" / "one" / "seed-0", home / "log"
    steps = 0
    for number, code, reason in (
        (signal.SIGTERM, 143, "SIGTERM"),
        (signal.SIGKILL, -9, "the end of its launcher"),
    ):
        process = start(command, log, run, steps + 2)
        assert listened(path) == {"127.0.0.1"}
        process.send_signal(number)
        assert process.wait(60) == code
        wait_for_end(path, seconds=60)
        told = log.read_text()
        (line,) = spoken(told)
        found = re.fullmatch(r"dsdistill: step (\d+): stopped by (.*), saved as step-\d+" + GOES_ON, line)
        assert found and found[2] == reason and int(found[1]) > steps
        assert "Traceback" not in told
        assert (f"resuming from {checkpoint.tag_of(steps)}" in told) == bool(steps)
        steps = int(found[1])
