"""The teacher reads a dev set once: its outputs serve later evaluations, and other runs through the cache."""

import contextlib
import json
import logging
import random
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from dsdistill.config import load
from dsdistill.data import TextPairs
from dsdistill.engine.passes import at_once, teacher_outputs
from dsdistill.engine.passes.teacher_outputs import TeacherOutputs
from dsdistill.engine.prepare import prepare
from dsdistill.evaluation.scores import Outputs
from tests.conftest import BERT, sentence
from tests.data.rig import made
from tests.engine.launch import run_configs

SPEED = "tokens_per_second"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_dir):
    """Write teacher/ with a trained head, and train.tsv and dev.tsv of two classes."""
    folder = tmp_path_factory.mktemp("outputs")
    torch.manual_seed(0)
    settings = BERT | {"num_labels": 2}
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(settings.pop("model_type"), **settings)
    )
    model.save_pretrained(folder / "teacher")
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder / "teacher")
    rng = random.Random(1)
    for name, rows in (("train", 24), ("dev", 11)):
        lines = [f"{sentence(rng)}\t{i % 2}" for i in range(rows)]
        (folder / f"{name}.tsv").write_text("text\tlabel\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write(folder, name, cache="cache", **changes):
    """Write the config of a run; return its path."""
    case = {
        "run": {"name": name, "dir": str(folder / name), "log_every": 1, "evaluate_every": 2},
        "data": {
            "source": "files",
            "train": str(folder / "train.tsv"),
            "dev": str(folder / "dev.tsv"),
            "max_length": 32,
            "cache": str(folder / cache),
        },
        "teacher": {"path": str(folder / "teacher"), "zero_stage": 3},
        "student": {"config": BERT | {"num_hidden_layers": 2}},
        "terms": {"task": {}, "soft_label": {}},
        "train": {"steps": 4, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-3},
    }
    for section, values in changes.items():
        case[section] = case[section] | values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(case))
    return path


@pytest.fixture(scope="module")
def log(folder):
    """Do the runs first, second and apart on two ranks, one after the other; apart has a cache of its own."""
    second = {"terms": {"task": {}, "soft_label": {}, "hidden": {}}}
    return run_configs(
        [
            write(folder, "first"),
            write(folder, "second", **second),
            write(folder, "apart", cache="other", **second),
        ]
    )


def scores(run):
    """Return the scores of both models at every evaluation, without speeds."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line["evaluation"] for line in lines if "evaluation" in line]
    found += [json.loads((run / "summary.json").read_text())["models"][of] for of in ("student", "teacher")]
    return [{name: value for name, value in of.items() if not name.endswith(SPEED)} for of in found]


def test_a_run_with_kept_outputs_scores_as_one_without(folder, log):
    """All evaluations agree digit for digit, and the students are not those of the first run."""
    assert scores(folder / "second") == scores(folder / "apart")
    assert scores(folder / "second")[0] != scores(folder / "first")[0]
    assert scores(folder / "second")[-1] == scores(folder / "first")[-1]  # the teacher


def test_only_the_second_run_reads_the_cache(folder, log):
    read = [line for line in log.splitlines() if "the teacher's outputs on 11 texts" in line]
    assert len(read) == 1 and str(folder / "cache") in read[0]
    files = [path.name for path in (folder / "cache").glob("teacher-*")]
    assert len(files) == 1 and files == [path.name for path in (folder / "other").glob("teacher-*")]


def test_the_speed_is_that_of_the_pass(folder, log):
    speeds = [
        json.loads((folder / run / "summary.json").read_text())["models"]["teacher"][SPEED]
        for run in ("first", "second")
    ]
    assert speeds[0] == speeds[1] > 0


RANKS = SimpleNamespace(
    first=True,
    world_size=1,
    rank=0,
    device=torch.device("cpu"),
    gather=lambda value: [value],
    first_alone=contextlib.nullcontext,
)


@pytest.fixture
def keeper(folder, tmp_path):
    """Return a function that prepares a changed run and returns what keeps its teacher's outputs on the dev set."""

    def make(cache="cache", **changes):
        prepared = prepare(load([str(write(folder, "case", cache=tmp_path / cache, **changes))]), 1)
        return TeacherOutputs(prepared.data.dev, prepared, RANKS)

    return make


def warnings(caplog):
    """Return only the warnings, since other tests of this process may have turned on the log."""
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


MADE = Outputs(torch.arange(22.0).reshape(11, 2), {SPEED: 5.0})


def test_what_another_teacher_pass_would_change_has_another_name(keeper, folder):
    base = keeper().key
    assert keeper(terms={"hidden": {}}, run={"seed": 3}, train={"learning_rate": 1.0}).key == base
    short = folder / "short.tsv"
    short.write_text("".join((folder / "dev.tsv").read_text().splitlines(keepends=True)[:6]))
    others = [
        keeper(teacher={"dtype": "bf16"}),
        keeper(teacher={"zero_stage": 0}),
        keeper(train={"micro_batch_size": 2}),
        keeper(data={"max_length": 16}),
        keeper(data={"dev": str(short)}),
    ]
    assert len({base, *(other.key for other in others)}) == 6


def test_a_damaged_file_is_made_again(keeper, caplog):
    kept = keeper()
    assert kept.find() is None
    kept.keep(MADE)
    again = keeper().find()
    assert torch.equal(again.values, MADE.values) and again.speeds == MADE.speeds
    kept.path.write_bytes(kept.path.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING, "dsdistill"):
        assert keeper().find() is None
    assert warnings(caplog) == [f"{kept.path} is damaged and is made again"]


def test_a_cache_that_cannot_be_written_keeps_nothing(keeper, tmp_path, caplog):
    (tmp_path / "taken").write_text("")
    kept = keeper()  # the data needs a cache that can be written
    kept.prepared.config = kept.prepared.config.model_copy(
        update={"data": kept.prepared.config.data.model_copy(update={"cache": str(tmp_path / "taken")})}
    )
    with caplog.at_level(logging.WARNING, "dsdistill"):
        kept.keep(MADE)
    (line,) = warnings(caplog)
    assert "cannot be kept in the cache" in line
    assert kept.find() is MADE  # but they are kept for this run


def test_large_outputs_are_not_kept(keeper, monkeypatch):
    monkeypatch.setattr(teacher_outputs, "MOST", MADE.values.nbytes - 1)
    kept = keeper()
    kept.keep(MADE)
    assert kept.find() is None and not kept.path.exists()


def test_a_batch_of_pairs_has_no_more_rows_than_one_of_training():
    pairs = TextPairs(made([[1], [2]]))
    for columns, examples, size in ((1, pairs, 2), (2, pairs, 4), (1, pairs.texts, 4)):
        config = SimpleNamespace(
            train=SimpleNamespace(micro_batch_size=4), data=SimpleNamespace(train_columns=columns)
        )
        assert at_once(SimpleNamespace(config=config), examples) == size
