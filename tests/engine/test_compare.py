"""Methods are trained and compared."""

import json
import subprocess
import sys

import pytest
import yaml

from dsdistill.config import UserError
from dsdistill.engine.studies import read_plan
from dsdistill.report.claims import NOT_SEEN, REPRODUCED, REVERSED, verdicts
from dsdistill.report.methods import table
from dsdistill.report.study import Claim, Study, read_study


def student(**scores):
    return {"models": {"student": scores, "teacher": {"accuracy": 0.9}}}


def test_table_by_hand():
    rows = {
        "a": [student(accuracy=0.5, tokens_per_second=9.0), student(accuracy=0.7)],
        "b": [student(accuracy=0.8, rcs=0.01234, parameters=11_000_000)],
    }
    assert table(rows).splitlines() == [
        "| method | runs | accuracy | RCS | parameters |",
        "|---|---:|---:|---:|---:|",
        "| teacher | 1 | 0.9000 | – | – |",
        "| a | 2 | 0.6000 ± 0.1414 | – | – |",
        "| b | 1 | 0.8000 | 0.0123 | 11,000,000 |",
    ]


def test_table_of_several_dev_sets():
    scores = {"x/accuracy": 0.5, "y/accuracy": 0.7, "x/tokens_per_second": 9.0}
    assert table({"a": [{"models": {"student": scores}}]}).splitlines()[::2] == [
        "| method | runs | accuracy (x) | accuracy (y) |",
        "| a | 1 | 0.5000 | 0.7000 |",
    ]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("seeds: [0]", r"got \['seeds'\], expected seeds and methods, or seeds and axis"),
        ("{seeds: [0], methods: {m: [f]}, metric: [kl]}", r"got \['metric'\], expected only title, seeds"),
        ("{seeds: [0], scale: [f], axis: {k: [1]}}", r"axis.k: got \[1\], expected two or more values"),
        ("{seeds: [0], scale: [f], axis: {k: [1, 2], l: [1, 2]}}", "expected one setting or one title"),
        (
            "{seeds: [0], scale: {node: [f]}, axis: {k: [1, 2]}}",
            "--scale: got small, which .*does not have, expected node",
        ),
        ("{seeds: [0], methods: {m: [f]}, metrics: kl}", "metrics: got kl, expected a list of scores' names"),
        (
            "{seeds: [0], methods: {m: [f]}, metrics: [kl], published: {n: [1]}}",
            "published.n: got n, expected one of m",
        ),
        (
            "{seeds: [0], methods: {m: [f]}, metrics: [kl], published: {m: []}}",
            r"published.m: got \[\], expected 1 num",
        ),
        ("{seeds: [0], methods: {m: [f]}, metrics: [kl], published: {m: [a]}}", "expected numbers or null"),
        (
            "{seeds: [0], methods: {m: [f]}, claims: [{metric: kl}]}",
            "claims.0: got .* expected metric and one of",
        ),
        (
            "{seeds: [0], methods: {m: [f]}, claims: [{metric: kl, trend: up}]}",
            "trend: got up, expected .* with an axis",
        ),
        (
            "{seeds: [0], methods: {m: [f]}, claims: [{metric: kl, order: [m]}]}",
            "order: got .*, expected two or more",
        ),
        (
            "{seeds: [0], methods: {m: [f]}, claims: [{metric: kl, best: n}]}",
            "best: got n, expected one of m",
        ),
        ("{seeds: [0], axis: {k: [1, 2]}}", r"scale: got \[\], expected a list of config files"),
        ("- a", "got a list, expected a mapping with seeds and methods"),
        ("{seeds: [a], methods: {m: [f]}}", r"seeds: got \['a'\], expected a list of whole numbers"),
        ("{seeds: [0], methods: []}", r"methods: got \[\], expected a mapping"),
        ("{seeds: [0], methods: {m: f}}", "methods.m: got f, expected a list of config files"),
        ("a: [", "expected a readable YAML file"),
        ("{seeds: [0], methods: {a<1: [f], a>1: [f]}}", "methods: got 'a<1' and 'a>1', expected names that"),
    ],
)
def test_plans_refused(tmp_path, plan, message):
    (tmp_path / "plan.yaml").write_text(plan)
    with pytest.raises(UserError, match=message):
        read_plan(str(tmp_path / "plan.yaml"))


