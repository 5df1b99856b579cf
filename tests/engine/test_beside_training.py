"""A save and the teacher's next batch run beside training, and must not change what it computes."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from dsdistill.distributed import deepspeed
from dsdistill.distributed.writer import Writer, on_host
from dsdistill.engine import checkpoint
from dsdistill.engine.teacher_ahead import TeacherAhead
from tests.engine.launch import run_configs
from tests.engine.test_resume import losses, write

STAGES = {1: ("fp32", 0), 2: ("bf16", 3), 3: ("fp32", 3)}  # student's stage → dtype, teacher's stage


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """Return weights, moments and random states of a checkpoint; files are padded with whatever was in memory."""
    shards = deepspeed.read_shards(str(folder))
    found = {name: shards.weight(name) for name in shards.names}
    trained = [name for name in found if shards.trained(name)]
    found |= {f"{name}, {key}": shards.moment(name, key) for name in trained for key in shards.moments}
    for path in folder.glob("random-*.pt"):
        found[path.name] = torch.load(path, weights_only=True)["cpu"]
    return found


@pytest.fixture
def runs(settings, tmp_path) -> list[Path]:
    """Do runs of five steps of two micro-batches, saved after each.

    A pair's second run does all it can beside the steps.
    """
    settings["train"] |= {"steps": 5, "micro_batch_size": 2}
    settings["run"] |= {"save_every": 1, "keep": 9}
    paths = []
    for stage, (dtype, teachers) in STAGES.items():
        for beside in (False, True):
            changes = {
                "run": settings["run"] | {"save_async": beside},
                "train": settings["train"] | {"dtype": dtype},
                "student": settings["student"] | {"zero_stage": stage},
                "teacher": settings["teacher"] | {"zero_stage": teachers, "overlap": beside},
            }
            paths.append(write(settings | changes, tmp_path, f"{stage}-{'beside' if beside else 'alone'}"))
    run_configs(paths)
    return [path.with_suffix("") for path in paths]


def test_losses_and_checkpoints_are_those_of_a_run_that_waits(runs):
    for alone, beside in zip(runs[::2], runs[1::2], strict=True):
        assert losses(beside) == losses(alone) and len(losses(alone)) == 5
        for step in range(1, 6):
            mine, other = (run / checkpoint.FOLDER / checkpoint.tag_of(step) for run in (beside, alone))
            assert checkpoint.damage(str(mine)) is None
            assert sorted(p.name for p in mine.iterdir()) == sorted(p.name for p in other.iterdir())
            held, expected = saved(mine), saved(other)
            assert held.keys() == expected.keys() and len(held) > 100
            assert [name for name in held if not torch.equal(held[name], expected[name])] == []


def test_a_copy_on_the_host_is_one_of_its_own():
    whole = torch.arange(12.0)
    state = {"a": [whole[:4].view(2, 2), (whole[4:], "text")], "p": nn.Parameter(torch.ones(3)), "n": 1.5}
    made = on_host(state)
    views = made["a"][0], made["a"][1][0]
    whole.zero_()
    state["p"].data.zero_()
    assert torch.cat([view.flatten() for view in views]).tolist() == list(range(12))
    assert views[0].untyped_storage().data_ptr() == views[1].untyped_storage().data_ptr()  # saved once
    assert isinstance(made["p"], nn.Parameter) and made["p"].tolist() == [1, 1, 1]
    assert made["a"][1][1] == "text" and made["n"] == 1.5


@pytest.mark.parametrize("later", [False, True])
def test_a_file_is_hashed_as_it_lies_on_the_disk(tmp_path, later):
    writer = Writer()
    writer.begin(later)
    tensor = torch.randn(1000, 7)
    path = str(tmp_path / "a.pt")
    writer.save({"weights": tensor, "ds_config": {"wandb": {"api_key": "secret"}}}, path)
    tensor.zero_()  # the next step would change the tensor like this
    (tmp_path / "copied").write_bytes(b"by DeepSpeed")
    writer.add(str(tmp_path / "copied"))
    assert writer.commit() and writer.written
    expected = {name: checkpoint.fingerprint(str(tmp_path / name)) for name in ("a.pt", "copied")}
    assert writer.prints(str(tmp_path)) == expected
    held = torch.load(path, weights_only=True)
    assert held["weights"].any() and "secret" not in str(held["ds_config"])
    writer.cleanup()


@pytest.mark.parametrize("later", [False, True])
def test_a_failure_waits_for_the_end(tmp_path, later):
    """The other ranks wait for this one in DeepSpeed's collectives, which come after its files are written."""
    writer = Writer()
    writer.begin(later)
    writer.save({"a": torch.ones(2)}, str(tmp_path / "no" / "folder.pt"))
    writer.save({"a": torch.ones(2)}, str(tmp_path / "good.pt"))
    with pytest.raises((OSError, RuntimeError), match=os.path.join("no", "folder.pt")):
        writer.commit()
    assert (tmp_path / "good.pt").exists()
    writer.begin(later)  # this failure does not affect the next checkpoint
    writer.save({"a": torch.ones(2)}, str(tmp_path / "next.pt"))
    assert writer.commit() and list(writer.prints(str(tmp_path))) == ["next.pt"]
    writer.cleanup()


def test_the_teacher_is_one_micro_batch_ahead():
    asked = []

    def teacher(batch: str) -> str:
        asked.append(batch)
        return f"trace of {batch}"

    ahead = TeacherAhead(teacher, torch.device("cpu"))
    steps = [["a", "b"], ["c", "d"], ["e"]]
    order = [name for step in steps for name in step]
    for place, name in enumerate(order):
        ahead.go(name, order[place + 1] if place + 1 < len(order) else None)
        assert ahead.trace == f"trace of {name}" and asked == order[: place + 2]
