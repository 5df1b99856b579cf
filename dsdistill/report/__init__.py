"""Show the results of a run: a table, a plot of its loss, and a page."""

import os
from collections.abc import Sequence
from typing import Any

from dsdistill import disk
from dsdistill.config.errors import UserError
from dsdistill.report import comparison_page
from dsdistill.report.methods import is_run, runs_of
from dsdistill.report.page import write_page
from dsdistill.report.plot import loss_plot, read_log
from dsdistill.report.summary import table

__all__ = [
    "loss_plot",
    "read_log",
    "show",
    "show_comparison",
    "show_others",
    "show_page",
    "table",
    "write_page",
]


def show(run: str, summary: dict[str, Any]) -> None:
    """Print the table of a run, write its page and, once it has logged a step, draw RUN/loss.png from its log."""
    print(f"\n{table(summary)}")
    log, picture = os.path.join(run, "metrics.jsonl"), os.path.join(run, "loss.png")
    if os.path.exists(log) and any("loss" in record for record in read_log(log)):
        with disk.replacing(picture) as made:
            loss_plot(log, made)
        print(f"\nloss curves: {picture}")
    show_page(run)


def show_page(path: str) -> None:
    """Write the page of a run or a comparison and print its path; print the reason if it cannot be written."""
    try:
        print(f"page: {write_page(path)}")
    except UserError as error:  # such as another program's file of its name; the run itself has succeeded
        print(f"no page: {error}")


def show_comparison(path: str, *, table: bool = True) -> None:
    """Print the results of a comparison if the folder is one; table: print the table of methods too."""
    if not is_run(path) and (told := comparison_page.text(path, runs_of(path), table=table)):
        print(f"{told}\n")


def show_others(summary: dict[str, Any], files: Sequence[str]) -> None:
    """Print a table of a run's scores on each of these files."""
    facts: dict[str, Any] = {
        key: summary[key] for key in ("name", "task", "positive_class") if key in summary
    }
    for name in files:
        print(f"\n{table({**facts, 'data': name, 'models': summary['others'][name]})}")
