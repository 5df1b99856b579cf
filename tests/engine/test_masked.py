"""A masked language model is tested from its tokenizer to its export."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForMaskedLM

from tests.conftest import BERT
from tests.engine.launch import run_configs
from tests.engine.test_resume import losses
from tests.engine.test_run import command

SMALL = BERT | {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "hidden_dropout_prob": 0.1}


@pytest.fixture
def masked(settings, data_dir, tmp_path, monkeypatch):
    """Return settings with a teacher from a recipe, which also trains the tokenizer, and a student cut from it."""
    monkeypatch.chdir(tmp_path)
    files = {"source": "files", "train": [str(data_dir / "train.tsv")], "dev": str(data_dir / "dev.tsv")}
    files |= {"max_length": 32, "cache": str(tmp_path / "cache")}
    recipe = {
        "task": "masked_lm",
        "run": {"name": "masked-teacher"},
        "data": files | {"train_tokenizer": 120},
        "student": {"config": SMALL},
        "terms": {"task": {}},
        "train": settings["train"] | {"epochs": 1},
    }
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(recipe))
    return settings | {
        "task": "masked_lm",
        "data": files,
        "teacher": {"recipe": "teacher.yaml", "zero_stage": 3},
        "student": {"from_teacher": [2], "zero_stage": 2},
    }


def write(folder, settings, name, **student):
    case = settings | {"run": settings["run"] | {"name": name, "dir": str(folder / name)}}
    case["student"] = case["student"] | student
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(case))
    return path


def test_train_evaluate_and_export_on_any_number_of_ranks(masked, tmp_path):
    masked["student"]["config"] = {"hidden_dropout_prob": 0.0}
    one = write(tmp_path, masked, "one")
    run_configs([one], ranks=1)
    sharded = [write(tmp_path, masked, "zero3", zero_stage=3)]
    run_configs(sharded)
    expected = losses(tmp_path / "one")
    assert len(expected) == 10
    for path in sharded:
        for want, line in zip(expected, losses(tmp_path / path.stem), strict=True):
            assert line["loss"] == pytest.approx(want["loss"], rel=1e-4)

    summary = json.loads((tmp_path / "one" / "summary.json").read_text())["models"]
    assert 1 < summary["student"]["perplexity"] < 200 and summary["student"]["kl"] > 0
    done = command("evaluate", "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "one" / "summary.json").read_text())["models"]
    for name in ("perplexity", "kl"):
        assert again["student"][name] == pytest.approx(summary["student"][name], rel=1e-4)
    assert command("export", "one", "--out", "exported", cwd=tmp_path).returncode == 0
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "exported")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model(input_ids=torch.tensor([[2, 7, 4, 3]])).logits.shape == (1, 4, 120)
