"""The command line gives the scores that recipes on GLUE promise: a small run in two stages on two classes."""

import json
import random

import pytest
import yaml

from tests.conftest import BERT, sentence
from tests.engine.test_run import command

# Of multi_stage and multi_level.
PROMISED = {"kl", "rcs", "pearson", "spearman", "accuracy", "f1", "latency_ms"}


def test_train_and_evaluate_write_every_score_of_the_recipes(settings, tokenizer_dir, tmp_path):
    rng = random.Random(0)
    for name, rows in (("train", 24), ("dev", 12)):
        lines = [f"{'good ' * (i % 2)}{sentence(rng)}\t{i % 2}" for i in range(rows)]
        (tmp_path / f"{name}.tsv").write_text("text\tlabel\n" + "\n".join(lines) + "\n", encoding="utf-8")
    config = settings | {
        "run": settings["run"] | {"evaluate_every": "epoch"},
        "data": settings["data"] | {"train": "train.tsv", "dev": "dev.tsv", "tokenizer": str(tokenizer_dir)},
        "teacher": {"config": BERT, "zero_stage": 0},
        "student": {"config": BERT | {"num_hidden_layers": 2}},
        "terms": {"task": {}, "soft_label": {}},
        "stages": [
            {"name": "lower", "terms": {"pairwise": {"layers": [[1, 2]], "center": True}}},
            {"name": "upper", "terms": {"hidden": {}, "smooth": {}}},
        ],
        "evaluation": {"rcs": 2, "latency": True},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = command("train", "config.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    student, teacher = summary["models"]["student"], summary["models"]["teacher"]
    assert summary["peak_memory_mib"] > 50 and summary["steps"] == 6
    assert 0 < student["parameters"] < teacher["parameters"]
    assert PROMISED - {"latency_ms"} <= set(student)
    assert student["kl"] > 0 and 0 < student["rcs"] < 1 and teacher["kl"] == pytest.approx(0, abs=1e-6)

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if "evaluation" in line]
    assert [line["step"] for line in epochs] == [3, 6]
    for epoch in epochs:  # both losses of each epoch; the training loss is the mean over its steps
        steps = [x["loss"] for x in lines if "loss" in x and epoch["step"] - 3 < x["step"] <= epoch["step"]]
        assert epoch["training_loss"] == pytest.approx(sum(steps) / 3)
        assert epoch["evaluation"]["loss"] > 0
    assert epochs[-1]["evaluation"]["loss"] == pytest.approx(student["loss"])

    done = command("evaluate", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "run" / "summary.json").read_text())["models"]["student"]
    assert set(again) >= PROMISED | {"parameters", "loss"} and again["latency_ms"] > 0
    for name in PROMISED - {"latency_ms"}:
        assert again[name] == pytest.approx(student[name], rel=1e-4, abs=1e-6)
