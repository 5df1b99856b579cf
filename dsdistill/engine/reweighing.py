"""Draw more from the domains in which the student is furthest behind its teacher (DDK, Liu et al. 2024).

A domain is a source of the train set, and a dev set of the same name tells how well both models know it. With ℓ the
perplexities on it, the shares of the N domains are at first r_i ∝ exp(ℓ_S,i / ℓ_T,i) (equation 1), and after each
evaluation, which ends an interval, r_i ← α ψ_i / Σψ + (1 − α) / N with ψ_i = r_i exp(ℓ_S,i / ℓ_T,i) and α = 0.5
(equation 2). The paper draws an interval's examples in advance; here each draw uses the shares of its interval.
"""

import json
import os
from collections.abc import Callable, Sequence

import numpy as np

from dsdistill import disk
from dsdistill.data import Ahead
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.prepare import Prepared
from dsdistill.engine.run_folder import SHARES, RunFolder

SMOOTHING = 0.5  # α
Scores = dict[str, dict[str, float]]  # by model, then by NAME/SCORE


def next_shares(
    before: Sequence[float] | None, student: Sequence[float], teacher: Sequence[float]
) -> list[float]:
    """Return the shares of the domains in the next interval, which add up to 1.

    before: the shares of the last interval; None if there was none. student, teacher: their perplexities by domain.
    """
    ratios = np.array(student) / np.array(teacher)
    powers = np.exp(ratios - ratios.max()) * (1.0 if before is None else np.array(before))
    shares = powers / powers.sum()
    if before is not None:
        shares = SMOOTHING * shares + (1 - SMOOTHING) / len(shares)
    return shares.tolist()


class Reweighing:
    """A Reweighing changes the shares of a mixture's sources at each evaluation; RUN keeps them for every resume."""

    def __init__(self, prepared: Prepared, ahead: Ahead, folder: RunFolder, ranks: Ranks, step: int):
        """Continue from the shares that RUN holds up to `step`."""
        self.names, self.ahead, self.ranks = prepared.data.train.names, ahead, ranks
        self.path, self.known = folder / SHARES, []
        if ranks.gather(os.path.isfile(self.path))[0]:
            with open(self.path, encoding="utf-8") as file:
                self.known = [pair for pair in json.load(file) if pair[0] <= step]
        for begins, shares in self.known:
            ahead.reweigh(begins, shares)

    def __call__(self, step: int, scores: Scores) -> Scores:
        """Set the shares from this step on, and return the scores unchanged."""
        ours, theirs = (
            [scores[of][f"{name}/perplexity"] for name in self.names] for of in ("student", "teacher")
        )
        shares = next_shares(self.known[-1][1] if self.known else None, ours, theirs)
        self.known.append([step, shares])
        self.ahead.reweigh(step, shares)
        with self.ranks.first_alone():
            if self.ranks.first:
                disk.save_json(self.path, self.known)
        return scores


def begin(
    prepared: Prepared,
    ahead: Ahead,
    folder: RunFolder,
    ranks: Ranks,
    step: int,
    evaluate: Callable[[], Scores],
) -> Callable[[int, Scores], Scores]:
    """Return a function to call with each evaluation's step and scores; only with sampler ddk it changes shares."""
    if prepared.config.data.sampler != "ddk":
        return lambda _, scores: scores
    made = Reweighing(prepared, ahead, folder, ranks, step)
    if not made.known:
        made(step, evaluate())
    return made
