"""Make the parts of a run's page: its models, terms and data, its scores, its curves, its bad steps."""

import json
import os
from collections.abc import Iterator
from typing import Any

from dsdistill.report.curves import Chart, Log
from dsdistill.report.figures import charts_section
from dsdistill.report.markup import Html, cut, grid, section, tag
from dsdistill.report.mistakes import mistakes
from dsdistill.report.run_files import (
    BASELINE,
    CONFIG,
    METRICS,
    SUMMARY,
    RunFiles,
    mapping,
    number,
    part,
    scores_of,
)
from dsdistill.report.summary import MODELS, facts, in_order, metric, notes, shown, title
from dsdistill.report.troubles import trouble_table, troubles_of

MARKS, NOTE = 300, 100  # most bad steps that are drawn, and most characters of the note on each
SETTINGS = 30_000  # most characters of settings that are shown


def content(path: str) -> tuple[str, list[Html]]:
    """Return the title and the parts of a run's page; it shows what the folder has, and says what it lacks."""
    files = RunFiles(path)
    summary, settings = files.object(SUMMARY), files.settings()
    scores = scores_of(summary)
    name = str(
        summary.get("name") or part(settings, "run", "name") or os.path.basename(os.path.abspath(path))
    )
    log = Log(files)
    troubles = troubles_of(files)
    made = [
        _models(scores, summary),
        _ingredients(settings, summary, scores),
        *_curves(files, log, scores, troubles),
        _stages(log),
        trouble_table(troubles),
        mistakes(files),
        _settings(files, settings),
        _versions(files, summary),
    ]
    problems = [tag("p", problem, class_="warning") for problem in files.problems]
    return name[:NOTE], [
        _head(name, summary, settings, log),
        *problems,
        *(of for of in made if of is not None),
    ]


def _head(name: str, summary: dict[str, Any], settings: dict[str, Any], log: Log) -> Html:
    counts = {key: number(summary.get(key)) for key in ("steps", "world_size", "seconds", "peak_memory_mib")}
    known = {
        key: value if key == "seconds" else int(value) for key, value in counts.items() if value is not None
    }
    told = facts({"name": None, "task": summary.get("task") or settings.get("task"), **known})
    if not summary.get("finished"):
        last = max((curve.x[-1] for curve in log.loss.curves.values()), default=None)
        told.append(
            "not finished: no step is logged"
            if last is None
            else f"not finished: the log ends at step {last:,.0f}"
        )
    return tag("header", tag("h1", cut(name)), tag("p", cut(" · ".join(map(str, told))), class_="facts"))


def _models(scores: dict[str, dict[str, float]], summary: dict[str, Any]) -> Html | None:
    models = [name for name in MODELS if name in scores]
    if not models:
        return None
    rows = [
        [title(score), *(shown(score, _whole(score, scores[model].get(score))) for model in models)]
        for score in in_order(score for model in models for score in scores[model])
    ]
    measured = {metric(score) for model in models for score in scores[model]}
    told = [tag("p", note, class_="note") for note in notes(summary, measured, models)]
    return section("Models", grid(["", *models], rows, "scores"), *told, name="models")


def _whole(score: str, value: float | None) -> float | None:
    return int(value) if value is not None and metric(score) == "parameters" else value


def _ingredients(
    settings: dict[str, Any], summary: dict[str, Any], scores: dict[str, dict[str, float]]
) -> Html | None:
    """Return the run's models, terms and data, as far as config.yaml and summary.json give them."""
    if not settings:
        return None
    models = [model for model in ("teacher", "student") if part(settings, model) is not None]
    shapes = [mapping(part(summary, "shapes", model)) for model in models]
    parameters = [_whole("parameters", scores.get(model, {}).get("parameters")) for model in models]
    rows = [
        ["from", *(_origin(settings, model) for model in models)],
        ["type", *(str(shape.get("model_type", "-")) for shape in shapes)],
        ["layers", *(_count(shape.get("depth")) for shape in shapes)],
        ["width", *(_count(shape.get("width")) for shape in shapes)],
        ["heads", *(_count(shape.get("heads")) for shape in shapes)],
        ["vocabulary", *(_count(shape.get("vocabulary")) for shape in shapes)],
        ["parameters", *(shown("parameters", count) for count in parameters)],
        ["ZeRO stage", *(_plain(part(settings, model, "zero_stage")) for model in models)],
    ]
    told = [row for row in rows if set(row[1:]) != {"-"}]
    alone = tag("p", "No teacher: the student learns from the labels or texts alone.", class_="note")
    return section(
        "Models, terms and data",
        grid(["", *models], told, "parts"),
        None if "teacher" in models else alone,
        *_terms(settings),
        *_data(settings, summary),
        name="made-of",
    )


def _count(value: object) -> str:
    found = number(value)
    return "-" if found is None else f"{found:,.0f}"


def _origin(settings: dict[str, Any], model: str) -> str:
    layers = part(settings, model, "from_teacher")
    if isinstance(layers, list):
        return f"layers {', '.join(map(str, layers))} of the teacher"
    for key, told in (("path", "{}"), ("recipe", "recipe {}")):
        if found := part(settings, model, key):
            return told.format(found)
    return "random weights" if model == "student" else "-"


