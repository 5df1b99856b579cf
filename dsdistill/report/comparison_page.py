"""Show methods side by side: the table of means and deviations, how far the runs are, and a plot of each sweep."""

import os
from typing import Any
from urllib.parse import quote

from dsdistill.report import mcnemar
from dsdistill.report.claims import legend as how_judged
from dsdistill.report.claims import rows_of, verdicts
from dsdistill.report.differences import differences
from dsdistill.report.differences import legend as how_told
from dsdistill.report.differences import rows as told_by_pairs
from dsdistill.report.figures import charts_section
from dsdistill.report.markup import Html, grid, section, tag
from dsdistill.report.mcnemar import paired
from dsdistill.report.methods import Run, by_cell, cells, legend, plain, scored, sweeps
from dsdistill.report.study import Study, read_study
from dsdistill.report.summary import aligned, title


def content(path: str, runs: dict[str, list[Run]]) -> tuple[str, list[Html]]:
    """Return the title and the parts of a comparison's page.

    runs: from `runs_of`, at least one; unfinished runs are listed but not part of any mean.
    """
    name, study = os.path.basename(os.path.abspath(path)), read_study(path)
    every = [run for of in runs.values() for run in of]
    done = sum(bool(run.summary.get("finished")) for run in every)
    told = f"comparison · {len(runs)} methods · {done} of {len(every)} runs finished"
    about = tag("p", study.title) if study is not None and study.title else None
    parts = [tag("header", tag("h1", name), tag("p", told, class_="facts"), about)]
    rows = scored(by_cell(runs, study))
    if rows:
        columns, lines = cells(rows, study)
        notes = [tag("p", note, class_="note") for note in legend(rows, study)]
        table = grid(["method", "runs", *map(title, columns)], lines, "scores")
        parts.append(section("Methods", table, *notes, name="methods"))
        if study is not None:
            parts += _claimed(study, rows)
        if tests := paired(path, by_cell(runs, study), study):
            head, *lines = mcnemar.rows_of(tests)
            note = tag("p", mcnemar.legend(), class_="note")
            parts.append(section("McNemar's test", grid(head, lines, "scores"), note, name="mcnemar"))
        if found := differences(path, runs):
            head, *pairs = told_by_pairs(found)
            note = tag("p", how_told(), class_="note")
            parts.append(
                section("Differences in recall", grid(head, pairs, "scores"), note, name="differences")
            )
        parts += charts_section("Sweeps", sweeps(runs), [])
    listed = [[_link(path, run), run.state] for run in every]
    return name, [*parts, section("Runs", grid(["run", "state"], listed), name="runs")]


def text(path: str, runs: dict[str, list[Run]], *, table: bool = True) -> str:
    """Return the tables of a comparison for a terminal, "" if no run is finished; table: with the one of methods."""
    study = read_study(path)
    rows, parts = scored(by_cell(runs, study)), []
    if rows and table:
        parts.append("\n".join([plain(rows, study), "", *legend(rows, study)]))
    if rows and study is not None and (judged := verdicts(study, rows)):
        parts.append("\n".join([*aligned(rows_of(judged)), "", how_judged(_seeds(rows))]))
    if tests := paired(path, by_cell(runs, study), study):
        parts.append("\n".join([*aligned(mcnemar.rows_of(tests)), "", mcnemar.legend()]))
    if found := differences(path, runs):
        parts.append("\n".join([*aligned(told_by_pairs(found)), "", how_told()]))
    return "\n\n".join(parts)


def _claimed(study: Study, rows: dict[str, list[dict[str, Any]]]) -> list[Html]:
    """Return the sections on a paper's claims, and on the parts of the paper that were left out."""
    parts = []
    if found := verdicts(study, rows):
        head, *lines = rows_of(found)
        note = tag("p", how_judged(_seeds(rows)), class_="note")
        parts.append(section("Claims", grid(head, lines, "scores"), note, name="claims"))
    if study.left_out:
        parts.append(section("Left out", grid(["name", "reason"], study.left_out.items()), name="left-out"))
    return parts


def _seeds(rows: dict[str, list[dict[str, Any]]]) -> int:
    """Return the largest number of runs of a method."""
    return max(map(len, rows.values()))


def _link(path: str, run: Run) -> Html | str:
    """Return a run's name, as a link to its page if it has one."""
    if not os.path.isfile(os.path.join(path, run.name, "report.html")):
        return run.name
    return tag("a", run.name, href=quote(f"./{run.name}/report.html", errors="replace"))
