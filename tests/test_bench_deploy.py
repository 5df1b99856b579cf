"""The benchmark of deployed models has a row for every contender, and it keeps to a limit of memory."""

import json
import sys

import pytest

from dsdistill import cli
from tests.conftest import merge, small_run
from tests.engine.launch import run_configs
from tests.engine.test_heads import write

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from dsdistill.bench import deploy


@pytest.fixture(scope="module")
def run(models_dir, data_dir, tmp_path_factory):
    """Do a run of one step with a teacher of 4 layers and a student of 2."""
    folder = tmp_path_factory.mktemp("deployed")
    change = {"terms": {"task": {}, "soft_label": {}}, "train.steps": 1}
    run_configs([write(folder, merge(small_run(models_dir, data_dir, folder), change), "run")], ranks=1)
    return str(folder / "run")


def test_every_contender_has_its_row_and_who_does_not_fit_is_named(run, tmp_path, capsys):
    """PyTorch alone needs more than 96 MiB; a tiny graph on ONNX Runtime, without torch, needs less."""
    table, picture = tmp_path / "deploy.json", tmp_path / "deploy.png"
    options, chosen = {"threads": 1, "batch": 4, "examples": 3}, ["int8", "onnx", "pytorch"]
    arguments = {"memory": "96MiB", "json_path": table, "plot_path": picture}
    assert deploy.run_deploy(run, options=options, backends=chosen, **arguments) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(table.read_text())
    rows = {(row["model"], row["backend"]): row for row in found["rows"]}
    assert list(rows) == [(m, b) for m in ("student", "teacher") for b in ("pytorch", "onnx", "int8")]
    assert all(row["fits"] == (backend != "pytorch") for (_, backend), row in rows.items())
    for backend in ("pytorch", "onnx", "int8"):
        assert rows["student", backend]["file_mib"] < rows["teacher", backend]["file_mib"]
    measured = [row for row in rows.values() if row["fits"]]
    assert all(row["threads"] == 1 and row["texts_per_second"] > 0 for row in measured)
    assert all(0 < row["p50_ms"] <= row["p95_ms"] for row in measured)
    told = capsys.readouterr().out
    assert told.count("does not fit into 96 MiB") == 2 and "RLIMIT_DATA" in told
    assert found["machine"]["onnxruntime"] in told and "limits of this processor" in told and "RK3399" in told


def test_a_model_on_pytorch(run, tmp_path):
    table = tmp_path / "deploy.json"
    options = {"threads": 1, "batch": 2, "examples": 2}
    assert deploy.run_deploy(run, options=options, backends=["pytorch"], json_path=table) == 0
    rows = json.loads(table.read_text())["rows"]
    assert [row["model"] for row in rows] == ["student", "teacher"]
    assert all(row["fits"] and row["peak_mib"] > 100 and 0 < row["p50_ms"] <= row["p95_ms"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["deploy"], "bench deploy: got no run, expected the folder of a run"),
        (["deploy", "nowhere"], "nowhere: got no such folder, expected a run folder"),
        (["deploy", "run", "--shapes", "tokens=3"], "bench option: got 'tokens', expected one of 'threads'"),
        (["deploy", "run", "--shapes", "threads=0"], "bench threads: got 0, expected a number from 1"),
        (
            ["deploy", "run", "--backends", "tflite"],
            "bench backends: got ['tflite'], expected some of pytorch",
        ),
        (["deploy", "run", "--memory", "much"], "--memory: got 'much', expected a size such as 512MiB"),
        (["deploy", "run", "--memory", "1MiB"], "--memory: got '1MiB', expected a size such as 512MiB"),
        (["load", "run"], "bench RUN: got run, expected nothing: only deploy takes it"),
        (["load", "--memory", "1GiB"], "bench --memory: got 1GiB, expected nothing: only deploy takes it"),
    ],
)
def test_what_cannot_be_measured_is_refused(monkeypatch, capsys, arguments, told):
    monkeypatch.setattr(sys, "argv", ["dsdistill", "bench", *arguments])
    assert cli.run() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dsdistill: {told}")
