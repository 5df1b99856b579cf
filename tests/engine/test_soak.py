"""Random ranks are killed at random moments; in the end the losses are those of an undisturbed run."""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.engine.launch import launch_command, processes_of, run_configs, wait_for_end
from tests.engine.test_faults import KILLED, KILLED_CODES
from tests.engine.test_resume import losses, steps_done, write

STEPS = 4  # of a run for each kill


@pytest.fixture
def often_saved(settings):
    """Return settings with dropout, a checkpoint after every step, and two of them kept."""
    settings["student"]["config"] = {"hidden_dropout_prob": 0.2}
    settings["run"] |= {"save_every": 1, "keep": 2}
    settings["terms"] = {"task": {}, "hidden": {}}
    return settings


def test_a_few_random_kills(often_saved, tmp_path):
    kills = kill_often(often_saved, tmp_path, kills=3, seed=22)
    assert {rank for rank, _ in kills} == {0, 1} and any(startup for _, startup in kills)


@pytest.mark.soak
def test_soak(often_saved, tmp_path):
    """Do DSDISTILL_KILLS kills (100), drawn from DSDISTILL_SEED (the clock)."""
    seed = int(os.environ.get("DSDISTILL_SEED", time.time_ns() % 2**32))
    kill_often(often_saved, tmp_path, int(os.environ.get("DSDISTILL_KILLS", "100")), seed)


def kill_often(settings: dict, folder: Path, kills: int, seed: int) -> list[tuple[int, bool]]:
    """Start a run, kill one rank, see it end; as often as asked; then let it come to its end.

    Returns the rank of each kill, and whether it came at the start.
    """
    settings["train"]["steps"] = STEPS * (kills + 2)
    killed, undisturbed = (write(settings, folder, name) for name in ("killed", "undisturbed"))
    run, chance = folder / "killed", random.Random(seed)
    print(f"\n{kills} kills drawn from seed {seed}", flush=True)
    done = []
    for number in range(kills):
        rank, startup = chance.randrange(2), number % 5 == 2  # sometimes before its first step
        done.append((rank, startup))
        step, delay = STEPS * number + chance.randint(1, STEPS), chance.uniform(0, 8 if startup else 0.5)
        moment = "the start" if startup else f"step {step}"
        print(f"kill {number + 1}: rank {rank}, {delay:.3f} s after {moment}", flush=True)
        kill_rank(killed, run, rank, 0 if startup else step, delay)
        # At most: two checkpoints, the one being saved, and one that was about to be removed.
        saved = [path.name for path in run.glob("checkpoints/step-*")]
        assert len(saved) <= 4, saved
    assert "resuming from" in run_configs([killed, undisturbed])

    assert losses(run) == losses(folder / "undisturbed")
    assert len(losses(run)) == settings["train"]["steps"]
    names = [
        sorted(str(path.relative_to(of)) for path in of.rglob("*")) for of in (run, folder / "undisturbed")
    ]
    assert names[0] == names[1]
    assert not processes_of(folder)
    return done


def kill_rank(path: Path, run: Path, rank: int, step: int, delay: float) -> None:
    """Start the run; some time after it has logged `step` (0: after its start) kill one rank, and see all end."""
    command, environment = launch_command("--module", "dsdistill", "train", path)
    with open(path.with_suffix(".log"), "w+", encoding="utf-8") as told:
        process = subprocess.Popen(command, env=environment, stdout=told, stderr=told)
        try:
            deadline, found = time.time() + 600, None
            while found is None or steps_done(run) < step:
                assert process.poll() is None and time.time() < deadline, tail(told)
                found = found or rank_of(path, rank)
                time.sleep(0.02)
            time.sleep(delay)
            os.kill(found, signal.SIGKILL)
            process.wait(timeout=120)
        finally:
            process.kill()
        assert process.returncode in KILLED_CODES
        assert re.search(KILLED, tail(told)), tail(told)
    wait_for_end(path, seconds=60)


def tail(told) -> str:
    told.seek(0)
    return told.read()[-3000:]


def rank_of(path: Path, rank: int) -> int | None:
    """Return the process of a rank, once it exists."""
    found = [pid for pid, arguments in processes_of(path).items() if f"--local_rank={rank}" in arguments]
    return found[0] if found else None
