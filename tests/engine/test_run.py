"""Whole runs: a teacher from a recipe, a baseline, language models, export and evaluate."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dsdistill.config.load import make_config
from dsdistill.data import Splits
from dsdistill.engine.run import _fingerprint
from dsdistill.engine.run_folder import RunFolder
from dsdistill.report import write_page
from tests.data.rig import made
from tests.engine.launch import launch, run_configs
from tests.engine.test_resume import losses


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "dsdistill", *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def write(path: Path, settings: dict) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Change into a new working folder, since recipes keep their teachers below it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_teachers_keep_their_names():
    """If a name changed, its teacher would be trained again."""
    settings = {"run": {"name": "tuned", "seed": 3}, "student": {"path": "a/model"}}
    config = make_config(settings | {"terms": {"task": {}}, "train": {"steps": 7}})
    part = made([[0, 1, 2], [3, 4]], labels=[1, 0])
    prepared = SimpleNamespace(config=config, data=Splits(part, {"": part}, ()))
    assert _fingerprint(prepared) == "tuned-890c6674860f"


def test_recipe_baseline_evaluate_export(settings, home):
    recipe = settings | {
        "run": {"name": "little-teacher"},
        "teacher": None,
        "student": {"path": settings["teacher"]["path"]},
        "terms": {"task": {}},
    }
    write(home / "teacher.yaml", recipe)
    settings["teacher"] = {"recipe": "teacher.yaml", "zero_stage": 3}
    settings["student"] = {"from_teacher": [2, 4]}
    settings["run"]["baseline"] = True
    settings["student"]["deepspeed"] = {
        "csv_monitor": {"enabled": True, "output_path": str(home / "monitor")}
    }
    log = run_configs([write(home / "config.yaml", settings)])
    assert "training the teacher of teacher.yaml" in log
    bar = r"10/10 \[\d+:\d+<00:00, loss=\d\S*, \d\S* s/step, [\d,]*\d tokens/s, [\d,]*\d MiB\]"
    assert re.search(bar, log)

    run = Path(settings["run"]["dir"])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["zero_stage"] == {"teacher": 3, "student": 2}
    assert set(summary["models"]) == {"teacher", "student", "baseline"}
    assert {"attention_alignment", "hidden_alignment", "pairwise_alignment"} <= set(summary["backends"])
    for scores in summary["models"].values():
        assert {"accuracy", "macro_f1", "kl", "parameters", "tokens_per_second"} <= set(scores)
    assert summary["models"]["teacher"]["kl"] == 0
    told = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    for name in ("teacher", "student"):  # of both ranks
        right = sum(line[name] == line["label"] for line in told) / 11
        assert len(told) == 11 and summary["models"][name]["accuracy"] == pytest.approx(right)
    assert summary["models"]["student"]["parameters"] < summary["models"]["teacher"]["parameters"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert set(lines[0]["terms"]) == {"task", "soft_label", "hidden", "attention", "pairwise"}
    assert all(line["grad_norm"] > 0 and line["tokens_per_second"] > 0 for line in lines)
    # A monitor of DeepSpeed's gets every term of the student's run, then the baseline's loss.
    watched = {path.stem: path.read_text().split()[1:] for path in (home / "monitor").rglob("Train_*.csv")}
    assert {"Train_loss", *(f"Train_{name}" for name in lines[0]["terms"])} <= set(watched)
    for row, line in zip(watched["Train_loss"], lines, strict=False):
        assert row.split(",") == [str(8 * line["step"]), str(line["loss"])]
    # Distilling brings the student nearer to the teacher than the labels alone do.
    assert summary["models"]["student"]["kl"] < summary["models"]["baseline"]["kl"]

    # A second run finds everything done, and the teacher is not trained again.
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*.safetensors")}
    assert "is finished" in run_configs([home / "config.yaml"])
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*.safetensors")} == before

    # Unchanged, and as if trained on a GPU, with a GPU backend, in fp16: without a GPU it is evaluated in fp32.
    as_it_is = (run / "config.yaml").read_text()
    for dtype in ("fp32",) if torch.cuda.is_available() else ("fp32", "fp16"):
        (run / "config.yaml").write_text(
            as_it_is.replace("dtype: fp32", f"dtype: {dtype}").replace("backend: auto", "backend: cuda")
        )
        done = command("evaluate", run, cwd=home)
        assert done.returncode == 0, done.stderr
        assert ("it is evaluated in fp32" in done.stderr) == (dtype == "fp16")
        again = json.loads((run / "summary.json").read_text())["models"]
        for name in ("teacher", "student"):
            for metric in ("accuracy", "kl"):
                assert again[name][metric] == pytest.approx(
                    summary["models"][name][metric], rel=1e-4, abs=1e-6
                )
    (run / "config.yaml").write_text(as_it_is)

    done = command("export", run, "--out", "exported", cwd=home)
    assert done.returncode == 0, done.stderr
    model = AutoModelForSequenceClassification.from_pretrained(home / "exported").eval()
    assert model.config.num_hidden_layers == 2
    assert list(model.config.id2label.values()) == ["a", "b", "c"]
    assert not [key for key in model.state_dict() if "projector" in key]
    tokenizer = AutoTokenizer.from_pretrained(home / "exported")
    rows = [line.split("\t") for line in Path(settings["data"]["dev"]).read_text().splitlines()[1:]]
    with torch.no_grad():
        inputs = tokenizer(
            [row[0] for row in rows], padding=True, truncation=True, max_length=32, return_tensors="pt"
        )
        predicted = model(**inputs).logits.argmax(-1).tolist()
    right = sum(model.config.id2label[p] == row[1] for p, row in zip(predicted, rows, strict=True))
    assert right / len(rows) == pytest.approx(summary["models"]["student"]["accuracy"])

    done = command("export", run, "--out", "exported", cwd=home)
    assert done.returncode == 2 and "not empty" in done.stderr

    (home / "empty").mkdir()
    done = command("export", run, "--out", ".", cwd=home / "empty")
    assert done.returncode == 0, done.stderr
    names = {path.name: path.stat().st_size for path in (home / "exported").iterdir()}
    assert {path.name: path.stat().st_size for path in (home / "empty").iterdir()} == names


def test_language_models_train_alike_on_any_number_of_ranks(settings, home, data_dir, tokenizer_dir):
    """Heads are sharded and tied; vocabularies are padded differently; accumulation, checkpointing, an uneven step."""
    decoder = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "hidden_size": 32,
        "tie_word_embeddings": True,
    }
    settings |= {
        "task": "causal_lm",
        "data": {
            "source": "files",
            "train": str(data_dir / "train.txt"),
            "dev": str(data_dir / "dev.txt"),
            "max_length": 32,
            "max_train": 45,
            "tokenizer": str(tokenizer_dir),
            "cache": str(home / "cache"),
        },
        "teacher": {
            "config": decoder | {"model_type": "llama", "num_hidden_layers": 4, "vocab_size": 64},
            "zero_stage": 3,
        },
        "train": settings["train"] | {"epochs": 1},
    }
    paths = {1: [], 2: []}
    for ranks, stage, checkpointing in ((1, 1, False), (2, 2, False), (2, 3, False), (2, 3, True)):
        name = f"ranks{ranks}-zero{stage}-{checkpointing}"
        case = settings | {
            "run": {"name": name, "dir": str(home / name), "log_every": 1},
            "student": {
                "config": decoder | {"model_type": "qwen2", "num_hidden_layers": 2, "vocab_size": 60},
                "zero_stage": stage,
                "gradient_checkpointing": checkpointing,
            },
        }
        paths[ranks].append(write(home / f"{name}.yaml", case))
    for ranks in paths:
        run_configs(paths[ranks], ranks=ranks)
    expected = losses(home / paths[1][0].stem)
    assert len(expected) == 6
    for path in paths[2]:
        for want, line in zip(expected, losses(home / path.stem), strict=True):
            assert line["loss"] == pytest.approx(want["loss"], rel=1e-5)
            for name, term in want["terms"].items():
                assert line["terms"][name]["raw"] == pytest.approx(term["raw"], rel=1e-5, abs=1e-6), (
                    path,
                    name,
                )
    summary = json.loads((home / paths[2][-1].stem / "summary.json").read_text())
    for scores in summary["models"].values():
        assert 1 < scores["perplexity"] < 100
    assert not (home / paths[2][-1].stem / "predictions.jsonl").exists()  # there are none for tokens
    page = Path(write_page(str(home / paths[2][-1].stem))).read_text(encoding="utf-8")
    assert "perplexity" in page and 'id="curves"' in page and 'id="examples"' not in page


def test_a_refusal_by_the_first_rank_alone_ends_all_in_one_line(settings, home):
    """Only rank 0 opens the run folder; the other ranks must not wait for it, or fail because it is missing."""
    run = Path(settings["run"]["dir"])
    RunFolder(str(run)).open(make_config(settings))
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)  # the run had begun
    RunFolder(str(run)).release()
    done = launch("--module", "dsdistill", "train", write(home / "config.yaml", settings), "train.epochs=3")
    assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("dsdistill: ")]
    assert len(lines) == 1 and "train.epochs: got 3, expected 2 as at this run's start" in lines[0]
