"""What a run does about losses that are not finite, and about another process at its folder."""

import json
import math
import multiprocessing
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from dsdistill.config import RunError, UserError, load
from dsdistill.config.load import make_config
from dsdistill.data import Batch
from dsdistill.distributed import engines
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.guard import SEEN, Guard
from dsdistill.engine.run_folder import RunFolder

ONE = Ranks(0, 1, torch.device("cpu"))


def report(**terms):
    return {name: {"raw": value, "weighted": 0.5 * value} for name, value in terms.items()}


@pytest.fixture
def batches():
    mask = torch.ones(2, 3, dtype=torch.bool)
    return [Batch(mask.long(), mask, None, ids=("a", "")), Batch(mask.long(), mask, None, ids=("b",))]


def test_stops_at_the_limit_and_says_what_went_bad(tmp_path, batches):
    guard = Guard(2, str(tmp_path), ONE)
    assert not guard.finite(1, report(task=1.0, hidden=math.nan), batches, last=False)
    assert guard.finite(2, report(task=1.0, hidden=2.0), batches, last=False)  # in a row, not in all
    assert not guard.finite(3, report(task=math.inf, hidden=2.0), batches, last=False)
    with pytest.raises(
        RunError, match=r"step 4: 2 step\(s\) in a row with values that are not finite, in hidden: "
    ):
        guard.finite(4, report(task=1.0, hidden=math.nan), batches, last=False)
    lines = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3, 4]
    assert lines[0] == {
        "step": 1,
        "in": ["hidden"],
        "terms": {"task": 1.0, "hidden": "nan"},
        "examples": ["a", "b"],
    }
    assert lines[1]["terms"]["task"] == "inf"


def test_the_last_step_must_be_finite(tmp_path, batches):
    with pytest.raises(RunError, match=r"step 9: 1 step\(s\)"):
        Guard(3, str(tmp_path), ONE).finite(9, report(task=math.nan), batches, last=True)


def test_a_spike_is_told(tmp_path, batches, caplog):
    guard = Guard(3, str(tmp_path), ONE)
    for step in range(1, SEEN + 1):
        guard.finite(step, report(task=2.0), batches, last=False)
    assert not caplog.records
    guard.finite(SEEN + 1, report(task=7.9), batches, last=False)
    assert not caplog.records
    guard.finite(SEEN + 2, report(task=20.0), batches, last=False)
    assert f"step {SEEN + 2}: the loss is 10, " in caplog.text
    (line,) = map(json.loads, (tmp_path / "spikes.jsonl").read_text().splitlines())
    assert (
        line["step"] == SEEN + 2 and line["loss"] == 10 and line["average"] == pytest.approx(1.06, abs=0.01)
    )


def test_a_gradient_alone_counts_too(tmp_path, batches):
    guard = Guard(2, str(tmp_path), ONE)
    assert not guard.finite(1, report(task=1.0), batches, last=False, gradient=False)
    assert guard.finite(2, report(task=1.0), batches, last=False)
    assert not guard.finite(3, report(task=math.nan), batches, last=False)
    with pytest.raises(
        RunError,
        match=r"step 4: 2 step\(s\) in a row with values that are not finite, in the gradient alone: ",
    ):
        guard.finite(4, report(task=1.0), batches, last=False, gradient=False)


def test_a_loss_scale_may_be_looked_for(monkeypatch):
    """In fp16 DeepSpeed lowers the loss scale until it can fall no further."""
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)  # whether it prints
    scaler = DynamicLossScaler(4.0, 1000, 1.0, 1, False)
    engine = SimpleNamespace(
        skipped_steps=0,
        get_global_grad_norm=lambda: math.inf,
        optimizer=SimpleNamespace(loss_scaler=scaler),
    )
    scaler.raise_error_at_min_scale = False
    found = []
    for _ in range(4):
        skipped, engine.skipped_steps = engine.skipped_steps, engine.skipped_steps + 1
        scaler.update_scale(overflow=True)
        found.append(engines.step_gradient(engine, skipped).finite())
    assert found == [True, False, False, False]


def _hold(path, held, done):
    assert RunFolder(path).lock()
    held.set()
    done.wait()


def test_no_evaluation_of_a_run_that_another_process_writes(config, refused, tmp_path):
    """Both would write the run's summary.

    The newest checkpoint is not looked up before, since the other process may be saving one.
    """
    run = tmp_path / "run"
    folder = RunFolder(str(run))
    folder.open(load([config()]))
    folder.release()
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(run), held, done))
    other.start()
    try:
        assert held.wait(timeout=60)
        assert f"run.dir: got {run}, which another process is writing" in refused("evaluate", run)
    finally:
        done.set()
        other.join()


def _open(path, config, answer):
    try:
        RunFolder(path).open(make_config(config))
        answer.put("opened")
    except UserError as error:
        answer.put(str(error))


def test_two_processes_cannot_write_one_run(tmp_path):
    config = {"student": {"path": "s"}}
    folder = RunFolder(str(tmp_path / "run"))
    folder.open(make_config(config))
    folder.open(make_config(config))  # the same process may open it again
    context = multiprocessing.get_context("spawn")
    for path, expected in ((folder.path, "another process is writing"), (str(tmp_path / "other"), "opened")):
        answer = context.Queue()
        other = context.Process(target=_open, args=(path, config, answer))
        other.start()
        assert expected in answer.get(timeout=60)
        other.join()
    # However a process ends, it leaves the folder free.
    assert RunFolder(str(tmp_path / "other")).lock()