PLAN = """
title: a table
seeds: [3, 4]
scale: {small: [small.yaml], node: [node.yaml]}
methods: {A: [], B: {small: [b.yaml], node: []}}
axis: {train.learning_rate: [1.0e-4, 0.5]}
metrics: [kl, accuracy]
published: {"B, 0.5": [0.25, null]}
claims: [{metric: kl, trend: better}, {metric: accuracy, order: ["A, 0.5", "B, 0.5"]}]
left_out: {C: it is closed}
"""


def test_a_plan_with_everything(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    seeds, cells, study = read_plan(str(tmp_path / "plan.yaml"))
    assert seeds == [3, 4]
    assert cells == {
        "A, 0.0001": ["small.yaml", "train.learning_rate=0.0001"],
        "A, 0.5": ["small.yaml", "train.learning_rate=0.5"],
        "B, 0.0001": ["small.yaml", "b.yaml", "train.learning_rate=0.0001"],
        "B, 0.5": ["small.yaml", "b.yaml", "train.learning_rate=0.5"],
    }
    assert read_plan(str(tmp_path / "plan.yaml"), "node")[1]["B, 0.5"] == [
        "node.yaml",
        "train.learning_rate=0.5",
    ]
    assert study.curves()["B"] == [(0.0001, "B, 0.0001"), (0.5, "B, 0.5")]
    assert study.beside("B, 0.5", "kl") == 0.25 and study.beside("B, 0.5", "accuracy") is None
    study.write(str(tmp_path))
    assert read_study(str(tmp_path)) == study
    (tmp_path / "study.json").write_text('{"cells": "AB"}')
    assert read_study(str(tmp_path)) is None


def test_an_axis_alone_or_with_sources(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("{seeds: [0], scale: [f], axis: {depth: {1: [one.yaml], two: []}}}")
    _, cells, study = read_plan(str(plan))
    assert cells == {"1": ["f", "one.yaml"], "two": ["f"]}
    assert study.axis == "depth" and study.values == (1, "two") and study.series == ("", "")


def test_a_scale_leaves_out_what_it_lacks(tmp_path):
    """It also leaves out published numbers and places in claimed orders."""
    (tmp_path / "plan.yaml").write_text(
        "{seeds: [0], scale: [f], methods: {A: [], B: [], C: {small: []}}, metrics: [kl], published: {C: [0.5]}, "
        "claims: [{metric: kl, order: [A, C, B]}, {metric: kl, order: [C, B]}, {metric: kl, best: C}]}"
    )
    small, node = (read_plan(str(tmp_path / "plan.yaml"), scale)[2] for scale in ("small", "node"))
    assert small.cells == ("A", "B", "C") and len(small.claims) == 3 and not small.left_out
    assert node.cells == ("A", "B") and node.left_out == {"C": "only at scale small"} and not node.published
    assert node.claims == (Claim("kl", order=("A", "B")),)


def runs(**scores):
    """Return one summary per seed, from the values of each score."""
    seeds = zip(*scores.values(), strict=True)
    return [student(**dict(zip(scores, values, strict=True))) for values in seeds]


def test_verdicts_by_hand():
    """Differences of A and B: KL 0.1, 0.2, 0.3 smaller, so 0.2 with an error of 0.0577; 2.92 errors are 0.1686."""
    rows = {
        "A": runs(kl=[0.5, 0.5, 0.5], accuracy=[0.8, 0.7, 0.8]),
        "B": runs(kl=[0.6, 0.7, 0.8], accuracy=[0.7, 0.8, 0.7]),
        "C": runs(kl=[0.6, 0.72, 0.95]),
    }
    claims = (Claim("kl", order=("A", "B", "C")), Claim("kl", best="B"), Claim("accuracy", order=("A", "B")))
    study = Study(("A", "B", "C"), ("A", "B", "C"), claims=claims)
    found = verdicts(study, rows)
    assert [of.outcome for of in found] == [REPRODUCED, NOT_SEEN, REVERSED, NOT_SEEN, NOT_SEEN]
    assert found[0].difference == pytest.approx(0.2) and found[0].error == pytest.approx(0.1 / 3**0.5)
    assert found[0].claim == "A is better than B" and found[2].claim == "B is better than A"
    few = verdicts(study, {"A": rows["A"][:1], "B": rows["B"][:1]})
    assert [of.outcome for of in few] == [f"{NOT_SEEN} (one seed)"] + [f"{NOT_SEEN} (not run)"] + [
        f"{NOT_SEEN} ({why})" for why in ("one seed", "not run", "one seed")
    ]


@pytest.mark.parametrize(
    ("trend", "outcome"),
    [("up", REPRODUCED), ("down", REVERSED), ("worse", REPRODUCED), ("better", REVERSED)],
)
def test_a_trend_is_the_slope_of_each_seed(trend, outcome):
    """KL 1, 2, 6 and 1, 3, 7 have slopes 2.5 and 3; their mean is 11 errors of 0.25, and the quantile is 6.31."""
    rows = {"1": runs(kl=[1.0, 1.0]), "10": runs(kl=[2.0, 3.0]), "20": runs(kl=[6.0, 7.0])}
    cells = tuple(rows)
    study = Study(
        cells, cells, axis="x", values=(1, 10, 20), series=("",) * 3, claims=(Claim("kl", trend=trend),)
    )
    (found,) = verdicts(study, rows)
    assert abs(found.difference) == pytest.approx(2.75) and found.error == pytest.approx(0.25)
    assert found.outcome == outcome


def test_published_numbers_stand_beside_measured_ones():
    study = Study(
        ("a", "b"), ("a", "b"), metrics=("kl", "accuracy"), published={"a": (0.25, 0.5), "c": (None, 0.9)}
    )
    assert table({"a": runs(accuracy=[0.5, 0.7], kl=[1.0, 1.0])}, study).splitlines() == [
        "| method | runs | KL to teacher | accuracy |",
        "|---|---:|---:|---:|",
        "| teacher | 1 | – | 0.9000 |",
        "| a | 2 | 1.000 ± 0.000 (0.25) | 0.6000 ± 0.1414 (0.5) |",
        "| c | 0 | – | – (0.9) |",
    ]


def test_runs_once_and_goes_on(settings, tmp_path):
    """The command line runs in one process; finished runs stay as they are."""
    settings["run"] = {}
    settings["train"] |= {"steps": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    plan = {"seeds": [0], "methods": {"all terms": [str(tmp_path / "config.yaml")]}}
    plan |= {
        "metrics": ["kl", "accuracy"],
        "published": {"all terms": [0.25, None]},
        "left_out": {"none": "time"},
    }

    def compare(*overrides):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
        command = [sys.executable, "-m", "dsdistill", "compare", "plan.yaml", "--out", "out", *overrides]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)

    done = compare("--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all terms, seed 0: out/all-terms/seed-0\n" and not (tmp_path / "out").exists()
    done = compare()
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "out" / "table.md").read_text()
    assert done.stdout == f"{written}\npage: out/report.html\n"
    assert [line.split(" | ")[0] for line in written.splitlines()[2:]] == ["| teacher", "| all terms"]
    assert " (0.25) | " in written
    page = (tmp_path / "out" / "report.html").read_text()
    assert "all terms" in page and "Left out" in page and "In brackets" in page
    summary = tmp_path / "out" / "all-terms" / "seed-0" / "summary.json"
    before = summary.stat().st_mtime_ns
    assert "evaluated" in json.loads(summary.read_text())

    plan["seeds"] = [0, 1]
    done = compare("train.learning_rate=1e-3")
    assert done.returncode == 0, done.stderr
    assert summary.stat().st_mtime_ns == before
    assert "| all terms | 2 |" in done.stdout

    done = compare("train.learning_rate=2e-3")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        "seed-0/config.yaml: train.learning_rate: got 0.002, expected 0.001 as at this run's start"
        in done.stderr
    )

    done = compare("train.stesp=3")
    assert done.returncode == 2 and "did you mean steps?" in done.stderr
