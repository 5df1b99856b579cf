"""Pages of folders that are complete, old, half-written, hostile, or not of a run; test_real_run.py has a real one."""

import base64
import hashlib
import json
import math
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from dsdistill.config import UserError
from dsdistill.report import write_page
from dsdistill.report.curves import MOST, Curve
from tests.report.browser import CHROMIUM, browser

OLD = Path(__file__).parents[1] / "engine" / "format_1" / "run"
SCRIPT = '<script>window.owned = 1</script><img src=x onerror="window.owned = 1">\'&amp;'
SUMMARY = {
    "name": "quick",
    "task": "classification",
    "steps": 20,
    "world_size": 2,
    "seconds": 12.5,
    "finished": True,
    "models": {
        "teacher": {"accuracy": 0.9, "kl": 0.0, "parameters": 1000},
        "student": {"accuracy": 0.8, "kl": 0.25, "parameters": 500},
    },
    "versions": {"torch": "2.13.0"},
}


def step(number: int, **terms: float) -> dict:
    weighted = {name: {"raw": value, "weighted": value} for name, value in terms.items()}
    return {
        "step": number,
        "loss": sum(terms.values()),
        "terms": weighted,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
    }


def lines(path: Path, records: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def prediction(
    number: int, label: str, student: str, teacher: str | None, text: str = "a text", sure=0.5
) -> dict:
    given = {"student": student} | ({"teacher": teacher} if teacher else {})
    return {
        "id": f"dev:{number}",
        "texts": [text],
        "label": label,
        **given,
        "probability": dict.fromkeys(given, sure),
    }


class Markup(HTMLParser):
    """Markup holds what a parser finds in a page: its elements, their attributes, and the text of each part."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text: dict[str, str] = {}
        self._part, self._inside = "", ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self._inside = tag
        if tag in ("section", "header"):
            self._part = dict(attrs).get("id", tag)

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text[self._part] = self.text.get(self._part, "") + f" {data}"


def drawn(page: str) -> dict:
    """Return the data that the page's script reads; {} if there are no charts."""
    found = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found[1]) if found else {"charts": {}, "marks": []}


def page_of(folder: Path) -> str:
    return Path(write_page(str(folder))).read_text(encoding="utf-8")


def hostile(folder: Path) -> None:
    """Write a run in which every text is a script tag."""
    terms = {SCRIPT: {"raw": 1.0, "weighted": 1.0, "layer_weights": [1.0, 2.0]}}
    told = {"loss": 1.0, "terms": terms, "sources": {SCRIPT: {"loss": 1.0}}}
    records = [{"step": i, "stage": SCRIPT + str(i > 4), **told} for i in range(1, 9)]
    records.append({"step": 8, "evaluation": {f"{SCRIPT}/accuracy": 0.5, SCRIPT: 0.25}})
    lines(folder / "metrics.jsonl", records)
    lines(folder / "bad_steps.jsonl", [{"step": 3, "in": [SCRIPT], "examples": [SCRIPT]}])
    lines(folder / "spikes.jsonl", [{"step": 5, "loss": 9.0, "average": 1.0, "examples": SCRIPT}])
    told = prediction(1, SCRIPT, f"{SCRIPT} wrong", SCRIPT, SCRIPT) | {"id": SCRIPT, "set": SCRIPT}
    lines(folder / "predictions.jsonl", [told])
    models = {name: {"accuracy": 0.5, SCRIPT: 0.5} for name in ("teacher", "student", SCRIPT)}
    named = {
        "name": SCRIPT,
        "task": SCRIPT,
        "models": models,
        "versions": {SCRIPT: SCRIPT},
        "examples": {SCRIPT: 1},
    }
    shape = {"teacher": {"model_type": SCRIPT, "depth": SCRIPT}}
    (folder / "summary.json").write_text(
        json.dumps(SUMMARY | named | {"shapes": shape, "positive_class": SCRIPT})
    )
    settings = {
        "plugins": [SCRIPT],
        "teacher": {"path": SCRIPT},
        "student": {"path": SCRIPT, "zero_stage": SCRIPT},
        "terms": {SCRIPT: {"weight": SCRIPT, "layers": SCRIPT, SCRIPT: SCRIPT}},
        "data": {"source": SCRIPT, "text": [SCRIPT]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))


