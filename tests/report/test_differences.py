"""Intervals of how far methods differ are compared with a bootstrap that draws every query by itself."""

import json
from pathlib import Path

import numpy as np
import pytest

from dsdistill.report import differences, write_page
from dsdistill.report.methods import runs_of
from tests.report.test_page import Markup, lines

STUDENT = {"seen/recall_1": 0.25, "seen/recall_10": 0.5, "seen/mrr_10": 0.3, "seen/teacher_spearman": 0.9}


def draw(seed: int, worse: float, count: int = 80) -> np.ndarray:
    return np.ceil(np.random.default_rng(seed).exponential(worse, count)).astype(int).clip(1)


def make_run(folder: Path, student: dict[str, np.ndarray], teacher: dict[str, np.ndarray], **models) -> None:
    """Write a finished run with these ranks by dev set."""
    told = [
        {
            "id": f"{name}:{i}",
            "set": name,
            "texts": ["a", "b"],
            "rank": {"student": int(rank), **({"teacher": int(teacher[name][i])} if teacher else {})},
        }
        for name, ranks in student.items()
        for i, rank in enumerate(ranks)
    ]
    lines(folder / "predictions.jsonl", told)
    scores = {
        "models": {"teacher": STUDENT | {"parameters": 22}, "student": STUDENT, **models},
        "finished": True,
    }
    (folder / "summary.json").write_text(json.dumps(scores))


def test_intervals_are_those_of_queries_drawn_one_by_one(monkeypatch):
    """This holds in blocks too, and for shares of runs."""
    each = np.stack([draw(1, 2) <= 1, draw(2, 12) <= 10, draw(3, 12) <= 10]) / 3.0
    each = np.stack([each[0] - each[1], each.sum(0)], axis=1)
    draws = np.random.default_rng(7).integers(0, 80, (10_000, 80))
    expected = np.quantile(each[draws].mean(1), [0.025, 0.5, 0.975], axis=0)
    monkeypatch.setattr(differences, "BLOCK", 999)
    found = differences.resampled(each)
    assert found.shape == (10_000, 2) and (found == differences.resampled(each)).all()
    assert np.quantile(found, [0.025, 0.5, 0.975], axis=0) == pytest.approx(expected, abs=0.008)


def test_methods_are_paired_by_query_over_the_mean_of_their_seeds(tmp_path):
    teacher = {"seen": draw(0, 2), "unseen": draw(9, 2)}
    near = [{name: of + (draw(seed, 1) > 3) for name, of in teacher.items()} for seed in (1, 2)]
    far = {name: draw(5, 60) for name in teacher}
    for seed, ranks in enumerate(near):
        make_run(tmp_path / "near" / f"seed-{seed}", ranks, teacher)
    make_run(tmp_path / "far", far, {})  # a run without seeds, and without a teacher
    make_run(tmp_path / "other", {"seen": draw(5, 60, 79)}, {})  # with other queries
    make_run(tmp_path / "begun", far, {})
    (tmp_path / "begun" / "summary.json").unlink()
    lines(tmp_path / "begun" / "metrics.jsonl", [])
    listed = differences.differences(str(tmp_path), runs_of(str(tmp_path)))
    found = {(of.first, of.second, of.score): of for of in listed}
    pairs = {("far", "teacher"), ("near", "teacher"), ("far", "near")}
    assert {key[:2] for key in found} == pairs and len(found) == 3 * 2 * 2
    for name in ("seen", "unseen"):
        for score, most in (("recall_1", 1), ("recall_10", 10)):
            mine = np.mean([of[name] <= most for of in near], axis=0)
            of = found["far", "near", f"{name}/{score}"]
            assert of.mean == pytest.approx(((far[name] <= most) - mine).mean())
            assert of.low < of.mean < of.high < 0 and of.certain
    same = found["near", "teacher", "seen/recall_10"]
    assert same.low <= same.mean <= same.high == 0 and not same.certain


def test_the_table_of_a_search(tmp_path, capsys):
    """Page and terminal show scores on each dev set, the student before its first step, and differences."""
    from dsdistill.cli import report

    ranks = {"seen": draw(0, 2)}
    start = {"seen/recall_10": 0.125, "seen/recall_1": 0.0625}
    make_run(tmp_path / "vectors" / "seed-0", ranks, ranks, start=start | {"seen/teacher_spearman": 0.75})
    make_run(tmp_path / "rival" / "seed-0", {"seen": draw(1, 60)}, {}, start=start)
    report(str(tmp_path))
    told = capsys.readouterr().out
    page = Markup(Path(write_page(str(tmp_path))).read_text()).text
    for text in (told, page["methods"]):
        for shown in ("recall@1 (seen)", "recall@10 (seen)", "Spearman to teacher (seen)", "parameters"):
            assert shown in text
        assert text.count("0.1250") == 1  # both methods have the same start
        assert "MRR" not in text and "start: the student before its first step" in text
    assert "0.7500" in page["methods"]  # only for the method that has a teacher
    for text in (told, page["differences"]):
        assert "rival − vectors" in text and "vectors − teacher" in text and "10,000 resamples" in text
    assert told.splitlines()[-1] == str(tmp_path / "report.html")
    make_run(tmp_path / "cut" / "seed-0", ranks, ranks, start={"seen/recall_10": 0.5})
    report(str(tmp_path))
    told = capsys.readouterr().out
    assert "cut: start" in told and "rival: start" in told and "vectors: start" not in told


def test_a_config_alone_is_no_method(tmp_path):
    """A folder of configs is not taken for runs."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("task: embedding\n")
    assert runs_of(str(tmp_path)) == {}
    (tmp_path / "mine" / "metrics.jsonl").write_text("")
    assert list(runs_of(str(tmp_path))) == ["mine"]
