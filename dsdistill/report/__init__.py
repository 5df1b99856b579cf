"""What a run came to: a table, and a picture of its loss."""

import os
from collections.abc import Sequence
from typing import Any

from dsdistill import disk
from dsdistill.report.plot import loss_plot, read_log
from dsdistill.report.summary import table

__all__ = ["loss_plot", "read_log", "show", "show_others", "table"]


def show(run: str, summary: dict[str, Any]) -> None:
    """Print the table of a run and, once it has logged a step, draw RUN/loss.png from its log."""
    print(f"\n{table(summary)}")
    log, picture = os.path.join(run, "metrics.jsonl"), os.path.join(run, "loss.png")
    if os.path.exists(log) and any("loss" in record for record in read_log(log)):
        with disk.replacing(picture) as made:
            loss_plot(log, made)
        print(f"\nloss curves: {picture}")


def show_others(summary: dict[str, Any], files: Sequence[str]) -> None:
    """Print a table of a run's scores on each of these files."""
    facts = {key: summary[key] for key in ("name", "task", "positive_class") if key in summary}
    for name in files:
        print(f"\n{table({**facts, 'data': name, 'models': summary['others'][name]})}")
