"""Faults in the real two-rank job: an exit code, a reason, no process left behind, and a resume that is exact."""

import os
import re
import time
from pathlib import Path

import pytest

from dsdistill.engine import checkpoint
from tests.engine.launch import launch, run_configs
from tests.engine.test_resume import losses, write

FAULTS = Path(__file__).with_name("fault_worker.py")

REASONS = {
    "hang": r"dsdistill: rank 0 waited 0\.2 minutes \(run\.timeout\) for another rank in vain: .*[Tt]imed out",
    "raise": "ArithmeticError: a rank that raises",
    "disk": r"dsdistill: step 6: no checkpoint could be saved: ",
}


@pytest.fixture(scope="module")
def undisturbed():
    """Losses of the run without a fault, once known."""
    return {}


@pytest.mark.parametrize("fault", REASONS)
def test_a_fault_ends_the_run_and_a_resume_goes_on(settings, tmp_path, undisturbed, fault):
    settings["run"] |= {"save_every": 2, "timeout": 0.2}
    path = write(settings, tmp_path, "run")
    done = launch(FAULTS, path, fault, 1, 6)
    assert done.returncode != 0
    assert re.search(REASONS[fault], done.stderr), done.stderr[-3000:]
    process = int(re.search(rf"fault: {fault} in process (\d+)", done.stdout).group(1))
    gone_by(process, time.time() + 20)
    assert checkpoint.newest(str(tmp_path / "run")) == "step-00000004"

    run_configs([path])
    if not undisturbed:
        run_configs([write(settings, tmp_path, "undisturbed")])
        undisturbed["losses"] = losses(tmp_path / "undisturbed")
    assert losses(tmp_path / "run") == undisturbed["losses"]


def gone_by(process: int, deadline: float) -> None:
    while os.path.exists(f"/proc/{process}"):
        assert time.time() < deadline, "a process was left behind"
        time.sleep(0.1)
