import functools
import json

import pytest
import torch

from dsdistill.bench import operators
from dsdistill.bench.contenders import contender, pairs_of
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
    """Each contender is compiled afresh; a contender that would leave its graph is left out."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # the quickest
    with torch._dynamo.config.patch(recompile_limit=1):
        for tokens in (24, 25, 26):
            work = WORKS["hidden"](tokens=tokens, width=8, teacher_width=12)
            calls, stopped = operators.warm_up(work, ["compile"])
            assert list(calls) == ["compile"] and not stopped
    before = Work.loss
    monkeypatch.setattr(Work, "loss", lambda *given: (torch._dynamo.graph_break(), before(*given))[1])
    calls, stopped = operators.warm_up(work, ["compile", "eager"])
    assert list(calls) == ["eager"] and "Unsupported" in stopped["compile"]


CONDITIONS = [
    {},
    {"causal": True},
    {"masked": True, "group": 2},
    {"packed": True, "causal": True, "masked": True},
]


@pytest.mark.parametrize("conditions", CONDITIONS, ids=str)
def test_attention_under_conditions(conditions):
    """Its operations count only existing pairs, and the rivals compute the same pairs."""
    work = WORKS["attention"](batch=3, heads=4, tokens=40, width=8, **conditions)
    assert work.flops == 8 * 4 * 8 * pairs_of(work).count(3, torch.device("cpu")).item()
    label = f"kl B3 H4 N40 D8{' ' * bool(conditions)}"
    assert work.label.startswith(label) and all(name in work.label for name in conditions)
    assert torch.isfinite(work.loss("chunked"))
    with torch.no_grad():  # flex_attention has no backward on a CPU
        for x in work.student:
            x.requires_grad_(False)
        found = []
        for name in ("sdpa", "flex"):
            torch.manual_seed(0)  # for the values
            found.append(contender(work, name)())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_eager_half_computes_the_same_loss():
    work = WORKS["attention"](batch=2, heads=2, tokens=24, width=8, group=2, causal=True)
    torch.testing.assert_close(contender(work, "eager-half")(), work.loss("reference"))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_liger_computes_the_same_loss(divergence):
    pytest.importorskip("liger_kernel")
    work = WORKS["vocabulary"](tokens=24, vocabulary=40, width=8, divergence=divergence)
    ours, theirs = work.loss("reference"), contender(work, "liger")()
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, work.student) for loss in (ours, theirs)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)