def test_everything_from_data_is_text(tmp_path):
    folder = tmp_path / "<script>window.owned = 1<"
    folder.mkdir()
    hostile(folder)
    plain = Markup(page_of(folder))
    assert plain.tags.count("script") == 2  # the points, and what draws them
    assert {"img", "iframe", "object", "a", "form"}.isdisjoint(plain.tags)
    assert not [name for name in plain.attributes if name.startswith("on")]
    for part in ("header", "models", "made-of", "stages", "troubles", "examples", "settings", "versions"):
        told = re.sub(r"\s+", " ", plain.text[part])  # YAML folds long lines
        assert SCRIPT.rpartition("/")[2] in told, part


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_no_text_runs_in_a_browser(tmp_path):
    hostile(tmp_path)
    with browser(tmp_path / "profile") as shown:
        shown.open(Path(write_page(str(tmp_path))))
        assert shown.run(
            "window.owned === undefined && document.images.length === 0 && document.scripts.length === 2"
        )
        assert shown.run("[...document.querySelectorAll('figure')].every(f => f.dataset.drawn === 'yes')")
        assert SCRIPT in shown.run("document.querySelector('#loss .legend').textContent")
        assert (
            shown.run("document.querySelector('#loss .bad title').textContent")
            == f"step 3: not finite, in {SCRIPT}"
        )
        assert SCRIPT in shown.run("document.querySelector('#examples').textContent")
        shown.run("document.querySelector('#loss').scrollIntoView()")
        box = shown.run(
            "(({left, top}) => [left + 200, top + 50])(document.querySelector('#loss svg').getBoundingClientRect())"
        )
        shown.point(*box)
        assert SCRIPT in shown.run("document.querySelector('#loss .values').textContent")
        assert shown.troubles == []
        # Even if we fail to escape a text, it is not run: the page's policy allows only its own script.
        shown.run(
            "document.body.insertAdjacentHTML('beforeend', '<img src=\"data:,\" onerror=\"window.owned = 1\">')"
        )
        shown.run("new Promise(done => setTimeout(done, 200))")
        assert shown.run("window.owned === undefined") and "Content Security Policy" in "".join(
            shown.troubles
        )


