"""The page of a real run in two stages, and its predictions, are compared with plain transformers."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dsdistill.engine.export import export
from dsdistill.report import write_page
from tests.conftest import merge, small_run
from tests.engine.launch import run_configs
from tests.report.browser import CHROMIUM, browser

CHANGES = {
    "run.name": "two-stages",
    "run.evaluate_every": 3,
    "run.baseline": True,
    "train.steps": 12,
    "terms.hidden": {"layer_weights": "dynamic"},
    "stages": [{"name": "inner", "terms": {"task": None, "soft_label": None}}, {"name": "outer", "share": 2}],
}


def plain(folder: Path, data_dir: Path) -> torch.Tensor:
    """Return (11, 3) float64 logits of the dev set, with each text alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
    with torch.no_grad():
        texts = (tokenizer(row["text"], return_tensors="pt") for row in rows(data_dir))
        return torch.cat([model(**text).logits for text in texts])


def rows(data_dir: Path) -> list[dict[str, str]]:
    with (data_dir / "dev.tsv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def undecided(model: Path, data_dir: Path, made: Path) -> Path:
    """Return a copy of a random model with mean logits of 0, which gives the dev texts different classes."""
    shutil.copytree(model, made)
    found = AutoModelForSequenceClassification.from_pretrained(made)
    with torch.no_grad():
        found.classifier.bias -= plain(made, data_dir).mean(0).float()
    found.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def run(models_dir, data_dir, tmp_path_factory):
    """Return the folder of a run by the command line."""
    home = tmp_path_factory.mktemp("home")
    config, settings = home / "config.yaml", merge(small_run(models_dir, data_dir, home), CHANGES)
    for model in ("teacher", "student"):
        settings[model]["path"] = str(undecided(models_dir / model, data_dir, home / model))
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "dsdistill", "train", str(config)]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"page: {home}/run/report.html"
    return home / "run"


def test_predictions_are_those_of_plain_transformers(run, data_dir, tmp_path):
    """In the order of the file, each line has each model's class and the probability that float64 gives it."""
    export(str(run), str(tmp_path / "student"))
    dev = rows(data_dir)
    found = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [line["texts"] for line in found] == [[row["text"]] for row in dev]
    assert [line["label"] for line in found] == [row["label"] for row in dev]
    assert len({line["id"] for line in found}) == len(dev)
    for name, path in {"teacher": run.parent / "teacher", "student": tmp_path / "student"}.items():
        shares, best = plain(path, data_dir).softmax(-1).max(-1)
        assert [line["probability"][name] for line in found] == pytest.approx(shares.tolist(), abs=2e-4)
        assert [line[name] for line in found] == ["abc"[place] for place in best]
        assert len(set(best.tolist())) > 1, "else the test could not tell rows that are swapped"
    summary = json.loads((run / "summary.json").read_text())
    for name in ("teacher", "student"):
        share = sum(line[name] == line["label"] for line in found) / len(found)
        assert summary["models"][name]["accuracy"] == pytest.approx(share)


def test_scores_are_written_as_the_models_give_them(models_dir, data_dir, tmp_path):
    """The squared errors of a regression's examples are the run's, each beside its own text."""
    texts, labels = [row["text"] for row in rows(data_dir)], [0.5 * i for i in range(11)]
    for name in ("train", "dev"):
        told = [f"{text}\t{label}" for text, label in zip(texts, labels, strict=True)]
        (tmp_path / f"{name}.tsv").write_text("text\tlabel\n" + "\n".join(told) + "\n", encoding="utf-8")
    data = {"data.train": str(tmp_path / "train.tsv"), "data.dev": str(tmp_path / "dev.tsv")}
    teacher = AutoModelForSequenceClassification.from_pretrained(
        models_dir / "teacher", num_labels=1, ignore_mismatched_sizes=True
    )
    for part in (teacher, AutoTokenizer.from_pretrained(models_dir / "teacher")):
        part.save_pretrained(tmp_path / "teacher")
    changes = {"task": "regression", "train.steps": 2, "teacher.path": str(tmp_path / "teacher"), **data}
    changes |= {"terms": {"task": {}, "soft_label": {}}}
    config, settings = tmp_path / "config.yaml", merge(small_run(models_dir, data_dir, tmp_path), changes)
    config.write_text(yaml.safe_dump(settings))
    run_configs([config], ranks=1)
    found = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [line["texts"] for line in found] == [[text] for text in texts]
    assert [line["label"] for line in found] == labels
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for model in ("student", "teacher"):
        loss = sum((line["value"][model] - line["label"]) ** 2 for line in found) / len(found)
        assert summary["models"][model]["loss"] == pytest.approx(loss, rel=1e-3)


