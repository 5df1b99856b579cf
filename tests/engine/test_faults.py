"""Faults in the real two-rank job: exit code, reason, no process left behind, and an exact resume."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dsdistill.engine import checkpoint
from tests.conftest import small_run
from tests.engine.launch import launch, processes_of, run_configs, wait_for_end
from tests.engine.test_resume import losses, write

WORKER = Path(__file__).with_name("fault_worker.py")
# Either the launcher reports first, which looks every second, or the remaining rank.
KILLED = r"exits with return code = -9|dsdistill: rank \d lost another rank: .*[Cc]onnection (closed|reset) by peer"
KILLED_CODES = (1, 247)
VAIN = r"dsdistill: rank \d waited 0\.2 minutes \(run\.timeout\) for another rank, which did not answer: .*[Tt]imed out"
BAD = r"dsdistill: step 7: 3 step\(s\) in a row with values that are not finite, in task, .*bad_steps\.jsonl lists the"
BAD_GRADIENT = (
    r"dsdistill: step 6: 2 step\(s\) in a row with values that are not finite, in the gradient alone: "
)
# Training goes on without the two checkpoints that find no room; the last one must be saved.
FULL = (
    r"step 6: no checkpoint could be saved in .*: the disk is full; training continues"
    r"[\s\S]*^dsdistill: step 10: no checkpoint could be saved in .*: the disk is full$"
)
ASYNC = "async "  # prefix for runs whose checkpoints are written while they train
# Rank, step, reason.
FAULTS = {
    "hang": (1, 6, VAIN),
    "raise": (1, 6, r"(?m)^(\[rank1\]: )?dsdistill: rank 1, step 6: ArithmeticError: a rank that raises$"),
    "full disk": (1, 6, FULL),
    "nan": (1, 5, BAD),
    "nan gradient": (1, 5, BAD_GRADIENT),
    "kill in a file": (1, 6, KILLED),
    "kill between files": (0, 6, KILLED),
    "kill between own files": (1, 6, KILLED),
    "kill before the pointer": (0, 6, KILLED),
    "async kill in a file": (1, 6, KILLED),
    "async kill between files": (1, 6, KILLED),
    "async kill before the pointer": (0, 6, KILLED),
    "async full disk": (1, 6, FULL),
    "async nan": (1, 5, BAD),
    "raise of rank 0": (
        0,
        6,
        r"(?m)^(\[rank0\]: )?dsdistill: rank 0, step 6: ArithmeticError: a rank that raises$",
    ),
    "hang of rank 0": (0, 6, VAIN),
    "full disk of rank 0": (0, 6, FULL),
    "nan of rank 0": (0, 5, BAD),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def settings(models_dir, data_dir, folder) -> dict:
    """Return settings of 10 steps with dropout; a checkpoint after every second step, two of them kept."""
    data = shutil.copytree(data_dir, folder / "data")
    settings = small_run(models_dir, data, folder)
    settings["student"]["config"] = {"hidden_dropout_prob": 0.2}
    settings["run"] |= {"save_every": 2, "timeout": 0.2}
    settings["terms"] = {"task": {}, "soft_label": {}, "hidden": {}}
    return settings


@pytest.fixture(scope="module")
def ended(settings, folder) -> dict[str, subprocess.CompletedProcess]:
    """Return each fault's run as it ended; none has left a process behind."""
    found = {}
    for fault, (rank, step, _) in FAULTS.items():
        limit = {"bad_steps": 2} if fault == "nan gradient" else {}
        asynchronous = {"save_async": fault.startswith(ASYNC)}
        changes = {"train": settings["train"] | limit, "run": settings["run"] | asynchronous}
        path = write(settings | changes, folder, fault)
        found[fault] = launch(WORKER, path, fault.removeprefix(ASYNC).partition(" of ")[0], rank, step)
        wait_for_end(path, seconds=20)
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_the_run_with_a_reason(ended, folder, fault):
    reason, done = FAULTS[fault][-1], ended[fault]
    told = done.stdout + done.stderr
    assert done.returncode in (KILLED_CODES if reason == KILLED else (1,)), told[-3000:]
    assert re.search(reason, told, re.M), told[-3000:]
    assert checkpoint.newest(str(folder / fault)) == "step-00000004"


def noted(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "bad_steps.jsonl").read_text().splitlines()]


