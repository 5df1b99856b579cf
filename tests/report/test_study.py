"""A comparison by a plan shows claims, published numbers and tests over examples, on page and terminal."""

import json

import pytest
from scipy.stats import chi2

from dsdistill.report import comparison_page, show_comparison
from dsdistill.report.axis_plot import PICTURE, axis_plot
from dsdistill.report.mcnemar import exact, paired
from dsdistill.report.methods import by_cell, runs_of
from dsdistill.report.study import Claim, Study
from tests.report.test_page import Markup, lines, page_of

EVIL = "<script>alert(1)</script>"


def make_run(folder, right, **scores):
    """Write a finished run whose student gets the given examples of 20 right, in two dev sets."""
    told = [
        {"id": f"{i}", "label": "x", "student": "x" if i in right else "y"}
        | ({"set": "holdout"} if held else {})
        for held in (False, True)
        for i in range(20)
    ]
    lines(folder / "predictions.jsonl", told)
    models = {"student": {"accuracy": len(right) / 20, **scores}, "teacher": {"accuracy": 1.0}}
    (folder / "summary.json").write_text(json.dumps({"models": models, "finished": True}))


@pytest.fixture
def study(tmp_path):
    """Two methods have three seeds. The first gets more right with every seed; its name must not become markup."""
    made = Study(
        cells=(f"ours {EVIL}", "rival"),
        folders=("ours-script-alert-1-script-", "rival"),
        title=f"a table {EVIL}",
        metrics=("accuracy", "kl"),
        published={"rival": (0.5, None)},
        claims=(Claim("accuracy", order=(f"ours {EVIL}", "rival")), Claim("kl", best="rival")),
        left_out={EVIL: EVIL},
    )
    for seed in range(3):
        make_run(tmp_path / made.folders[0] / f"seed-{seed}", range(15 + seed), kl=0.1 + seed / 100)
        make_run(tmp_path / "rival" / f"seed-{seed}", range(5, 13), kl=0.2)
    made.write(str(tmp_path))
    return made


def test_counts_by_hand(study, tmp_path):
    """With seed 0 only the first gets 5 + 2 examples right, then one more per seed; only the second gets none right."""
    found = paired(str(tmp_path), by_cell(runs_of(str(tmp_path)), study), study)
    assert [of.name for of in found] == ["", "holdout"]
    for of in found:
        assert (of.only_first, of.only_second) == ((7, 8, 9), (0, 0, 0))
        assert of.p == pytest.approx((2 / 2**7, 2 / 2**8, 2 / 2**9))


def test_p_is_that_of_the_chi_square_for_many_examples():
    assert exact(0, 0) == 1.0 and exact(3, 3) == 1.0
    first, second = 480, 400
    assert exact(first, second) == pytest.approx(
        chi2.sf((first - second - 1) ** 2 / (first + second), 1), rel=0.02
    )


def test_the_page_says_it_and_the_terminal_too(study, tmp_path, capsys):
    text = " ".join(Markup(page_of(tmp_path)).text.values())
    for wanted in (
        "Claims",
        "reproduced",
        "reversed",
        "Left out",
        "holdout",
        "0.4000 ± 0.0000 (0.5)",
        "2.92",
    ):
        assert wanted in text, wanted
    assert text.count(EVIL) >= 4  # only as text: Markup keeps scripts apart
    show_comparison(str(tmp_path))
    shown = capsys.readouterr().out
    assert f"ours {EVIL} is better than rival" in shown and "McNemar" in shown


def test_a_plan_that_nobody_can_read_is_passed_over(study, tmp_path):
    (tmp_path / "study.json").write_text(json.dumps({"cells": ["a"], "folders": []}))
    told = comparison_page.text(str(tmp_path), runs_of(str(tmp_path)))
    assert "rival" in told and "reproduced" not in told


@pytest.mark.parametrize("values", [(1, 10, 1000), ("one", "two", 3)])
def test_the_figure_of_an_axis(tmp_path, values):
    cells = tuple(map(str, values))
    study = Study(
        cells,
        cells,
        axis="x",
        values=values,
        series=("",) * 3,
        metrics=("kl", "rcs"),
        published={cells[0]: (0.3, None)},
    )
    rows = {
        cell: [{"models": {"student": {"kl": 0.1 * i + seed}}} for seed in (0, 1)]
        for i, cell in enumerate(cells)
    }
    axis_plot(study, rows, str(tmp_path / PICTURE))
    made = (tmp_path / PICTURE).read_bytes()
    assert made.startswith(b"\x89PNG") and len(made) > 5000
