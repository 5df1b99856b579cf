"""Methods side by side."""

import json
import subprocess
import sys

import pytest
import yaml

from dsdistill.config import UserError
from dsdistill.engine.compare import read_methods, table


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
        ("seeds: [0]", r"got \['seeds'\], expected seeds and methods"),
        ("- a", "got list, expected seeds and methods"),
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
        read_methods(str(tmp_path / "plan.yaml"))


def test_runs_once_and_goes_on(settings, tmp_path):
    """Through the command line, on one process; finished runs stay as they are."""
    settings["run"] = {}
    settings["train"] |= {"steps": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    plan = {"seeds": [0], "methods": {"all terms": [str(tmp_path / "config.yaml")]}}

    def compare(*overrides):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
        command = [sys.executable, "-m", "dsdistill", "compare", "plan.yaml", "--out", "out", *overrides]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)

    done = compare()
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "out" / "table.md").read_text()
    assert done.stdout == f"{written}\npage: out/report.html\n"
    assert [line.split(" | ")[0] for line in written.splitlines()[2:]] == ["| teacher", "| all terms"]
    assert "all-terms" in (tmp_path / "out" / "report.html").read_text()
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
        "seed-0/config.yaml: train.learning_rate: got 0.002, expected 0.001 as this run began" in done.stderr
    )

    done = compare("train.stesp=3")
    assert done.returncode == 2 and "did you mean steps?" in done.stderr
