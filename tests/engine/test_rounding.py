"""A run in bf16 must not round frozen weights, the start of what trains, and the weights that are scored."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dsdistill.engine.export import export
from tests.conftest import merge
from tests.engine.launch import launch, run_configs
from tests.engine.test_heads import causal, save, write  # noqa: F401  (a fixture)


@pytest.fixture
def still(settings):
    """Settings of a run in bf16 whose steps are too small to move a float32 weight."""
    settings["run"] |= {"save_every": 2, "keep": 9}
    settings["teacher"]["zero_stage"] = 0
    settings["terms"] = {"task": {}, "hidden": {}}
    settings["train"] |= {"steps": 6, "learning_rate": 1e-30, "dtype": "bf16"}
    settings["student"]["freeze"] = ["*position_embeddings*"]
    settings["stages"] = [
        {"name": "lower", "freeze": ["*layer.1*"]},
        {"name": "upper", "freeze": ["*word_embeddings*"], "terms": {"smooth": {}}},
    ]
    return settings


def in_stage(settings: dict, folder: Path, name: str, zero_stage: int) -> str:
    path = folder / f"{name}-{zero_stage}.yaml"
    change = {"student.zero_stage": zero_stage, "run.dir": str(folder / name)}
    path.write_text(yaml.safe_dump(merge(settings, change)))
    return str(path)


def check_same(exported: Path, source: Path) -> None:
    """Every weight equals the source's, or is a bias of 0 moved by steps of 1e-30; bf16 would change nearly all."""
    expected, got = (load_file(folder / "model.safetensors") for folder in (source, exported))
    assert got.keys() == expected.keys()
    assert any(not torch.equal(value, value.bfloat16().float()) for value in expected.values())
    for name, value in expected.items():
        assert (got[name] - value).abs().max() < 1e-25, name


def test_weights_are_not_rounded(still, models_dir, tmp_path):
    """Two stages freeze different parts, under each ZeRO stage; one run resumes with other ranks and ZeRO stages."""
    paths = [in_stage(still, tmp_path, "one-3", 3)]
    paths += [in_stage(still, tmp_path, "resumed", 1), in_stage(still, tmp_path, "resumed", 1) + "@2"]
    run_configs(paths, ranks=1)
    paths = [in_stage(still, tmp_path, f"two-{stage}", stage) for stage in (1, 2, 3)]
    paths += [in_stage(still, tmp_path, "resumed", 3) + "@2"]
    run_configs(paths)
    for name in ("one-3", "two-1", "two-2", "two-3", "resumed"):
        export(str(tmp_path / name), str(tmp_path / f"{name}-exported"), dtype="fp32")
        check_same(tmp_path / f"{name}-exported", models_dir / "student")
        handed = load_file(tmp_path / name / "stages" / "lower.safetensors")
        body = {key.removeprefix("body."): value for key, value in handed.items() if key.startswith("body.")}
        for key, value in load_file(models_dir / "student" / "model.safetensors").items():
            assert (body[key] - value).abs().max() < 1e-25, (name, key)


def test_a_tied_frozen_head(causal, tokenizer_dir, tmp_path):  # noqa: F811
    """It has two names but is saved once."""
    folder = save(tmp_path / "teacher", tokenizer_dir, tied=True)
    change = {"student": {"path": str(folder), "freeze": ["*embed_tokens*"]}}
    change |= {"train.dtype": "bf16", "train.learning_rate": 1e-30}
    run_configs([write(tmp_path, merge(causal, change), "run")], ranks=1)
    export(str(tmp_path / "run"), str(tmp_path / "exported"), dtype="fp32")
    check_same(tmp_path / "exported", folder)
    name = "model.embed_tokens.weight"
    expected, got = (load_file(path / "model.safetensors")[name] for path in (folder, tmp_path / "exported"))
    assert torch.equal(got, expected)


def test_evaluate_scores_as_the_run_did(causal, settings, models_dir, tokenizer_dir, tmp_path):  # noqa: F811
    """A decoder and a classifier are scored; weights in float32 would give other numbers."""
    save(tmp_path / "teacher", tokenizer_dir, tied=True)
    change = {"student": {"from_teacher": [1, 4]}, "terms": {"task": {}, "soft_label": {}}}
    change |= {"train.dtype": "bf16", "train.steps": 3, "data.max_train": 64, "data.max_dev": 64}
    decoder = write(tmp_path, merge(causal, change), "decoder")
    classifier = write(tmp_path, merge(settings, {"train.dtype": "bf16"}), "classifier")
    run_configs([decoder, classifier], ranks=1)
    runs = [tmp_path / name for name in ("decoder", "classifier")]
    summaries = [json.loads((run / "summary.json").read_text())["models"] for run in runs]
    code = "import sys, dsdistill; [dsdistill.evaluate(run) for run in sys.argv[1:]]"
    done = launch("-c", code, *runs, ranks=1)
    assert done.returncode == 0, done.stderr
    for run, before in zip(runs, summaries, strict=True):
        after = json.loads((run / "summary.json").read_text())["models"]
        for model in ("student", "teacher"):
            scores = before[model].keys() - {"tokens_per_second"}
            assert len(scores) > 2
            assert {key: after[model][key] for key in scores} == {key: before[model][key] for key in scores}
