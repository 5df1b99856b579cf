"""The contenders of the benchmark of the whole step compute what they claim, and its table is complete."""

import json

import pytest
import torch

from dsdistill.bench import step
from dsdistill.bench.step_arms import ARMS, Sizes, make
from tests.test_cli import command

TINY = {"teacher": 4, "student": 2, "width": 16, "heads": 2, "vocabulary": 50, "tokens": 16, "step": 32}
HERE = torch.device("cpu")


def test_every_arm_writes_its_rows(tmp_path, capsys):
    table, picture = tmp_path / "step.json", tmp_path / "step.png"
    pytest.importorskip("matplotlib")
    arms = [arm for arm in ARMS if arm != "textbrewer"]
    code = step.run_step(
        options=TINY, backends=arms, repeats=3, memory=False, json_path=table, plot_path=picture
    )
    assert code == 0 and picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(table.read_text())
    points = [(8, 2), (16, 2), (16, 1)]
    assert [(r["tokens"], r["mapped"], r["arm"]) for r in found["rows"]] == [
        (*point, arm) for point in points for arm in arms
    ]
    assert all(row["tokens_per_second"] > 0 for row in found["rows"])
    assert {row["vs_logits"] for row in found["rows"] if row["arm"] == "logits"} == {1.0}
    assert all(low <= high for low, high in (row["vs_logits_95"] for row in found["rows"]))
    assert found["machine"]["torch"] in capsys.readouterr().out


def test_intervals_of_a_median():
    assert step.interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert step.interval([float(i) for i in range(30)]) == (
        9.0,
        20.0,
    )  # ranks 10 and 21 of 30, as in statistical tables


def test_rows_reach_the_terms():
    """With the draws of one seed the loss differs from that of all rows; shorter sequences use all rows."""
    losses = {}
    for rows in (0, 3):
        _, loss = make("pairwise", Sizes(**TINY, rows=rows), 2, "float32", HERE)
        torch.manual_seed(0)
        losses[rows] = [loss(Sizes(**TINY).batch(tokens, HERE)).item() for tokens in (16, 3)]
    assert losses[0][0] != pytest.approx(losses[3][0], rel=1e-6)
    assert losses[0][1] == pytest.approx(losses[3][1], rel=1e-6)


def test_eager_computes_the_loss_of_the_attention_level():
    """Otherwise comparing the two would mean nothing."""
    sizes = Sizes(**TINY)
    batch = sizes.batch(16, HERE)
    found = []
    for arm in ("attention", "eager"):
        module, loss = make(arm, sizes, 2, "float32", HERE)
        model = getattr(module, "model", module)
        with torch.no_grad():  # peaked attention, since otherwise its part of the loss is too small to see
            for name, parameter in model.named_parameters():
                if ".query." in name or ".key." in name:
                    parameter.mul_(10)
        value = loss(batch)
        value.backward()
        found.append((value.detach(), model.bert.encoder.layer[0].attention.self.query.weight.grad))
    torch.testing.assert_close(*found[0][:1], *found[1][:1], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-6)


def test_textbrewer_runs():
    pytest.importorskip("textbrewer")
    _, loss = make("textbrewer", Sizes(**TINY), 1, "float32", HERE)
    assert loss(Sizes(**TINY).batch(8, HERE)) > 0


def test_memory_of_the_levels(monkeypatch):
    """With 2 → 1 layers of width 384 at 64 to 512 tokens the table's claims hold, with a margin for other machines."""
    monkeypatch.setenv(
        "CUDA_VISIBLE_DEVICES", ""
    )  # the table was measured on a CPU, so the measuring process gets no GPU
    monkeypatch.setattr(step.operators, "device", lambda: "cpu")
    sizes = Sizes(teacher=2, student=1)
    points = step.points(sizes)
    logits, attention = (
        dict(zip(points, step.peak_memory(arm, sizes, "float32"), strict=True))
        for arm in ("logits", "attention")
    )
    assert all(0 < logits[point] < attention[point] for point in points)
    assert attention[512, 1] < 1.25 * logits[512, 1]
    assert attention[512, 1] < 1.05 * attention[64, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "depth=3"], "bench option: got 'depth', expected one of 'teacher', 'student'"),
        (["--shapes", "tokens=long"], "bench tokens: got 'long', expected a number from 1"),
        (["--backends", "cpp"], "bench backends: got ['cpp'], expected some of logits, hidden"),
    ],
)
def test_a_bad_option_is_one_line(arguments, message):
    done = command("bench", "step", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1
