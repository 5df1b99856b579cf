"""A run continues with other ranks and another ZeRO stage, and its losses change only by rounding."""

import copy
import json
from pathlib import Path

import pytest
import yaml

from dsdistill.config import UserError
from dsdistill.config.load import make_config
from dsdistill.engine import checkpoint
from tests.engine.launch import launch, run_configs
from tests.engine.test_resume import losses, make_checkpoint, write

RESHAPE = Path(__file__).with_name("reshape_worker.py")
MOMENTS = {
    "AdamW": ["exp_avg", "exp_avg_sq"],
    "Adam": ["exp_avg", "exp_avg_sq"],
    "SGD": ["momentum_buffer"],
    "AdaGrad": ["sum"],
}


@pytest.fixture
def elastic(settings):
    """Return settings with dropout 0, since it would be drawn anew.

    They have every kind of state: frozen weights, projectors, layer weights, stages.
    """
    settings["run"] |= {"save_every": 2, "keep": 9}
    settings["teacher"]["zero_stage"] = 0
    settings["terms"] = {"task": {}, "soft_label": {}, "hidden": {"layer_weights": "dynamic"}}
    settings["train"] |= {"steps": 10, "projector_learning_rate": 3e-3}
    settings["stages"] = [
        {"name": "lower", "share": 3, "freeze": ["*layer.1*"]},
        {"name": "upper", "share": 7, "freeze": ["*embeddings*"]},
    ]
    return settings


def in_stage(settings: dict, zero_stage: int, folder: Path, **train) -> Path:
    """Return the config of the run that changes."""
    changed = copy.deepcopy(settings)
    changed["student"]["zero_stage"] = zero_stage
    changed["train"] |= train
    changed["run"]["dir"] = str(folder / "changing")
    path = folder / f"changing-{zero_stage}-{'-'.join(train)}.yaml"
    path.write_text(yaml.safe_dump(changed))
    return path


def test_a_run_goes_on_with_other_ranks_and_stages(elastic, tmp_path):
    undisturbed = write(elastic, tmp_path, "undisturbed")
    first, second, third = (in_stage(elastic, stage, tmp_path) for stage in (1, 2, 3))
    run_configs([first], ranks=1)
    small = in_stage(elastic, 3, tmp_path, micro_batch_size=2)
    done = launch(RESHAPE, tmp_path / "reshaped", undisturbed, f"{small}@2", f"{second}@4", f"{third}@6")
    assert done.returncode == 0 and "all configs done" in done.stdout, done.stderr[-5000:]
    check_reshaped([json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')])
    log = done.stderr + run_configs([f"{second}@8"], ranks=1)
    for step, before, after in (
        (2, "1 rank(s) in ZeRO stage 1", "2 in stage 3"),
        (4, "2 rank(s) in ZeRO stage 3", "2 in stage 2"),
        (6, "2 rank(s) in ZeRO stage 2", "2 in stage 3"),
        (8, "2 rank(s) in ZeRO stage 3", "1 in stage 2"),
    ):
        assert f"step-{step:08d} was saved by {before}; this run continues with {after}" in log

    expected, got = losses(tmp_path / "undisturbed"), losses(tmp_path / "changing")
    assert len(got) == len(expected) == 10
    for line, wanted in zip(got, expected, strict=True):
        assert line["learning_rate"] == wanted["learning_rate"]
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-5), line["step"]
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4), line["step"]
    scores = [
        json.loads((tmp_path / run / "summary.json").read_text())["models"]["student"]["kl"]
        for run in ("undisturbed", "changing")
    ]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)


def check_reshaped(results: list[dict]) -> None:
    """Compare masters and moments of all optimizers, all kinds of weights, buffers and rates, to the last bit."""
    assert len(results) == 6
    for result in results:
        optimizer, dtype, *stages = result["case"]
        assert result["stages"] == stages
        assert result["optimizer"].lower() == optimizer  # adam adds the decay to the gradient
        assert result["moments"] == MOMENTS[result["optimizer"]]
        assert result["bucket"] == 40 + 42 + 4  # only what trains, each value once
        assert result["differences"] == [], result["case"]
        goes_on, other = result["losses"]
        assert other == pytest.approx(goes_on, rel=1e-6 if dtype == "fp32" else 1e-2), result["case"]


def test_what_meets_must_stay_where_a_term_relates_examples(settings, tmp_path):
    settings["terms"]["rkd"] = {}
    make_checkpoint(tmp_path, 5, at_once=8)
    checkpoint.check(str(tmp_path), make_config(settings), 2)  # 4 on each of 2 ranks
    with pytest.raises(
        UserError, match=r"micro_batch_size × ranks: got 4, expected 8, .* terms\.rkd compares"
    ):
        checkpoint.check(str(tmp_path), make_config(settings), 1)
    del settings["terms"]["rkd"]
    checkpoint.check(str(tmp_path), make_config(settings), 1)