def test_the_page_needs_nothing_beside_it(tmp_path):
    """It has no address but the name of SVG; its policy allows only its own style and script."""
    lines(tmp_path / "metrics.jsonl", [step(i, task=1.0) for i in range(1, 5)])
    page = page_of(tmp_path)
    assert set(re.findall(r"\w+://[^\"'\s]*", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(src|href|srcset)=|@import|url\(", page)
    for name in ("style", "script"):
        inside = re.search(rf"<{name}>(.*?)</{name}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page and 'name="viewport"' in page


def test_bad_steps_and_jumps_are_marked(tmp_path):
    lines(tmp_path / "metrics.jsonl", [step(i, task=math.nan if i == 3 else 1.0) for i in range(1, 9)])
    bad = {"step": 3, "in": ["task"], "terms": {"task": "nan"}, "examples": [f"dev:{i}" for i in range(9)]}
    lines(tmp_path / "bad_steps.jsonl", [bad, bad])  # twice after a resume
    lines(tmp_path / "spikes.jsonl", [{"step": 6, "loss": 40.0, "average": 2.0}])
    page = page_of(tmp_path)
    assert [(mark["x"], mark["kind"]) for mark in drawn(page)["marks"]] == [(3, "bad"), (6, "spike")]
    total = drawn(page)["charts"]["loss"]["curves"][0]["xy"]
    assert total[4:6] == [3, None]
    text = Markup(page).text["troubles"]
    assert "not finite, in task" in text and "loss 40, average 2" in text and "dev:4 and 4 more" in text


def test_a_language_model_has_no_examples(tmp_path):
    models = {"student": {"perplexity": 31.4}}
    (tmp_path / "summary.json").write_text(
        json.dumps({"task": "causal_lm", "models": models, "finished": True})
    )
    text = Markup(page_of(tmp_path)).text
    assert "perplexity 31.4" in re.sub(r"\s+", " ", text["models"]) and text.keys() == {
        "",
        "header",
        "models",
    }


def test_a_run_of_the_first_version(tmp_path):
    shutil.copytree(OLD, tmp_path / "run")
    page = page_of(tmp_path / "run")
    records = [json.loads(line) for line in (OLD / "metrics.jsonl").read_text().splitlines()]
    charts = drawn(page)["charts"]
    assert charts["loss"]["curves"][0]["xy"][::2] == [r["step"] for r in records if "loss" in r]
    assert {"rate", "norm", "pace", "memory"} <= charts.keys()
    text = Markup(page).text
    assert "not finished" in text["header"] and "final_norm: before" in text["settings"]


GARBAGE = {
    "nothing": b"",
    "zeros": bytes(1000),
    "no UTF-8": b"\xff\xfe\x00",
    "cut short": b'{"step": 1, "loss": 1.0}\n{"step": 2, "lo',
    "a list": b"[1, 2]\n",
    "words": b'{"step": "a", "loss": "b", "terms": "c", "models": "d", "evaluation": "e", "in": 1, "examples": 2}\n',
    "lists": b'{"step": [], "loss": [], "terms": [[]], "models": [[]], "stages": [1], "data": [], "versions": []}\n',
    "huge": b'{"step": 1e999, "loss": 1e999}\n{"step": %s, "loss": 1}\n{"step": %s}\n' % (b"9" * 400, b"9" * 9999),
    "no numbers": b'{"step": 1, "loss": NaN, "terms": {"a": {"raw": NaN, "weighted": null}}, "grad_norm": Infinity}\n',
    "deep": b"[" * 100_000 + b"\n",
    "half a character": b'{"step": 1, "name": "\\ud800", "id": "\\ud800", "label": "\\udfff", "task": "\\ud800"}\n',
    "steps that go back": b'{"step": 5, "loss": 1}\n{"step": 2, "loss": 3}\n{"step": -1, "loss": 3}\n',
    "terms of odd kinds": b'{"step": 1, "loss": 1, "stage": 5, "terms": {"a": 1, "b": {"layer_weights": {"c": 1}}}}\n',
    "searches of odd kinds": b'{"rank": 3, "texts": {}}\n{"rank": {"student": 3, "teacher": 1}, "id": {}}\n',
    "scores of odd kinds": b'{"value": 3, "label": {}}\n{"value": {"student": 3, "teacher": 1}, "label": 1}\n',
    "predictions of odd kinds": b'{"label": [], "student": {}, "teacher": [], "texts": {"a": 1}, "probability": 5}\n',
    "models of odd kinds": b'{"models": {"student": {"accuracy": "high", "kl": null, "cost": true}, "teacher": 5}, '
    b'"steps": "many", "seconds": "long", "peak_memory_mib": [], "name": {"a": 1}, "shapes": 3, "finished": 1}\n',
}  # fmt: skip
FILES = (
    "metrics.jsonl",
    "summary.json",
    "config.yaml",
    "predictions.jsonl",
    "bad_steps.jsonl",
    "spikes.jsonl",
)


@pytest.mark.parametrize("case", GARBAGE, ids=lambda name: name.replace(" ", "-"))
def test_whatever_lies_there_makes_a_page(tmp_path, case):
    """Bad contents are in each file alone beside good ones, and in all files at once."""
    for broken in (*((name,) for name in FILES), FILES):
        folder = tmp_path / "-".join(broken)[:40]
        lines(folder / "metrics.jsonl", [step(1, task=1.0), {"step": 1, "evaluation": {"accuracy": 0.5}}])
        (folder / "summary.json").write_text(json.dumps(SUMMARY))
        (folder / "baseline").mkdir()
        (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
        for name in broken:
            (folder / name).write_bytes(GARBAGE[case])
        if len(broken) > 1:
            (folder / "baseline" / "metrics.jsonl").write_bytes(GARBAGE[case])
            (folder / "checkpoints" / "step-00000001" / "state.json").write_bytes(GARBAGE[case])
        page = page_of(folder)
        text = Markup(page).text
        assert page.endswith("</html>\n")
        if broken == ("metrics.jsonl",):
            assert "0.8000" in text["models"]
        elif broken == ("summary.json",):
            assert drawn(page)["charts"]["loss"]["curves"][0]["xy"] == [1, 1]


def test_lines_that_cannot_be_read_are_told(tmp_path):
    lines(tmp_path / "metrics.jsonl", [step(1, task=1.0), step(2, task=0.5)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('broken\n{"step": 3, "lo')
    page = page_of(tmp_path)
    assert "metrics.jsonl: 2 lines cannot be read" in page
    assert drawn(page)["charts"]["loss"]["curves"][0]["xy"] == [1, 1, 2, 0.5]


def test_a_setting_of_another_version_is_shown_as_it_is(tmp_path):
    (tmp_path / "config.yaml").write_text("format: 99\ntrain: {steps: 7}\n")
    text = Markup(page_of(tmp_path)).text
    assert "steps: 7" in text["settings"] and "format: got 99" in "".join(text.values())


def test_no_plugin_is_imported(tmp_path, monkeypatch):
    """Showing a run must not run its code."""
    (tmp_path / "owned.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(
        "format: 4\nplugins: [owned]\nstudent: {path: x, secret_key: abcdef}\n"
    )
    page = page_of(tmp_path)
    assert "- owned" in page and "abcdef" not in page


def test_curves_keep_their_least_and_greatest():
    rng = random.Random(0)
    values = [None if rng.random() < 0.01 else rng.gauss(0, 1) for _ in range(123_457)]
    values[777], values[99_999] = -50.0, 60.0
    curve = Curve()
    for x, y in enumerate(values):
        curve.add(x, y)
    thinned = curve.thinned(MOST)
    assert MOST // 2 < len(thinned) <= MOST and {(777, -50.0), (99_999, 60.0)} <= set(thinned)
    assert (thinned[0][0], thinned[-1][0]) == (0, len(values) - 1)
    assert all(values[int(x)] == y for x, y in thinned) and any(y is None for _, y in thinned)
    assert [x for x, _ in thinned] == sorted({x for x, _ in thinned})
    # Every part of the curve keeps its highest and lowest values.
    for start in range(0, len(values), 5000):
        inside = [y for y in values[start : start + 5000] if y is not None]
        kept = [y for x, y in thinned if start <= x < start + 5000 and y is not None]
        assert max(kept) > max(inside) - 1.5 and min(kept) < min(inside) + 1.5
    assert curve.thinned(len(values)) == [(x, y) for x, y in enumerate(values)]


def test_a_line_of_a_resume_replaces_those_after_it(tmp_path):
    lines(tmp_path / "metrics.jsonl", [step(i, task=1.0) for i in range(1, 8)] + [step(5, task=2.0)])
    assert drawn(page_of(tmp_path))["charts"]["loss"]["curves"][0]["xy"][-4:] == [4, 1, 5, 2]


def test_a_large_run_stays_below_two_megabytes(tmp_path):
    """Fifteen terms, one of 144 layer pairs, long texts of characters that are escaped, of every kind."""
    rng = random.Random(0)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for number in range(1, 4001):
            record = step(number * 1000, **{f"a_term_{i}": rng.random() for i in range(15)})
            record["terms"]["a_term_0"]["layer_weights"] = [rng.random() for _ in range(144)]
            file.write(json.dumps(record) + "\n")
    text = '"&<' * 1000
    bad = {"in": [text], "examples": [text] * 9}
    lines(tmp_path / "bad_steps.jsonl", [{"step": i, **bad} for i in range(600)])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"plugins": ["x"], "data": {"train": text * 1000}}))
    lines(tmp_path / "predictions.jsonl", [prediction(i, "a", "b", "a", text) for i in range(300)])
    page = page_of(tmp_path)
    assert len(page.encode()) < 2_000_000
    chart = drawn(page)["charts"]["weights-0"]
    assert len(chart["curves"]) == 64 and "80 more curves are not drawn" in page
    assert MOST / 2 < len(drawn(page)["charts"]["loss"]["curves"][0]["xy"]) / 2 <= MOST


def make_run(folder: Path, accuracy: float | None, seed: int = 0, **settings: object) -> None:
    """Write a run of a comparison; accuracy None: it is not finished."""
    lines(folder / "metrics.jsonl", [step(1, task=1.0), step(7, task=0.5)])
    config = {"run": {"dir": str(folder), "seed": seed}, "train": {"steps": 7, **settings}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if accuracy is not None:
        models = {"teacher": {"accuracy": 0.95}, "student": {"accuracy": accuracy, "tokens_per_second": 5.0}}
        (folder / "summary.json").write_text(
            json.dumps({"models": models, "finished": True, "evaluated": "step-7"})
        )


def test_comparison(tmp_path):
    """Means and deviations are checked by hand; the one varied setting has a chart; unfinished runs are shown."""
    for rate, found in {1e-5: (0.5, 0.7), 1e-4: (0.8, 0.8), 1e-2: (0.6, None)}.items():
        for seed, accuracy in enumerate(found):
            make_run(tmp_path / f"rate-{rate}" / f"seed-{seed}", accuracy, seed, learning_rate=rate)
    make_run(tmp_path / "other" / "seed-0", 0.9, learning_rate=1e-4, scheduler="cosine")
    make_run(tmp_path / "begun" / "seed-10", None)
    (tmp_path / "empty" / "seed-0").mkdir(parents=True)
    write_page(str(tmp_path / "other" / "seed-0"))
    page = page_of(tmp_path)
    text = {name: re.sub(r"\s+", " ", of) for name, of in Markup(page).text.items()}
    assert "comparison · 5 methods · 6 of 8 runs finished" in text["header"]
    for row in (
        "teacher 1 0.9500",
        "rate-1e-05 2 0.6000 ± 0.1414",
        "rate-0.0001 2 0.8000 ± 0.0000",
        "rate-0.01 1 0.6000",
    ):
        assert row in text["methods"]
    assert "begun" not in text["methods"] and "begun/seed-10 at step 7" in text["runs"]
    assert "rate-0.01/seed-1 at step 7" in text["runs"] and "rate-0.01/seed-0 evaluated" in text["runs"]
    assert re.findall(r'href="([^"]*)"', page) == ["./other/seed-0/report.html"]
    (chart,) = drawn(page)["charts"].values()
    assert (
        chart["title"] == "accuracy by train.learning_rate"
        and chart["x"] == "train.learning_rate"
        and chart["xlog"]
    )
    (curve,) = chart["curves"]
    assert curve["xy"] == pytest.approx([1e-5, 0.6, 1e-4, 0.8, 1e-2, 0.6])
    assert curve["sd"] == pytest.approx([0.141421, 0, 0], abs=1e-5)


def test_a_comparison_without_a_finished_run(tmp_path):
    make_run(tmp_path / "one" / "seed-0", None)
    text = Markup(page_of(tmp_path)).text
    assert "0 of 1 runs finished" in text["header"] and "methods" not in text


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_a_comparison_in_a_browser(tmp_path):
    for rate in (1e-5, 1e-4, 1e-2):
        for seed in (0, 1):
            make_run(
                tmp_path / f"rate-{rate}" / f"seed-{seed}", 0.5 + rate + seed / 10, seed, learning_rate=rate
            )
    with browser(tmp_path / "profile") as shown:
        shown.open(Path(write_page(str(tmp_path))))
        assert shown.run("document.querySelectorAll('#sweep-0 circle').length") == 3
        assert shown.run("document.querySelectorAll('#sweep-0 .deviation').length") == 3
        assert (
            shown.run("document.querySelector('#sweep-0').innerText").count("e-5") == 1
        )  # a tick of its own
        assert shown.troubles == []


def test_somebody_elses_page_is_left_alone(tmp_path, refused):
    lines(tmp_path / "metrics.jsonl", [step(1, task=1.0)])
    theirs = tmp_path / "report.html"
    theirs.write_text("<!DOCTYPE html>\n<html lang='en'>mine")
    line = refused("report", tmp_path)
    assert line.startswith(f"{theirs}: got a file that dsdistill did not write")
    theirs.unlink()
    theirs.symlink_to(tmp_path / "elsewhere.html")
    refused("report", tmp_path)
    theirs.unlink()
    write_page(str(tmp_path))
    write_page(str(tmp_path))  # it does replace its own page


@pytest.mark.parametrize("name", ["nowhere", "a\0b", "x" * 300, "file"])
def test_no_folder(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match="got no such folder, expected the folder of a run or of a comparison"
    ):
        write_page(str(tmp_path / name))


def test_style_and_script_are_in_the_wheel():
    import tomllib

    root = Path(__file__).parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "dsdistill"
    ]
    shipped = {path for pattern in patterns for path in (root / "dsdistill").glob(pattern)}
    assert {path.name for path in shipped if path.parent.name == "report"} == {"page.css", "page.js"}