def test_summary_tells_sizes_and_examples(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["shapes"]["teacher"] == {
        "model_type": "bert", "depth": 4, "width": 48, "heads": 4, "vocabulary": 64,
    }  # fmt: skip
    assert summary["shapes"]["student"]["depth"] == 2
    assert summary["examples"] == {"train": 37, "dev": 11}
    assert {"dsdistill", "torch", "deepspeed", "transformers"} == set(summary["versions"])


def charts(page: str) -> dict:
    """Return the data that the page's script draws."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page)[1])["charts"]


def test_page_shows_the_run(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in log if "loss" in record]
    drawn = {chart["title"]: chart for chart in charts(page).values()}
    curves = {curve["name"]: curve["xy"] for curve in drawn["Loss and weighted terms"]["curves"]}
    assert set(curves) == {"total", "task", "soft_label", "hidden", "attention", "pairwise"}
    assert curves["total"][::2] == [record["step"] for record in steps] == list(range(1, 13))
    assert curves["total"][1::2] == pytest.approx([record["loss"] for record in steps], rel=1e-4)
    assert curves["task"][0] == 5  # the first stage is without it
    weights = drawn["Layer weights of hidden"]["curves"]
    assert len(weights) == len(steps[0]["terms"]["hidden"]["layer_weights"])
    for title in ("Learning rate", "Gradient norm", "Throughput", "Peak memory of the first process"):
        assert any(value is not None for value in drawn[title]["curves"][0]["xy"][1::2])
    accuracy = {curve["name"]: curve["xy"] for curve in drawn["Dev sets: accuracy"]["curves"]}
    assert set(accuracy) == {"student", "baseline", "teacher"} and accuracy["student"][::2] == [3, 6, 9, 12]
    text = re.sub(r"<[^>]*>", " ", page)
    for told in ("two-stages", "12 steps on 1 process", "inner", "outer", "bert", "transformers"):
        assert told in text
    assert "not finished" not in text and "Settings that differ from the defaults" in text


def test_a_run_that_goes_on_is_shown_as_such(run, tmp_path):
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    page = Path(write_page(str(tmp_path))).read_text(encoding="utf-8")
    assert "not finished: the log ends at step 12" in page and 'id="models"' not in page


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_in_a_browser(run, tmp_path):
    """Every panel has a visible line, values follow the mouse, and there are no errors: light, dark, on a phone."""
    with browser(tmp_path / "profile") as shown:
        for way in ({}, {"dark": True}, {"width": 390, "height": 844, "phone": True}):
            shown.open(run / "report.html", **way)
            panels = shown.run(
                "[...document.querySelectorAll('figure')].map(f => [f.dataset.drawn, Math.max(0, "
                "...[...f.querySelectorAll('path')].map(p => p.getTotalLength()))])"
            )
            assert len(panels) == len(charts((run / "report.html").read_text()))
            assert all(drawn == "yes" and length > 100 for drawn, length in panels), panels
            assert shown.run("document.documentElement.scrollWidth <= innerWidth")
            paper = shown.run("getComputedStyle(document.body).backgroundColor")
            assert paper == ("rgb(20, 23, 27)" if way.get("dark") else "rgb(255, 255, 255)")
        shown.open(run / "report.html")
        place = shown.run(
            "document.querySelector('#loss').scrollIntoView(), (({left, top, width, height}) => "
            "[left + width / 2, top + height / 2])(document.querySelector('#loss svg').getBoundingClientRect())"
        )
        shown.point(*place)
        values = shown.run("document.querySelector('#loss .values').innerText")
        assert re.match(r"step [67]\n", values) and "total" in values and "attention" in values
        ticks = "[...document.querySelectorAll('#loss svg text')].map(t => t.textContent).join()"
        path = "document.querySelector('#loss path').getAttribute('d')"
        before = shown.run(ticks), shown.run(path)
        shown.run("document.querySelector('#loss input').click()")
        assert shown.run(ticks) != before[0] and shown.run(path) != before[1]
        shown.run("document.querySelector('#loss .legend button').click()")
        assert shown.run("document.querySelectorAll('#loss path').length") == 5
        assert shown.troubles == []
