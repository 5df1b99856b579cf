import functools
import json

import pytest
import torch

from dsdistill.bench import operators
from dsdistill.bench.works import WORKS, Work

SMALL = {
    "attention": {"batch": 1, "heads": 2, "tokens": 24, "width": 8, "causal": True},
    "pairwise": {"tokens": 24, "width": 8},
    "hidden": {"tokens": 24, "width": 8, "teacher_width": 12},
    "soft-label": {"tokens": 24, "vocabulary": 40, "width": 8},
    "vocabulary": {"tokens": 24, "vocabulary": 40, "width": 8},
}


@pytest.mark.parametrize("operator", SMALL)
def test_bench_reports_every_contender(operator, tmp_path, capsys):
    path = tmp_path / "bench.json"
    names = ["eager", "chunked"]
    code = operators.run_bench(
        operator, options=SMALL[operator], backends=names, repeats=3, memory=False, json_path=path
    )
    assert code == 0
    found = json.loads(path.read_text())
    assert [row["backend"] for row in found["rows"]] == names
    assert all(row["both"] > 0 and row["vs_eager"] > 0 for row in found["rows"])
    assert found["machine"]["torch"] in capsys.readouterr().out


def test_a_backend_that_fails_its_check_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(
        operators, "checked", lambda operator, name, dtype: "wrong" if name == "chunked" else None
    )
    options = {"options": SMALL["pairwise"], "backends": ["eager", "chunked"], "repeats": 3, "memory": False}
    assert operators.run_bench("pairwise", **options) == 1
    assert "chunked: not timed" in capsys.readouterr().out


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="'soft-label'"):
        operators.run_bench("softmax")
    with pytest.raises(ValueError, match="float32"):
        operators.run_bench("pairwise", dtype="int8")
    with pytest.raises(ValueError, match="option: got 'batch', expected one of 'tokens', 'width'"):
        operators.run_bench("hidden", options={"tokens": 8, "batch": 1})


def test_compile_means_one_compiled_graph(monkeypatch):
    """Each contender is compiled afresh, and one that would leave its graph is no contender."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # the quickest
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    for tokens in (24, 25, 26):
        work = WORKS["hidden"](tokens=tokens, width=8, teacher_width=12)
        calls, stopped = operators.warm_up(work, ["compile"])
        assert list(calls) == ["compile"] and not stopped
    before = Work.loss
    monkeypatch.setattr(Work, "loss", lambda *given: (torch._dynamo.graph_break(), before(*given))[1])
    calls, stopped = operators.warm_up(work, ["compile", "eager"])
    assert list(calls) == ["eager"] and "Unsupported" in stopped["compile"]
