import json
import math
import re
import subprocess
import sys

import pytest
from matplotlib.image import imread

from dsdistill import report
from dsdistill.config.errors import UserError
from dsdistill.report.plot import _smooth

SUMMARY = {
    "name": "quick",
    "task": "classification",
    "steps": 600,
    "world_size": 2,
    "seconds": 192.4,
    "peak_memory_mib": 1633,
    "models": {
        "teacher": {
            "accuracy": 0.8341, "macro_f1": 0.81, "kl": 0.0, "tokens_per_second": 2473.1, "parameters": 22713216,
        },
        "student": {
            "accuracy": 0.8, "macro_f1": 0.75, "kl": 0.14236, "tokens_per_second": 14281.1, "parameters": 7_100_000_000,
            "training_tokens_per_second": 925.4,
        },
        "baseline": {
            "accuracy": 0.7, "macro_f1": 0.65, "kl": 12.0, "tokens_per_second": 14000.0, "parameters": 950,
            "training_tokens_per_second": 1925.4,
        },
    },
}  # fmt: skip


def step(number, **terms):
    weighted = {name: {"raw": 2 * value, "weighted": value} for name, value in terms.items()}
    return {"step": number, "loss": sum(terms.values()), "terms": weighted}


def write(path, records, end=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + end)
    return str(path)


@pytest.fixture
def axes(monkeypatch):
    """Return the axes of the pictures drawn since, from top to bottom."""
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig

    def savefig(figure, *args, **kwargs):
        drawn.extend(figure.axes)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return drawn


def curves(axes):
    return {line.get_label(): line.get_ydata().tolist() for line in axes.lines if line.get_label()[0] != "_"}


def test_table():
    lines = report.table(SUMMARY).split("\n")
    assert max(map(len, lines)) <= 100
    assert (
        lines[0]
        == "quick | classification | 600 steps on 2 processes | 3 min 12 s | at most 1,633 MiB per process"
    )
    cells = [line.split() for line in lines[4:7]]
    assert cells == [
        ["teacher", "0.8341", "0.8100", "0", "22.7M", "2,473", "-"],
        ["student", "0.8000", "0.7500", "0.1424", "7.1B", "14,281", "925"],
        ["baseline", "0.7000", "0.6500", "12", "950", "14,000", "1,925"],
    ]
    assert "  KL to teacher  " in lines[2] and len({len(line) for line in lines[2:7]}) == 1
    assert "KL(teacher || model): nats, mean over the dev set's examples" in lines


def test_table_without_teacher_and_of_another_task():
    text = report.table(
        {"models": {"student": {"perplexity": 31.41592, "novel_score": 0.5}}, "task": "causal_lm"}
    )
    assert text.split("\n")[0] == "run | causal_lm"
    assert text.split("\n")[2].split() == ["perplexity", "novel_score"]
    assert text.split("\n")[4].split() == ["student", "31.42", "0.5000"]
    assert "KL" not in text


def test_table_of_several_dev_sets():
    """Each score has a line for each set, in the order of the scores; F1 names its class."""
    scores = {"matched/kl": 0.12345, "mismatched/f1": 0.5, "matched/f1": 0.25, "rcs": 0.5, "matched/odd": 1.5}
    text = report.table({"models": {"student": scores}, "positive_class": "equivalent", "data": "other.tsv"})
    lines = text.split("\n")
    assert lines[0] == "run | other.tsv"
    titles = ["F1 (matched)", "F1 (mismatched)", "KL to teacher (matched)", "RCS", "odd (matched)"]
    assert re.split("  +", lines[2].strip()) == titles
    assert lines[4].split() == ["student", "0.2500", "0.5000", "0.1235", "0.5000", "1.5000"]
    assert "F1 is that of class equivalent" in lines
    assert any(line.startswith("KL(teacher || model)") for line in lines)


def test_scores_of_first_values_follow_that_of_all():
    names = ["recall_10_of_64", "a/recall_10_of_128", "recall_10", "mrr_10", "recall_10_of_1024"]
    text = report.table({"models": {"student": dict.fromkeys(names, 0.5)}})
    titles = [
        "recall@10", "recall@10, 1024 values", "recall@10, 128 values (a)", "recall@10, 64 values", "MRR@10",
    ]  # fmt: skip
    assert re.split("  +", text.splitlines()[2].strip()) == titles
    assert "N values: scores of the first N values" in text


