"""Show the results of a run: a table, a picture of its loss, and a page."""

import os
from collections.abc import Sequence
from typing import Any

from dsdistill import disk
from dsdistill.config.errors import UserError
from dsdistill.report.page import write_page
from dsdistill.report.plot import loss_plot, read_log
from dsdistill.report.summary import table

__all__ = ["loss_plot", "read_log", "show", "show_others", "table", "write_page"]


def show(run: str, summary: dict[str, Any]) -> None:
    """Print the table of a run, write its page and, once it has logged a step, draw RUN/loss.png from its log."""
    print(f"\n{table(summary)}")
    log, picture = os.path.join(run, "metrics.jsonl"), os.path.join(run, "loss.png")
    if os.path.exists(log) and any("loss" in record for record in read_log(log)):
        with disk.replacing(picture) as made:
            loss_plot(log, made)
        print(f"\nloss curves: {picture}")
    try:
        print(f"page: {write_page(run)}")
    except UserError as error:  # somebody else's file has its name; the run is done all the same
        print(f"no page: {error}")


def show_others(summary: dict[str, Any], files: Sequence[str]) -> None:
    """Print a table of a run's scores on each of these files."""
    facts: dict[str, Any] = {
        key: summary[key] for key in ("name", "task", "positive_class") if key in summary
    }
    for name in files:
        print(f"\n{table({**facts, 'data': name, 'models': summary['others'][name]})}")