def test_what_went_bad_is_in_the_folder(ended, folder):
    terms = ["task", "soft_label", "hidden"]
    for fault, steps, where, values in (
        ("nan", [5, 6, 7], terms, {"nan"}),
        ("nan gradient", [5, 6], ["the gradient alone"], None),
    ):
        found = noted(folder / fault)
        assert [line["step"] for line in found] == steps
        for line in found:
            assert line["in"] == where and list(line["terms"]) == terms
            assert values is None or set(line["terms"].values()) == values
            assert values is not None or all(map(math.isfinite, line["terms"].values()))
            assert (
                len(set(line["examples"])) == len(line["examples"]) == (5 if line["step"] == 5 else 8)
            )  # of both ranks


def test_one_bad_step_is_passed_over(settings, folder):
    path = write(settings, folder, "one nan gradient")
    done = launch(WORKER, path, "one nan gradient", 1, 5)
    assert done.returncode == 0, done.stderr[-3000:]
    (bad,) = noted(folder / "one nan gradient")
    assert bad["step"] == 5 and bad["in"] == ["the gradient alone"]
    found = losses(folder / "one nan gradient")
    assert [line["step"] for line in found] == list(range(1, 11))
    assert [line["step"] for line in found if not math.isfinite(line["grad_norm"])] == [5]


def test_values_may_be_read_a_step_late(settings, folder):
    """Runs on GPUs read them late.

    The log says the same, and no checkpoint is saved at a bad step that was not noticed yet.
    """
    seldom = settings | {"run": settings["run"] | {"log_every": 5}}
    written = {}
    for fault in ("late nothing", "nothing"):
        done = launch(WORKER, write(seldom, folder, fault), fault, 1, 5)
        assert done.returncode == 0, done.stderr[-3000:]
        state = checkpoint.read_state(str(folder / fault), "step-00000010")
        written[fault] = [*losses(folder / fault), *(state[key] for key in ("tokens", "losses", "counted"))]
    assert written["late nothing"] == written["nothing"] and len(written["nothing"]) == 5
    done = launch(WORKER, write(seldom, folder, "late nan"), "late nan", 1, 5)
    assert done.returncode == 1 and re.search(BAD, done.stdout + done.stderr, re.M), done.stderr[-3000:]
    assert checkpoint.newest(str(folder / "late nan")) == "step-00000004"
    assert [line["step"] for line in noted(folder / "late nan")] == [5, 6, 7]


@pytest.mark.parametrize("launched", [False, True], ids=["alone", "launched"])
def test_a_row_that_went_bad_stops_a_resume_and_touches_nothing(ended, settings, folder, launched):
    train, run = Path(settings["data"]["train"]), folder / "raise"
    before, good = sorted(run.rglob("*")), train.read_bytes()
    train.write_bytes(good.replace(b"\n", b"\nbad \xff row\ta\t0\n", 1))
    words = ["dsdistill", "train", folder / "raise.yaml"]
    done = launch("--module", *words) if launched else launch("-m", *words, ranks=1)
    train.write_bytes(good)
    assert done.returncode == 2
    assert re.search(
        r"^dsdistill: .*train\.tsv, line 2: got byte 0xff, expected UTF-8 text$", done.stderr, re.M
    )
    assert "Traceback" not in done.stderr
    assert sorted(run.rglob("*")) == before


def test_every_run_goes_on_exactly(ended, settings, folder):
    """One run resumes from the checkpoint before, because its newest one was cut short."""
    shard = max((folder / "nan" / "checkpoints" / "step-00000004").iterdir(), key=lambda p: p.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-100])
    paths = [folder / f"{fault}.yaml" for fault in FAULTS]
    log = run_configs([write(settings, folder, "undisturbed"), *paths])
    assert f"step-00000004 cannot be used: {shard.name} has changed" in log
    resumed = re.findall(r"resuming from step-0000000(\d)", log)  # both ranks log it, at times after a bar
    assert sorted(resumed) == ["2"] * 2 + ["4"] * 2 * (len(FAULTS) - 1)
    for fault in FAULTS:
        assert losses(folder / fault) == losses(folder / "undisturbed"), fault
        left = [path.name for path in (folder / fault).rglob("*") if "partial" in path.name]
        assert left == [], fault
    assert not processes_of(folder)
