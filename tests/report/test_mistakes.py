"""A run's page shows examples that the student gets wrong and the teacher right."""

import re

from tests.report.test_page import SCRIPT, Markup, lines, page_of, prediction, step


def test_examples_that_the_teacher_gets_right(tmp_path):
    """It shows only those, the student's surest mistakes first, 200 at most."""
    lines(tmp_path / "metrics.jsonl", [step(1, task=1.0)])
    rows = [prediction(0, "a", "a", "a"), prediction(1, "a", "b", "b"), prediction(2, "a", "a", "b")]
    rows += [prediction(i, "a", "b", "a", f"text {i}", sure=i / 1000) for i in range(3, 303)]
    lines(tmp_path / "predictions.jsonl", rows)
    text = Markup(page_of(tmp_path)).text["examples"]
    assert "The student gets 301 of 303 dev examples wrong; on 300 of these the teacher is right." in text
    assert re.findall(r"text (\d+)", text) == [str(i) for i in range(302, 102, -1)]


def test_mistakes_without_a_teacher(tmp_path):
    lines(tmp_path / "predictions.jsonl", [prediction(0, "a", "b", None), prediction(1, "a", "a", None)])
    lines(tmp_path / "metrics.jsonl", [step(1, task=1.0)])
    assert (
        "The student gets 1 of 2 dev examples wrong; there is no teacher"
        in Markup(page_of(tmp_path)).text["examples"]
    )


def searched(number: int, student: int, teacher: int | None, text: str = "a text") -> dict:
    """Return what is written for a query: the ranks of its document, and the document that comes first instead."""
    ranks = {"student": student} | ({"teacher": teacher} if teacher else {})
    first = {model: f"first of {model}: {text}" for model, rank in ranks.items() if rank > 1}
    return {"id": f"dev:{number}", "texts": [f"query {number}", text], "rank": ranks, "first": first}


def test_scores_that_the_teacher_is_near(tmp_path):
    """It shows only those with errors of more than twice the teacher's, the largest first."""
    lines(tmp_path / "metrics.jsonl", [step(1, task=1.0)])
    values = [(1.0, 3.0, 1.1), (2.0, 2.2, 2.15), (5.0, 0.5, 4.0), (3.0, 3.0, 9.0)]
    rows = [
        {"id": str(i), "texts": [f"text {i}"], "label": label, "value": {"student": mine, "teacher": theirs}}
        for i, (label, mine, theirs) in enumerate(values)
    ]
    lines(tmp_path / "predictions.jsonl", rows)
    text = Markup(page_of(tmp_path)).text["examples"]
    assert "On 2 of 4 dev examples the student's error is more than twice the teacher's." in text
    assert re.findall(r"text (\d)", text) == ["2", "0"] and "0.5" in text


def test_queries_that_the_teacher_finds(tmp_path):
    """It shows only those, the lowest ranks first, 200 at most, with the student's first document."""
    lines(tmp_path / "metrics.jsonl", [step(1, task=1.0)])
    rows = [searched(0, 1, 1), searched(1, 2, 3), searched(2, 1, 5)]
    rows += [searched(i, i, 1, SCRIPT) for i in range(3, 303)]
    lines(tmp_path / "predictions.jsonl", rows)
    page = Markup(page_of(tmp_path))
    text = page.text["examples"]
    assert (
        "For 301 of 303 queries the student does not rank the right document first; for 300 of these the teacher does."
        in text
    )
    assert re.findall(r"query (\d+)", text) == [str(i) for i in range(302, 102, -1)]
    assert f"first of student: {SCRIPT}" in text and page.tags.count("script") == 2 and "img" not in page.tags
    lines(tmp_path / "predictions.jsonl", [searched(0, 2, None)])
    assert "For 1 of" in Markup(page_of(tmp_path)).text["examples"]