@pytest.mark.parametrize("seconds, shown", [(7.64, "7.6 s"), (59.9, "1 min 00 s"), (7260, "2 h 01 min")])
def test_duration(seconds, shown):
    assert shown in report.table(SUMMARY | {"seconds": seconds}).split("\n")[0]


def test_plot_of_terms_and_total(tmp_path, axes):
    log = write(
        tmp_path / "metrics.jsonl", [step(1, task=1.0, soft_label=3.0), step(2, task=0.5, soft_label=2.0)]
    )
    report.loss_plot(log, str(tmp_path / "loss.png"))
    (only,) = axes
    assert curves(only) == {"total": [4.0, 2.5], "task": [1.0, 0.5], "soft label": [3.0, 2.0]}
    assert only.get_yscale() == "linear"
    height, width, _ = imread(tmp_path / "loss.png").shape
    assert width == 1200 and height > 600


def test_plot_is_logarithmic_over_decades_and_bears_zeros_and_nan(tmp_path, axes):
    records = [step(1, task=1.0, hidden=0.009), step(2, task=math.nan, hidden=0.0)]
    report.loss_plot(write(tmp_path / "metrics.jsonl", records), str(tmp_path / "loss.png"))
    assert axes[0].get_yscale() == "log"


def test_plot_of_several_dev_sets(tmp_path, axes):
    scores = {"a/accuracy": 0.5, "b/accuracy": 0.2, "a/tokens_per_second": 9000.0}
    records = [step(1, task=1.0), {"step": 1, "evaluation": scores}]
    report.loss_plot(write(tmp_path / "metrics.jsonl", records), str(tmp_path / "loss.png"))
    assert curves(axes[1]) == {"accuracy (a)": [0.5], "accuracy (b)": [0.2]}


def test_plot_with_evaluations(tmp_path, axes):
    scores = {"accuracy": 0.5, "kl": 0.2, "tokens_per_second": 9000.0}
    records = [step(1, task=1.0), {"step": 1, "evaluation": scores}, step(2, task=0.5)]
    report.loss_plot(write(tmp_path / "metrics.jsonl", records), str(tmp_path / "loss.png"))
    assert curves(axes[1]) == {"accuracy": [0.5], "KL to teacher": [0.2]}


def test_plot_of_a_long_run_is_smoothed(tmp_path, axes):
    records = [step(i, task=1.0 + i % 2) for i in range(1, 301)]
    report.loss_plot(write(tmp_path / "metrics.jsonl", records), str(tmp_path / "loss.png"))
    assert max(abs(value - 1.5) for value in curves(axes[0])["task"]) < 0.1
    assert len(axes[0].lines) == 4  # each smoothed curve over its raw one


def test_smoothing_by_hand():
    assert _smooth([1.0, 2.0, 6.0, math.nan], 1) == [1.5, 3.0, 4.0, 6.0]
    assert math.isnan(_smooth([math.nan], 1)[0])


def test_cut_last_line_is_left_out(tmp_path):
    records = [step(1, task=1.0), step(2, task=0.5)]
    assert report.read_log(write(tmp_path / "metrics.jsonl", records, end='{"step": 3, "lo')) == records


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"metrics\.jsonl: got No such file"),
        ("", r"metrics\.jsonl: got no line with a loss"),
        ('{"step": 1, "evaluation": {}}\n', r"metrics\.jsonl: got no line with a loss"),
        ('{"st\n{"step": 1}\n', r"metrics\.jsonl, line 1: got .*, expected one JSON object on each line"),
    ],
)
def test_refusals(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        report.loss_plot(str(tmp_path / "metrics.jsonl"), str(tmp_path / "loss.png"))


def test_show(tmp_path, capsys):
    write(tmp_path / "metrics.jsonl", [step(1, task=1.0)])
    report.show(str(tmp_path), SUMMARY)
    printed = capsys.readouterr().out
    assert report.table(SUMMARY) in printed and f"loss curves: {tmp_path}/loss.png" in printed
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_import_is_light():
    script = "import sys, dsdistill.report; print({'torch', 'matplotlib', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
