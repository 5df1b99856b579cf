"""Stages have terms of their own, schedules that begin anew, frozen parameters, and resume in the middle."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dsdistill.config import UserError
from dsdistill.config.load import make_config
from dsdistill.engine import checkpoint, stages
from dsdistill.engine.export import find_checkpoint, load_student, read_config
from dsdistill.engine.passes.stability import stability
from dsdistill.engine.prepare import prepare
from tests.conftest import BERT
from tests.engine.launch import run_configs
from tests.engine.test_resume import kill_at, losses, steps_done, write


@pytest.fixture
def staged(settings):
    """Return 24 steps in stages of 8: the lower layer, then both with a frozen embedding, then all; dropout on."""
    settings["student"] |= {"config": {"hidden_dropout_prob": 0.1}, "freeze": ["*layer.0.output*"]}
    settings["run"] |= {"save_every": 3, "keep": 3}
    settings["train"] |= {"steps": 24, "micro_batch_size": 2, "distill_weight": 0.5}
    settings["terms"] = {"task": {}, "soft_label": {}, "hidden": {"layers": "uniform"}}
    settings["evaluation"] = {"rcs": 3}
    settings["stages"] = [
        {"name": "lower", "terms": {"hidden": {"layers": [[1, 2]], "embedding": False}}},
        {
            "name": "middle",
            "terms": {"hidden": {"layer_weights": "dynamic"}, "smooth": {}},
            "freeze": ["*embeddings*"],
            "learning_rate": 2e-3,
        },
        {"name": "upper", "terms": {"attention": {}, "pairwise": {"center": True}, "smooth": {}}},
    ]
    return settings


def lines(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "loss" in line]


def test_stages_follow_each_other_and_resume_exactly(staged, tmp_path):
    staged["student"]["zero_stage"] = 3
    undisturbed, killed = (write(staged, tmp_path, name) for name in ("undisturbed", "killed"))
    run = tmp_path / "killed"
    kill_at(killed, run, step=12)  # in the middle of the second stage
    assert 12 <= steps_done(run) < 24
    log = run_configs([undisturbed, killed])
    assert "stage lower: task, soft_label, hidden" in log
    assert losses(run) == losses(tmp_path / "undisturbed")

    found = lines(tmp_path / "undisturbed")
    assert [line["stage"] for line in found] == ["lower"] * 8 + ["middle"] * 8 + ["upper"] * 8
    assert set(found[0]["terms"]) == {"task", "soft_label", "hidden"}
    assert set(found[-1]["terms"]) == {"task", "soft_label", "hidden", "attention", "pairwise", "smooth"}
    # Linear schedules without a warm-up step: each starts at its highest rate and falls to 1/8 of it.
    rates = [line["learning_rate"] for line in found]
    for start, highest in ((0, 1e-3), (8, 2e-3), (16, 1e-3)):
        assert rates[start : start + 8] == pytest.approx([highest * (8 - k) / 8 for k in range(8)])
    # The weight w = 1/2 halves all; smooth's own is 0.1.
    for name, term in found[-1]["terms"].items():
        assert term["weighted"] == pytest.approx(0.5 * term["raw"] * (0.1 if name == "smooth" else 1))
    # When a stage starts, only dropout makes a difference; later the student has moved.
    smooth = [line["terms"]["smooth"]["raw"] for line in found[8:16]]
    assert smooth[-1] > smooth[0] > 0
    weights = [line["terms"]["hidden"]["layer_weights"] for line in found[8:16]]
    assert weights[0] == [1, 1, 1] and weights[-1] != weights[0]
    assert all(math.isclose(sum(row), 3) for row in weights)

    ended = [
        load_file(stages.weights_path(str(tmp_path / "undisturbed"), name)) for name in ("lower", "middle")
    ]
    for name in ended[0]:
        if name.startswith("body."):
            same = torch.equal(ended[0][name], ended[1][name])
            assert same == ("embeddings" in name or "layer.0.output" in name), name
    # What both stages train continues; each stage of the run kept its representations.
    assert "objective.terms.hidden.projectors.1-2.weight" in ended[0]
    kept = sorted(path.name for path in (tmp_path / "undisturbed" / "representations").iterdir())
    assert kept == ["step-00000008.npy", "step-00000016.npy", "step-00000024.npy"]
    load_student(str(run), read_config(str(run)), find_checkpoint(str(run)))


def test_a_kill_between_two_stages(staged, tmp_path):
    """The last checkpoint of a stage exists, but not yet what the stage passes on."""
    staged["stages"], staged["run"]["save_every"] = staged["stages"][:2], 0
    staged["train"]["steps"] = 8
    whole, cut = (write(staged, tmp_path, name) for name in ("whole", "cut"))
    run_configs([whole, cut], ranks=1)
    run = tmp_path / "cut"
    for path in (run / "checkpoints").glob("step-00000008*"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    (run / "stages" / "lower.safetensors").unlink()
    (run / "summary.json").unlink()
    (run / "checkpoints" / "newest").unlink()
    assert checkpoint.newest(str(run)) == "step-00000004"
    run_configs([cut], ranks=1)
    assert losses(run) == losses(tmp_path / "whole")


def test_ends():
    config = make_config(
        {
            "student": {"path": "s"},
            "stages": [
                {"name": "a", "share": 1, "terms": {"task": {}}},
                {"name": "b", "share": 2, "terms": {"task": {}}},
                {"name": "c", "share": 0.001, "terms": {"task": {}}},
            ],
        }
    )
    assert stages.ends(config, 9) == [3, 8, 9]
    assert stages.ends(config, 3) == [1, 2, 3]
    with pytest.raises(UserError, match=r"train.steps: got 2, expected at least one for each of 3"):
        stages.ends(config, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"freeze": ["*layer.9*"]}, r"stages.0.freeze: got \*layer.9\*, which matches no parameter"),
        (
            {"freeze": ["*"]},
            "stages.0.freeze: got patterns that match every parameter, expected some parameters left to train",
        ),
        ({"terms": {"smooth": {}}}, "stages.0.terms.smooth: got no stage before this one"),
        (
            {"terms": {"hidden": {"layers": "emd", "layer_weights": "dynamic"}}},
            "stages.0.terms.hidden.layer_weights",
        ),
        ({"terms": {"task": None}}, "train.distill_weight: got stages.0.terms with only soft_label, hidden"),
        ({"name": "middle"}, "stages: got names"),
    ],
)
def test_refused(staged, change, message):
    staged["stages"][0] |= change
    with pytest.raises(UserError, match=message):
        prepare(make_config(staged), world_size=1)


def test_no_consistency_score_without_the_distance_to_the_teacher(staged, tokenizer_dir, tmp_path):
    """A student that never moved would score best; a teacher without a trained head gives no distance."""
    bare = staged | {
        "terms": {"task": {}, "hidden": {}},
        "stages": [],
        "teacher": {"config": BERT},
        "data": staged["data"] | {"tokenizer": str(tokenizer_dir)},
    }
    with pytest.raises(UserError, match=r"evaluation.rcs: got 3 with a teacher whose head is not trained"):
        prepare(make_config(bare), world_size=1)
    assert not prepare(make_config(bare | {"evaluation": {}}), world_size=1).judged
    bare |= {"evaluation": {}, "data": bare["data"] | {"sampler": "entropy"}}
    with pytest.raises(
        UserError, match=r"data.sampler: got entropy with a teacher whose head is not trained"
    ):
        prepare(make_config(bare), world_size=1)
    (tmp_path / "representations").mkdir()
    for step in (1, 2):
        np.save(tmp_path / "representations" / f"step-{step:08d}.npy", np.eye(5) + step)
    assert stability({"accuracy": 0.5}, str(tmp_path), 2) == {}
    assert stability({"accuracy": 0.5, "kl": 0.1}, str(tmp_path), 1) == {}
    assert set(stability({"accuracy": 0.5, "kl": 0.1}, str(tmp_path), 2)) == {"rcs", "cka_distance"}


def test_a_stage_changes_the_runs_terms(staged):
    first, second, third = make_config(staged).run_stages
    assert first.terms.hidden.layers == ((1, 2),) and not first.terms.hidden.embedding
    assert second.terms.hidden.layers == "uniform" and second.terms.hidden.embedding
    assert third.terms.soft_label is not None and first.terms.smooth is None
    staged["stages"][0]["terms"]["soft_label"] = None
    assert make_config(staged).run_stages[0].terms.soft_label is None
