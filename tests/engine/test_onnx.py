"""An ONNX graph computes the same as the model, for any batch and length, and padding changes nothing."""

import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from dsdistill import cli
from dsdistill.config import RunError
from tests.conftest import BERT, merge
from tests.engine.launch import run_configs
from tests.engine.test_heads import LLAMA, write

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from dsdistill.engine import onnx_graph
from dsdistill.engine.onnx_graph import CLOSE, Deployed, open_session

KINDS = {
    "classification": (AutoModelForSequenceClassification, BERT | {"num_labels": 3}, None),
    "embedding": (AutoModel, BERT, "mean"),
    "causal_lm": (AutoModelForCausalLM, {"model_type": "llama", **LLAMA}, None),
}


def peaked(task: str) -> Deployed:
    torch.manual_seed(0)
    made, settings, pooling = KINDS[task]
    settings = dict(settings, num_hidden_layers=2)
    model = made.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return Deployed(model, task, pooling)


def run(session, given):
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in given.items()})[0])


@pytest.mark.parametrize("task", sorted(KINDS))
def test_a_graph_computes_what_the_model_computes(tmp_path, task):
    deployed = peaked(task)
    found = onnx_graph.write_all(deployed, str(tmp_path), 32, int8=True)
    assert sorted(found) == ["model.int8.onnx", "model.onnx"]
    assert found["model.int8.onnx"] > CLOSE  # int8 is another model, and the difference is reported
    whole, small = ((tmp_path / name).stat().st_size for name in ("model.onnx", "model.int8.onnx"))
    assert small < whole
    session = open_session(str(tmp_path / "model.onnx"))
    assert [given.name for given in session.get_inputs()] == onnx_graph.input_names(deployed.model)
    rows = [torch.arange(5, 5 + length) for length in (19, 7, 2, 11)]  # shapes that the export has not seen
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    given = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in onnx_graph.input_names(deployed.model):
        given["token_type_ids"] = torch.zeros_like(ids)
    together = run(session, given)
    for i, row in enumerate(rows):
        alone = {name: value[i : i + 1, : len(row)] for name, value in given.items()}
        with torch.no_grad():
            expected = deployed(**alone)[0]
        torch.testing.assert_close(run(session, alone)[0], expected, rtol=CLOSE, atol=CLOSE)
        got = together[i, : len(row)] if task == "causal_lm" else together[i]
        torch.testing.assert_close(got, expected, rtol=CLOSE, atol=CLOSE)
    if task == "embedding":
        torch.testing.assert_close(together.norm(dim=-1), torch.ones(4))


def test_a_graph_that_differs_is_refused(tmp_path, monkeypatch):
    """The graph has other weights; the check must compare it with the model, not with itself."""
    deployed = peaked("classification")
    true = onnx_graph.differences

    def after_a_change(model, path, longest):
        with torch.no_grad():
            deployed.model.classifier.bias.add_(0.01)
        return true(model, path, longest)

    monkeypatch.setattr(onnx_graph, "differences", after_a_change)
    with pytest.raises(RunError, match=r"ONNX graph of bert differs from the student by 1.0e-02"):
        onnx_graph.write_graph(deployed, str(tmp_path / "model.onnx"), 16)


def command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["dsdistill", *map(str, arguments)])
    return cli.run()


def test_the_command_writes_a_folder(settings, tmp_path, monkeypatch, capsys):
    change = {"terms": {"task": {}}, "teacher": None, "train.steps": 1}
    run_configs([write(tmp_path, merge(settings, change), "run")], ranks=1)
    out = tmp_path / "out"
    assert command(monkeypatch, "export", tmp_path / "run", "--out", out, "--format", "onnx", "--int8") == 0
    assert {"model.onnx", "model.int8.onnx", "config.json", "tokenizer.json"} <= {
        p.name for p in out.iterdir()
    }
    told = capsys.readouterr().out
    assert told.count("largest difference from the student") == 2 and str(out) in told
    assert not list(out.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--format", "tflite"], "--format: got 'tflite', expected transformers or onnx"),
        (["--int8"], "--int8: got no ONNX graph, expected --format onnx"),
        (["--format", "onnx", "--dtype", "bf16"], "--dtype: got bf16 beside --format onnx"),
        (["--format", "onnx"], "--format: got onnx, but no onnxscript, expected pip install dsdistill[onnx]"),
    ],
)
def test_bad_options(monkeypatch, capsys, tmp_path, options, told):
    import importlib.util

    true = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "onnxscript" else true(name, *more)
    )
    assert command(monkeypatch, "export", "run", "--out", tmp_path / "out", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dsdistill: {told}") and not (tmp_path / "out").exists()
