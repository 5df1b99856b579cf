"""Show methods side by side: the table of means and deviations, how far the runs are, and a plot of each sweep."""

import os
from urllib.parse import quote

from dsdistill.report.differences import differences
from dsdistill.report.differences import legend as how_told
from dsdistill.report.differences import rows as told_by_pairs
from dsdistill.report.figures import charts_section
from dsdistill.report.markup import Html, grid, section, tag
from dsdistill.report.methods import Run, cells, legend, plain, scored, sweeps
from dsdistill.report.summary import aligned, title


def content(path: str, runs: dict[str, list[Run]]) -> tuple[str, list[Html]]:
    """Return the title and the parts of a comparison's page.

    runs: from `runs_of`, at least one; unfinished runs are listed but not part of any mean.
    """
    name = os.path.basename(os.path.abspath(path))
    every = [run for of in runs.values() for run in of]
    done = sum(bool(run.summary.get("finished")) for run in every)
    told = f"comparison · {len(runs)} methods · {done} of {len(every)} runs finished"
    parts = [tag("header", tag("h1", name), tag("p", told, class_="facts"))]
    rows = scored(runs)
    if rows:
        columns, lines = cells(rows)
        notes = [tag("p", note, class_="note") for note in legend(rows)]
        table = grid(["method", "runs", *map(title, columns)], lines, "scores")
        parts.append(section("Methods", table, *notes, name="methods"))
        if found := differences(path, runs):
            head, *pairs = told_by_pairs(found)
            note = tag("p", how_told(), class_="note")
            parts.append(section("Differences", grid(head, pairs, "scores"), note, name="differences"))
        parts += charts_section("Sweeps", sweeps(runs), [])
    listed = [[_link(path, run), run.state] for run in every]
    return name, [*parts, section("Runs", grid(["run", "state"], listed), name="runs")]


def text(path: str, runs: dict[str, list[Run]], *, table: bool = True) -> str:
    """Return the tables of a comparison for a terminal, "" if no run is finished; table: with that of the methods."""
    rows, parts = scored(runs), []
    if rows and table:
        parts.append("\n".join([plain(rows), "", *legend(rows)]))
    if found := differences(path, runs):
        parts.append("\n".join([*aligned(told_by_pairs(found)), "", how_told()]))
    return "\n\n".join(parts)


def _link(path: str, run: Run) -> Html | str:
    """Return a run's name, as a link to its page if it has one."""
    if not os.path.isfile(os.path.join(path, run.name, "report.html")):
        return run.name
    return tag("a", run.name, href=quote(f"./{run.name}/report.html", errors="replace"))
