"""This version resumes, evaluates and exports a run folder that an earlier version wrote."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.engine.launch import ROOT

FORMAT_1 = Path(__file__).with_name("format_1")
ENVIRONMENT = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def dsdistill(folder: Path, *arguments: str) -> str:
    """Run a command in `folder`; return its standard error."""
    command = [sys.executable, "-m", "dsdistill", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def losses(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_format_1_is_stored_as_it_was():
    """Git carries every file of the folder, and none names a path of the machine that wrote it."""
    files = [path for path in FORMAT_1.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2**20
    assert not [path for path in files if any(root in path.read_bytes() for root in (b"/home", b"/tmp"))]
    assert "format:" not in (FORMAT_1 / "run" / "config.yaml").read_text(encoding="utf-8")
    if (ROOT / ".git").exists():
        command = ["git", "check-ignore", "--no-index", *map(str, files)]
        hidden = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert hidden.returncode == 1, hidden.stdout


@pytest.mark.parametrize("config", ["run/config.yaml", "config.yaml"])
def test_a_run_of_format_1_goes_on(tmp_path, config):
    home = tmp_path / "copy"
    shutil.copytree(FORMAT_1, home)
    said = dsdistill(home, "train", config)
    assert "resuming from step-00000004" in said
    expected, got = losses(home / "losses.jsonl"), losses(home / "run" / "metrics.jsonl")
    assert [line["step"] for line in got] == list(range(1, 9))
    for there, here in zip(expected, got, strict=True):
        assert here["loss"] == pytest.approx(
            there["loss"], rel=1e-3
        )  # another processor may have written them
        raw = {name: term["raw"] for name, term in here["terms"].items()}
        assert raw == pytest.approx(there["terms"], rel=1e-3)  # another processor may have written them
    if config == "config.yaml":
        return
    dsdistill(home, "evaluate", "run")
    summary = json.loads((home / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["finished"] and summary["evaluated"] == "step-00000008"
    dsdistill(home, "export", "run", "--out", "student")
    model = AutoModelForSequenceClassification.from_pretrained(home / "student")
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (2, 16)
    assert len(AutoTokenizer.from_pretrained(home / "student")) == 32
