"""Runs over mixed texts (data.mixup) on one rank and on two."""

import pytest

from tests.engine.launch import run_configs
from tests.engine.test_resume import losses, write


def test_two_ranks_with_everything_sharded_are_one(settings, tmp_path):
    """Two ranks with teacher and student under ZeRO-3 must equal one rank with neither, whose embeddings are whole."""
    settings["terms"] = {"task": {}, "soft_label": {"divergence": "logit_mse"}, "hidden": {}}
    settings["train"] |= {"steps": 4}
    settings["data"] |= {"mixup": 0.4}
    settings["student"] |= {"config": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
    run_configs([write(settings | {"student": settings["student"] | {"zero_stage": 3}}, tmp_path, "sharded")])
    settings["teacher"] |= {"zero_stage": 0}
    run_configs([write(settings, tmp_path, "whole")], ranks=1)
    sharded, whole = losses(tmp_path / "sharded"), losses(tmp_path / "whole")
    assert len(whole) == 4
    assert [line["loss"] for line in sharded] == pytest.approx([line["loss"] for line in whole], rel=1e-4)
    settings["data"] = {name: value for name, value in settings["data"].items() if name != "mixup"}
    run_configs([write(settings, tmp_path, "plain")], ranks=1)
    assert losses(tmp_path / "plain")[0]["loss"] != pytest.approx(whole[0]["loss"], rel=1e-3)
