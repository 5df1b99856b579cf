"""Watch losses and gradients of a run: stop it when they are no longer finite, and note when losses jump."""

import json
import logging
import math
import os

from dsdistill import disk
from dsdistill.config import SharedError
from dsdistill.data import Batch
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.run_folder import BAD, SPIKES

log = logging.getLogger("dsdistill")

SPIKE = 4.0  # times the moving average
MEMORY, SEEN = 0.98, 50  # decay of that average, and the steps before it is trusted


class Guard:
    """A Guard ends the run when `limit` steps in a row have a loss or gradient that is not finite."""

    def __init__(self, limit: int, run_dir: str, ranks: Ranks):
        self.limit, self.run_dir, self.ranks = limit, run_dir, ranks
        self.bad, self.mean, self.seen = 0, 0.0, 0

    def finite(
        self, step: int, report: dict[str, dict], batches: list[Batch], last: bool, gradient: bool = True
    ) -> bool:
        """Return whether the step's loss and gradient are finite. All ranks agree.

        report: Objective.report of the whole step. batches: this rank's. last: no step follows in which the loss could
        recover. gradient: whether the gradient is finite; all ranks agree. Raises SharedError at the limit, and in a
        last step that is not finite.
        """
        terms = {name: term["raw"] for name, term in report.items()}
        if gradient and all(map(math.isfinite, terms.values())):
            self.bad = 0
            self._watch(step, sum(term["weighted"] for term in report.values()))
            return True
        self.bad += 1
        ids = [
            name
            for of_rank in self.ranks.gather([i for b in batches for i in b.ids if i])
            for name in of_rank
        ]
        broken = [name for name, value in terms.items() if not math.isfinite(value)] or ["the gradient alone"]
        shown = {name: value if math.isfinite(value) else str(value) for name, value in terms.items()}
        self._note(BAD, {"step": step, "in": broken, "terms": shown, "examples": ids})
        if self.bad == self.limit or last:
            raise SharedError(
                f"step {step}: {self.bad} step(s) in a row with values that are not finite, in {', '.join(broken)}: "
                f"{terms}; "
                f"{os.path.join(self.run_dir, BAD)} lists the examples"
            )
        log.warning("step %d has values that are not finite, in %s; it is skipped", step, ", ".join(broken))
        return False

    def _watch(self, step: int, loss: float) -> None:
        if self.seen >= SEEN and loss > SPIKE * self.mean > 0:
            log.warning(
                "step %d: the loss is %.4g, %.1f times its recent average", step, loss, loss / self.mean
            )
            self._note(SPIKES, {"step": step, "loss": loss, "average": self.mean})
        self.mean = loss if self.seen == 0 else MEMORY * self.mean + (1 - MEMORY) * loss
        self.seen += 1

    def _note(self, name: str, record: dict) -> None:
        """Append one line to a file of the run folder.

        BAD holds terms and examples of each step that is not finite, SPIKES the steps whose loss jumped.
        """
        if self.ranks.first:
            path = os.path.join(self.run_dir, name)
            try:
                disk.append(path, json.dumps(record) + "\n")
            except OSError as error:  # only the note is lost
                log.warning("%s cannot be written: %s", path, disk.reason(error))