def _terms(settings: dict[str, Any]) -> Iterator[Html]:
    """Yield a table of terms for the run, or for each of its stages."""
    stages = settings.get("stages")
    if not isinstance(stages, list) or not stages:
        yield tag("h3", "Terms")
        yield _term_table(mapping(settings.get("terms")))
        return
    for stage in stages:
        share = part(stage, "share")
        yield tag(
            "h3", f"Terms of stage {part(stage, 'name')}", f", share {share}" if share is not None else ""
        )
        yield _term_table(mapping(part(stage, "terms")))


def _term_table(terms: dict[str, Any]) -> Html:
    rows = []
    for name, term in terms.items():
        if not isinstance(term, dict):
            continue
        others = {
            key: value for key, value in term.items() if key not in ("weight", "layers") and value is not None
        }
        told = ", ".join(f"{key}: {_plain(value)}" for key, value in others.items())
        rows.append([name, _plain(term.get("weight", "-")), _plain(term.get("layers", "-")), told])
    return grid(["term", "weight", "layers", "settings"], rows, "texts")


def _plain(value: object) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _data(settings: dict[str, Any], summary: dict[str, Any]) -> list[Html]:
    of = mapping(settings.get("data"))
    counts = {name: _count(count) for name, count in mapping(summary.get("examples")).items()}
    rows = [
        [key, _plain(of[key])]
        for key in ("source", "subset", "train", "dev", "text", "messages", "label", "max_length")
        if of.get(key) is not None
    ]
    rows += [[f"examples: {name}", count] for name, count in counts.items()]
    return [tag("h3", "Data"), grid(["", ""], rows)] if rows else []


def _curves(
    files: RunFiles, log: Log, scores: dict[str, dict[str, float]], troubles: list[dict[str, Any]]
) -> list[Html]:
    if files.has(os.path.join(BASELINE, METRICS)):
        for measured, chart in Log(files, os.path.join(BASELINE, METRICS)).scores.items():
            for name, curve in chart.curves.items():
                kept = log.scores.setdefault(
                    measured, Chart(f"baseline-{chart.name}", chart.title, sparse=True)
                )
                kept.curves["baseline" if name == "student" else f"{name} (baseline)"] = curve
    _teachers_level(log, scores.get("teacher", {}))
    marks = [
        {key: mark[key] for key in ("x", "kind")} | {"text": f"step {mark['x']:,.0f}: {mark['text'][:NOTE]}"}
        for mark in troubles[:MARKS]
    ]
    marks += [
        {"x": stage.first, "kind": "stage", "text": f"stage {name[:NOTE]}"}
        for name, stage in list(log.stages.items())[1:MARKS]
    ]
    counts = {kind: sum(mark["kind"] == kind for mark in troubles) for kind in ("bad", "spike")}
    told = []
    if troubles:
        told = [
            tag("span", f"{counts['bad']:,} skipped steps (not finite)", class_="bad"), " · ",
            tag("span", f"{counts['spike']:,} jumps of the loss", class_="spike"),
        ]  # fmt: skip
    if len(log.stages) > 1:
        told += [" · " if told else "", "dotted lines: beginning of a stage"]
    note = tag("p", *told, class_="note") if told else None
    return charts_section("Curves", log.charts(), marks, note)


def _teachers_level(log: Log, scores: dict[str, float]) -> None:
    """Draw the teacher's score, which does not change, as a line over all steps of each chart of that score."""
    for measured, chart in log.scores.items():
        steps = [x for curve in chart.curves.values() for x in curve.x]
        for name in in_order(scores):
            if metric(name) == measured:
                called = " ".join(("teacher", name.rpartition("/")[0])).strip()
                for step in sorted({min(steps), max(steps)}):
                    chart.add(called, step, scores[name])


def _stages(log: Log) -> Html | None:
    if not log.stages:
        return None
    columns = in_order(score for stage in log.stages.values() for score in stage.scores)
    columns = [score for score in columns if not metric(score).endswith("per_second")]
    rows = []
    for name, stage in log.stages.items():
        loss = "-" if stage.loss is None else f"{stage.loss:.4g}"
        row = [name, f"{stage.first:,.0f} to {stage.last:,.0f}", loss]
        rows.append([*row, *(shown(score, stage.scores.get(score)) for score in columns)])
    note = None
    if not columns:
        note = tag(
            "p",
            "No dev scores by stage: the run was not evaluated during training (run.evaluate_every).",
            class_="note",
        )
    table = grid(["stage", "logged steps", "last loss", *map(title, columns)], rows, "scores")
    return section("Scores by stage", table, note, name="stages")


def _settings(files: RunFiles, settings: dict[str, Any]) -> Html | None:
    text, differing = files.changed(settings)
    if not text:
        return None
    what = "Settings that differ from the defaults" if differing else "Settings"
    more = tag("p", f"{len(text) - SETTINGS:,} more characters are in {CONFIG}.", class_="note")
    return section(what, tag("pre", text[:SETTINGS]), more if len(text) > SETTINGS else None, name="settings")


def _versions(files: RunFiles, summary: dict[str, Any]) -> Html | None:
    found = mapping(files.checkpoint().get("versions")) | mapping(summary.get("versions"))
    if not found:
        return None
    return section("Versions", grid(["package", "version"], found.items()), name="versions")
