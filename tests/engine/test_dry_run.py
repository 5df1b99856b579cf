"""From the beginning of the files, a dry run finds what would stop a run, and it writes nothing."""

import sys

import pytest
import yaml

from dsdistill import cli
from dsdistill.config import load
from dsdistill.engine.dry_run import LOOKED, check
from tests.conftest import snapshot

# Changes of the tests' config, further arguments, variables of a launcher, and what the line must hold.
MISTAKES = {
    "ranks": ({}, ["--world-size", "3"], {}, "train.batch_size: got 8, expected a multiple of"),
    "launched ranks": ({}, [], {"WORLD_SIZE": "3", "RANK": "0"}, "train.batch_size: got 8, expected a mul"),
    "no ranks": ({}, ["--world-size", "0"], {}, "--world-size: got 0, expected 1 or more"),
    "ranks of words": ({}, [], {"WORLD_SIZE": "all"}, "WORLD_SIZE: got 'all'"),
    "file": ({"data.dev": "nowhere.tsv"}, [], {}, "nowhere.tsv: got no such file"),
    "column": (
        {"data.text": ["txt"]},
        [],
        {},
        "train.tsv: got no column 'txt', expected one of its columns: ",
    ),
    "label": ({"data.label": "lable"}, [], {}, "train.tsv: got no column 'lable'"),
    "header alone": ({"data.dev": "header.tsv"}, [], {}, "header.tsv: got no rows"),
    "of json": ({"data.dev": "rows.jsonl"}, [], {}, "rows.jsonl: got no column 'label', expected one of its"),
    "domain": (
        {"data.domain": ["nowhere.txt"], "data.general": ["a.txt"]},
        [],
        {},
        "nowhere.txt: got no such",
    ),
    "recipe": (
        {"teacher.path": None, "teacher.recipe": "teacher.yaml"},
        [],
        {},
        "teacher.yaml: gone.tsv: got no",
    ),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "header.tsv").write_text("text\tlabel\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    teacher = {
        "data": {"source": "files", "train": "gone.tsv"},
        "student": {"config": {"model_type": "bert"}},
    }
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(teacher))


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(config, here, tmp_path, monkeypatch, capsys, case):
    changes, arguments, variables, told = MISTAKES[case]
    path = config(changes)
    before = snapshot(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["dsdistill", "train", path, "--dry-run", *arguments])
    assert cli.run() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dsdistill: {path}: ") and told in line
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("option", [["--full"], ["--world-size", "2"]])
def test_options_of_a_dry_run_alone(config, monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["dsdistill", "train", config(), *option])
    assert cli.run() == 2
    assert f"{option[0]}: got a run, expected --dry-run beside it" in capsys.readouterr().err


def test_the_beginning_alone_is_read(config, tmp_path):
    """Rows may lack a value that others have; mistakes after the first rows are left to the run."""
    rows = ['{"text": "a"}'] + ['{"text": "b", "label": "c"}'] * LOOKED + ["no JSON"]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    assert check(load([config({"data.train": str(tmp_path / "rows.jsonl")})])) == []


def test_hub_data_is_named_and_not_fetched(config, monkeypatch, capsys):
    path = config(
        {"data": {"source": "nyu-mll/glue", "subset": "sst2", "text": ["sentence"], "max_length": 32}}
    )
    monkeypatch.setattr(sys, "argv", ["dsdistill", "train", path, "data.dev=validation", "--dry-run"])
    assert cli.run() == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
    assert told == [
        f"# not checked, because it is on the hub: nyu-mll/glue: {name}" for name in ("train", "validation")
    ]


def test_what_a_stage_changes_is_read_back(config, tmp_path):
    """A stage may leave out, change and add terms of the run, even if the run's terms are the default."""
    from dsdistill.config import dump

    stages = [
        {"name": "one", "terms": {"soft_label": None, "task": {"weight": 0.5}}},
        {"name": "two", "terms": {"hidden": {}, "soft_label": {"temperature": 1.0}}},
    ]
    runs = (
        {"task": {"weight": 2.0}, "soft_label": {"temperature": 3.0}},
        {"task": {}, "soft_label": {}},
        None,
    )
    for terms in runs:
        found = load([config({"terms": terms or {"task": {}}, "stages": stages if terms else stages[1:]})])
        (tmp_path / "short.yaml").write_text(dump(found, full=False))
        assert load([str(tmp_path / "short.yaml")]) == found
