"""Each script of launch/examples runs as typed, in few steps, and is short enough to be read quickly."""

import importlib
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from dsdistill.data import docstring_pairs
from dsdistill.data.table import Table
from dsdistill.models.build import locate

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "launch" / "examples").glob("*.py"))


def run(*command: object) -> str:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'launch' / 'examples'}"}
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_is_short(path):
    assert path.read_text(encoding="utf-8").count("\n") < 60


@pytest.mark.parametrize("ranks", [1, 2])
def test_own_loop(tmp_path, ranks):
    """The student learns, alone and under torchrun, and is saved as a plain model."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--nproc_per_node", ranks, "--standalone"]
    printed = run(*start, ROOT / "launch/examples/own_loop.py", tmp_path / "student", 5)
    values = [float(value) for value in re.findall(r"attention ([\d.]+)", printed)]
    assert len(values) == 2 and values[1] < 0.8 * values[0], printed
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert model.config.num_hidden_layers == 3 and (tmp_path / "student" / "tokenizer.json").is_file()
    assert not any("projector" in name for name in load_file(tmp_path / "student" / "model.safetensors"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_hf_trainer(tmp_path, ranks):
    """The vectors come nearer to the teacher's, and the student is a plain encoder."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--nproc_per_node", ranks, "--standalone"]
    printed = run(*start, ROOT / "launch/examples/hf_trainer.py", tmp_path / "student", 10)
    first, last = (float(value) for value in re.findall(r"'embedding': '([\d.]+)'", printed))
    measured = [float(value) for value in re.findall(r"'eval_embedding': ([\d.]+)", printed)]
    assert 0 < last < 0.95 * first and len(measured) == ranks and 0 < measured[0] < first, printed
    model = AutoModel.from_pretrained(tmp_path / "student")
    assert model.config.num_hidden_layers == 3 and (tmp_path / "student" / "tokenizer.json").is_file()


def test_operators():
    printed = run(sys.executable, ROOT / "launch/examples/operators.py", 64)
    pairs = re.findall(r"fused ([\d.]+) +plain ([\d.]+)", printed)
    assert len(pairs) == 4, printed
    for fused, plain in pairs:
        assert float(fused) == pytest.approx(float(plain), rel=1e-5)


def test_new_term(settings, tmp_path):
    """As a plugin of a config the term is trained, logged, resumed and exported like any other term."""
    settings["terms"] = {"length": {"weight": 0.5}}
    settings["plugins"] = ["new_term"]
    settings["train"] |= {"steps": 8, "learning_rate": 5e-3}
    settings["run"] = {"dir": str(tmp_path / "run"), "save_every": 2, "log_every": 1}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    command = (sys.executable, "-m", "dsdistill")
    run(*command, "train", path)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["terms"]["length"] for line in lines if "terms" in line]
    assert len(losses) == 8 and losses[-1]["raw"] < losses[0]["raw"]
    assert losses[0]["weighted"] == pytest.approx(0.5 * losses[0]["raw"])
    assert "finished" in run(*command, "train", path) or (tmp_path / "run" / "summary.json").is_file()
    run(*command, "export", tmp_path / "run", "--out", tmp_path / "student")
    assert (tmp_path / "student" / "model.safetensors").is_file()


def test_serve(models_dir):
    """Each line of a request gets the probabilities that the model gives it; a request without text is refused."""
    texts = ["the shape of a tensor", "open the file and read each line of it"]
    command = [sys.executable, str(ROOT / "launch/examples/serve.py"), str(models_dir / "teacher")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = server.stdout.readline().strip()
            with urllib.request.urlopen(address, "\n".join(texts).encode(), timeout=60) as reply:
                answers = json.loads(reply.read())
            with pytest.raises(urllib.error.HTTPError, match="400"):
                urllib.request.urlopen(address, b"", timeout=60)
        finally:
            server.terminate()
    model = AutoModelForSequenceClassification.from_pretrained(models_dir / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(models_dir / "teacher")
    for text, answer in zip(texts, answers, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        assert list(answer) == ["a", "b", "c"]
        assert list(answer.values()) == pytest.approx(expected.tolist(), abs=1e-3)


def test_search(tmp_path, monkeypatch, capsys):
    """Both models find the one document that a query is about, and each line names it."""
    monkeypatch.chdir(ROOT / "launch" / "examples")
    monkeypatch.syspath_prepend(".")
    search = importlib.import_module("search")
    documents = [f"Plot the chart number {number} in another colour." for number in range(70)]
    documents[66] = "Return the largest element of the array, or the first of several. " * 9
    rows = {"id": [f"module:{number}" for number in range(70)], "query": documents, "document": documents}
    monkeypatch.setattr(
        docstring_pairs, "table", lambda split, cache: Table("pairs", rows, range(1, 71), "row")
    )
    encoder = tmp_path / "encoder"
    cut = AutoModel.from_pretrained(locate("minilm", "teacher"), num_hidden_layers=5)
    cut = cut.bfloat16()  # as `export` writes a run in bf16
    cut.save_pretrained(encoder)
    AutoTokenizer.from_pretrained(locate("minilm", "teacher")).save_pretrained(encoder)
    monkeypatch.setattr(sys, "argv", ["search.py", str(encoder), "maximum of a list"])
    capsys.readouterr()
    search.main()
    lines = capsys.readouterr().out.split("\n")
    assert lines[1] == "maximum of a list" and len(lines) == 5
    assert [line.split()[0] for line in lines[2:4]] == ["teacher", "student"]
    assert [line.split()[2] for line in lines[2:4]] == ["module:66"] * 2
