"""A run has several dev sets, and is scored on further files, through the command line on two ranks."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dsdistill.config import UserError
from dsdistill.config.data_section import Data, Part
from dsdistill.config.load import make_config
from dsdistill.data import Loader
from dsdistill.data.sources import parts, with_dev_files
from dsdistill.engine import evaluate
from dsdistill.engine.evaluate import evaluate_run
from dsdistill.engine.passes.stability import stability
from dsdistill.engine.prepare import prepare
from dsdistill.engine.run_folder import RunFolder, check_sources
from tests.conftest import sentence
from tests.engine.launch import launch
from tests.engine.test_run import command, write


@pytest.fixture
def two_sets(settings, tmp_path) -> dict:
    """Return settings of a run with two dev sets of unequal sizes and two classes, one of them the other's negation."""
    rng = random.Random(1)
    for name, rows in (("train", 24), ("matched", 11), ("mismatched", 7), ("other", 9)):
        kinds = ("equivalent", "not_equivalent")
        lines = [f"{sentence(rng)}\t{kinds[(i * i) % 3 % 2]}" for i in range(rows)]
        (tmp_path / f"{name}.tsv").write_text("text\tlabel\n" + "\n".join(lines) + "\n", encoding="utf-8")
    data = {"root": str(tmp_path), "train": "train.tsv"}
    data |= {"dev": {"matched": "matched.tsv", "mismatched": "mismatched.tsv"}}
    changes = {"num_labels": 2, "ignore_mismatched_sizes": True}
    model = AutoModelForSequenceClassification.from_pretrained(settings["student"]["path"], **changes)
    model.classifier.weight.data.mul_(40.0)  # peaked outputs
    model.save_pretrained(tmp_path / "student")
    AutoTokenizer.from_pretrained(settings["student"]["path"]).save_pretrained(tmp_path / "student")
    student = {"path": str(tmp_path / "student")}
    return settings | {
        "data": settings["data"] | data,
        "teacher": None,
        "student": student,
        "terms": {"task": {}},
        "run": settings["run"] | {"evaluate_every": 3},
        "train": settings["train"]
        | {"epochs": 1, "label_smoothing": 0.2, "class_weights": {"equivalent": 0.1, "not_equivalent": 0.03}},
    }


def first_loss(settings: dict) -> float:
    """Return the first step's loss by plain PyTorch, over the rows that a run takes with any number of ranks."""
    prepared = prepare(make_config(settings), 1)
    model = AutoModelForSequenceClassification.from_pretrained(settings["student"]["path"]).eval()
    train, labels = prepared.data.train, []
    logits = []
    for row in Loader(train, 8, 8, 1, 0, 0, 0).rows(0, 0).tolist():
        with torch.no_grad():
            logits.append(model(torch.from_numpy(train.tokens(row).astype("int64"))[None]).logits[0])
        labels.append(train.labels[row])
    weight = torch.tensor([0.1, 0.03])
    return F.cross_entropy(torch.stack(logits), torch.stack(labels), weight, label_smoothing=0.2).item()


