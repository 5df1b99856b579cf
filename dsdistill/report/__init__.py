"""What a run came to: a table, and a picture of its loss."""

import os
from typing import Any

from dsdistill.report.plot import loss_plot, read_log
from dsdistill.report.summary import table

__all__ = ["loss_plot", "read_log", "show", "table"]


def show(run: str, summary: dict[str, Any]) -> None:
    """Print the table of a run and draw RUN/loss.png from its log."""
    picture = os.path.join(run, "loss.png")
    loss_plot(os.path.join(run, "metrics.jsonl"), picture)
    print(f"\n{table(summary)}\n\nloss curves: {picture}")
