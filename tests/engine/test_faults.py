"""Faults in the real two-rank job: an exit code, a reason, no process left behind, and a resume that is exact."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsdistill.engine import checkpoint
from tests.conftest import small_run
from tests.engine.launch import launch, processes_of, run_configs, wait_for_end
from tests.engine.test_resume import losses, write

WORKER = Path(__file__).with_name("fault_worker.py")
KILLED = r"exits with return code = -9"
# Rank, step, exit code of the launcher, reason.
FAULTS = {
    "hang": (
        *(1, 6, 1),
        r"dsdistill: rank 0 waited 0\.2 minutes \(run\.timeout\) for another rank in vain: .*[Tt]imed out",
    ),
    "raise": (1, 6, 1, "ArithmeticError: a rank that raises"),
    "full disk": (1, 6, 1, r"dsdistill: step 6: no checkpoint could be saved: "),
    "nan": (
        1,
        5,
        1,
        r"dsdistill: step 7: 3 loss\(es\) in a row are not finite, in task, .*bad_steps\.jsonl has",
    ),
    "kill in a file": (1, 6, 247, KILLED),
    "kill between files": (0, 6, 247, KILLED),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def settings(models_dir, data_dir, folder) -> dict:
    """10 steps with dropout; a checkpoint after each second, two of them kept."""
    data = shutil.copytree(data_dir, folder / "data")
    settings = small_run(models_dir, data, folder)
    settings["student"]["config"] = {"hidden_dropout_prob": 0.2}
    settings["run"] |= {"save_every": 2, "timeout": 0.2}
    settings["terms"] = {"task": {}, "soft_label": {}, "hidden": {}}
    return settings


@pytest.fixture(scope="module")
def ended(settings, folder) -> dict[str, subprocess.CompletedProcess]:
    """Each fault's run, as it ended; none has left a process."""
    found = {}
    for fault, (rank, step, *_) in FAULTS.items():
        path = write(settings, folder, fault)
        found[fault] = launch(WORKER, path, fault, rank, step)
        wait_for_end(path, seconds=20)
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_the_run_with_a_reason(ended, folder, fault):
    *_, code, reason = FAULTS[fault]
    done = ended[fault]
    told = done.stdout + done.stderr
    assert done.returncode == code, told[-3000:]
    assert re.search(reason, told), told[-3000:]
    assert checkpoint.newest(str(folder / fault)) == "step-00000004"


def test_a_row_that_went_bad_stops_a_resume_and_touches_nothing(ended, settings, folder):
    train, run = Path(settings["data"]["train"]), folder / "raise"
    before, good = sorted(run.rglob("*")), train.read_bytes()
    train.write_bytes(good.replace(b"\n", b"\nbad \xff row\ta\t0\n", 1))
    command = [sys.executable, "-m", "dsdistill", "train", folder / "raise.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    train.write_bytes(good)
    assert done.returncode == 2
    assert re.search(
        r"^dsdistill: .*train\.tsv, line 2: got byte 0xff, expected UTF-8 text$", done.stderr, re.M
    )
    assert "Traceback" not in done.stderr
    assert sorted(run.rglob("*")) == before


def test_every_run_goes_on_exactly(ended, settings, folder):
    """One from the checkpoint before, as its newest is cut short by then."""
    shard = max((folder / "nan" / "checkpoints" / "step-00000004").iterdir(), key=lambda p: p.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-100])
    paths = [folder / f"{fault}.yaml" for fault in FAULTS]
    log = run_configs([write(settings, folder, "undisturbed"), *paths])
    assert f"step-00000004 is passed over: {shard.name} has changed" in log
    for fault in FAULTS:
        assert losses(folder / fault) == losses(folder / "undisturbed"), fault
        left = [path.name for path in (folder / fault).rglob("*") if "partial" in path.name]
        assert left == [], fault
    assert not processes_of(folder)