def scores_by_hand(run: Path, path: Path) -> tuple[float, float]:
    """Return accuracy, and F1 of equivalent, of the exported student over a file, by plain transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(run).eval()
    tokenizer = AutoTokenizer.from_pretrained(run)
    rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    inputs = tokenizer(
        [text for text, _ in rows], padding=True, truncation=True, max_length=32, return_tensors="pt"
    )
    with torch.no_grad():
        predicted = [model.config.id2label[i] for i in model(**inputs).logits.argmax(-1).tolist()]
    pairs = list(zip(predicted, (label for _, label in rows), strict=True))
    hits = sum(pair == ("equivalent", "equivalent") for pair in pairs)
    said = sum((guess == "equivalent") + (label == "equivalent") for guess, label in pairs)
    return sum(guess == label for guess, label in pairs) / len(pairs), 2 * hits / said


def test_each_dev_set_is_scored_and_other_files_beside_them(two_sets, tmp_path, refused):
    done = launch("--module", "dsdistill", "train", write(tmp_path / "config.yaml", two_sets))
    assert done.returncode == 0, done.stderr
    run = Path(two_sets["run"]["dir"])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["positive_class"] == "equivalent" and "F1 is that of class equivalent" in done.stdout
    assert command("export", run, "--out", "exported", cwd=tmp_path).returncode == 0
    student = summary["models"]["student"]
    for name in ("matched", "mismatched"):  # accuracy uses the labels without class weights or smoothing
        accuracy, f1 = scores_by_hand(tmp_path / "exported", tmp_path / f"{name}.tsv")
        assert student[f"{name}/accuracy"] == pytest.approx(accuracy)
        assert student[f"{name}/f1"] == pytest.approx(f1)
    assert student["matched/loss"] != student["mismatched/loss"] and "accuracy" not in student
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (evaluation,) = (line["evaluation"] for line in lines if "evaluation" in line)
    assert lines[0]["terms"]["task"]["raw"] == pytest.approx(first_loss(two_sets), rel=1e-5)
    assert evaluation["mismatched/loss"] == pytest.approx(student["mismatched/loss"])

    files = [str(tmp_path / f"{name}.tsv") for name in ("other", "mismatched")]
    done = launch("--module", "dsdistill", "evaluate", run, "--data", files[0], "--data", files[1])
    assert done.returncode == 0, done.stderr
    assert all(f"test | classification | {name}" in done.stdout for name in files)
    after = json.loads((run / "summary.json").read_text())
    others = after.pop("others")
    assert after == summary and list(others) == files
    found = others[files[0]]
    accuracy, f1 = scores_by_hand(tmp_path / "exported", Path(files[0]))
    assert found["student"]["accuracy"] == pytest.approx(accuracy)
    assert found["student"]["f1"] == pytest.approx(f1) and found["evaluated"] == "step-00000003"
    assert others[files[1]]["student"]["loss"] == pytest.approx(student["mismatched/loss"])

    done = command("evaluate", run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = json.loads((run / "summary.json").read_text())
    assert again["others"] == others
    assert again["models"]["student"]["matched/loss"] == pytest.approx(student["matched/loss"], rel=1e-5)

    # Classes that the run does not have are refused before a model is loaded.
    (tmp_path / "bad.tsv").write_text("text\tlabel\nthe tensor\tmaybe\n")
    told = refused("evaluate", run, "--data", "bad.tsv")
    assert told.startswith(
        "bad.tsv, line 2: got label 'maybe' in column label, expected one of the 2 classes"
    )


def test_a_file_that_is_not_there_is_refused_before_anything(two_sets, tmp_path, monkeypatch):
    RunFolder(two_sets["run"]["dir"]).open(make_config(two_sets))
    monkeypatch.setattr(evaluate, "running", lambda _: pytest.fail("the ranks met before the refusal"))
    with pytest.raises(UserError, match=r"nowhere.tsv: got no such file"):
        evaluate_run(two_sets["run"]["dir"], ["nowhere.tsv"])


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "nyu-mll/glue", "subset": "mnli", "root": "here"},
        {"source": "files", "train": ("a.tsv", "b.tsv"), "label": "gold", "max_train": 5},
        {"source": "docstrings"},
        {
            "source": "files",
            "root": "here",
            "messages": "turns",
            "train": (Part(train="a.jsonl", text=("x",), weight=2.0), Part(source="other/set", name="set")),
        },
    ],
    ids=["hub", "files", "built in", "parts"],
)
def test_the_train_set_stays_the_same(changes):
    """Other dev files change neither the files nor the reading of train examples."""
    section = Data(**changes, max_dev=3)
    found = with_dev_files(section, ["x.tsv", "y.tsv"])
    assert found.dev == {"x.tsv": "x.tsv", "y.tsv": "y.tsv"} and found.source == "files"
    assert found.root is None and found.subset is None and found.max_dev is None
    reads = (
        "source",
        "subset",
        "root",
        "train",
        "text",
        "messages",
        "label",
        "layout",
        "train_on",
        "max_train",
    )
    before, after = (
        [(weight, {key: getattr(part, key) for key in reads}) for _, weight, part in parts(of)]
        for of in (section, found)
    )
    assert before == after


def test_steadiness_stands_beside_the_distance_on_any_dev_set(tmp_path):
    for step in (1, 2):
        (tmp_path / "representations").mkdir(exist_ok=True)
        states = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        np.save(tmp_path / "representations" / f"step-{step:08d}.npy", states.numpy())
    assert set(stability({"x/kl": 0.5, "x/accuracy": 1.0}, str(tmp_path), 2)) == {"rcs", "cka_distance"}
    assert stability({"kl": 0.5}, str(tmp_path), 2) and not stability({"x/accuracy": 1.0}, str(tmp_path), 2)


def test_no_source_of_a_run_lies_where_the_run_writes(two_sets, tmp_path):
    """This includes dev sets with names, and the parts of a mixture."""
    run = Path(two_sets["run"]["dir"])
    RunFolder(str(run)).open(make_config(two_sets))
    (run / "init").mkdir()
    (run / "init" / "a.tsv").write_text("text\tlabel\n")
    inside = str(run / "init" / "a.tsv")
    data = two_sets["data"]
    for changes in (
        {"dev": {"x": "matched.tsv", "y": inside}},
        {"train": [{"train": "train.tsv"}, {"train": inside}]},
    ):
        with pytest.raises(UserError, match=r"a.tsv, which the run writes itself"):
            check_sources(make_config(two_sets | {"data": data | changes}), [])
    check_sources(make_config(two_sets), [])
