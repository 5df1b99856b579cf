"""Set the weight of each mapped layer in its term, from the losses of earlier steps.

If weights were learned by minimising the loss itself, they would grow for the layer that is easiest to match. So these
weights follow rules. They are constants for autograd. All ranks agree, because the rules use the whole step's losses.
"""

from collections.abc import Iterable

import numpy as np


class Uniform:
    """Give every part the same weight."""

    moves = False  # whether the weights change while training

    def __init__(self, parts: int):
        self.values = [1.0] * parts

    def begin(self, steps: int) -> None:
        """Prepare for a stage of this many steps."""

    def update(self, losses: list[float]) -> None:
        """Update the weights after a step, given each part's mean loss."""

    def state(self) -> dict:
        """Return the part of the state that a checkpoint keeps, as plain JSON."""
        return {}

    def load(self, state: dict) -> None:
        """Restore what state() returned."""


class Dynamic(Uniform):
    """Set ω = parts · softmax(ē / ē₀), so that layers that lag behind gain weight.

    ē is the moving average (factor 0.99) of a part's loss, and ē₀ is its value at a reference step, after which the
    weights move: step 100, or a tenth of a shorter stage's steps. The published method gives no formula; this
    reading is the project's own.
    """

    moves = True
    MEMORY, REFERENCE = 0.99, 100

    def __init__(self, parts: int):
        super().__init__(parts)
        self.mean: list[float] = []
        self.reference: list[float] = []
        self.seen, self.wait = 0, self.REFERENCE

    def begin(self, steps: int) -> None:
        self.wait = max(1, min(self.REFERENCE, steps // 10))

    def update(self, losses: list[float]) -> None:
        if not np.isfinite(losses).all():
            return
        old = self.mean or losses
        self.mean = [self.MEMORY * m + (1 - self.MEMORY) * loss for m, loss in zip(old, losses, strict=True)]
        self.seen += 1
        if self.seen == self.wait:
            self.reference = list(self.mean)
        if self.reference:
            relative = [m / max(r, 1e-12) for m, r in zip(self.mean, self.reference, strict=True)]
            powers = np.exp(np.array(relative) - max(relative))
            self.values = (len(powers) * powers / powers.sum()).tolist()

    def state(self) -> dict:
        return {name: getattr(self, name) for name in ("values", "mean", "reference", "seen", "wait")}

    def load(self, state: dict) -> None:
        vars(self).update(state)


class EarthMover(Uniform):
    """Weigh layers by the cheapest flow from student to teacher layers (BERT-EMD, Li et al. 2020, section 3.3).

    The first `before` parts (the embeddings') have weight 1. The other parts are all (student, teacher) pairs, with the
    teacher's layer changing fastest. The pairs' weights are the flow, which sums to 1. Layer masses start equal and
    shift to the layers with low cost. The paper computes the flow per batch; here it follows the losses of the previous
    step, so that it does not depend on how a batch is split over ranks. `shared` masses are the mean of the masses of
    several terms (share_masses), as in the code that the paper names, where attention and hidden states share them.
    """

    moves = True

    def __init__(self, student_depth: int, teacher_depth: int, before: int = 0, shared: bool = False):
        self.shape, self.before, self.shared = (student_depth, teacher_depth), before, shared
        self.masses = [[1 / n] * n for n in self.shape]
        pairs = student_depth * teacher_depth
        self.values = [1.0] * before + [1 / pairs] * pairs

    def update(self, losses: list[float]) -> None:
        if not np.isfinite(losses).all():
            return
        cost = np.array(losses[self.before :]).reshape(self.shape)
        flow = transport(cost, *self.masses)
        self.values = self.values[: self.before] + flow.flatten().tolist()
        self.masses = [
            _cheap_gain(np.array(mass), (flow * cost).sum(axis))
            for mass, axis in zip(self.masses, (1, 0), strict=True)
        ]

    def state(self) -> dict:
        return {"values": self.values, "masses": self.masses}

    def load(self, state: dict) -> None:
        vars(self).update(state)


def share_masses(rules: Iterable[Uniform]) -> None:
    """Set the masses of all rules that share them to their mean. Call this after each `update`."""
    movers = [rule for rule in rules if isinstance(rule, EarthMover) and rule.shared]
    for side in range(2) if movers else ():
        mean = np.mean([mover.masses[side] for mover in movers], axis=0).tolist()
        for mover in movers:
            mover.masses[side] = list(mean)


def transport(cost: np.ndarray, sources: list[float], sinks: list[float]) -> np.ndarray:
    """Return the flow F ≥ 0 of least Σ F∘cost with row sums `sources` and column sums `sinks`; cost is (n, m)."""
    from scipy.optimize import linprog  # slow to import, and only this needs it

    rows, columns = cost.shape
    equal = np.zeros((rows + columns, rows * columns))
    for row in range(rows):
        equal[row, row * columns : (row + 1) * columns] = 1
    for column in range(columns):
        equal[rows + column, column::columns] = 1
    # The last equation follows from the others, because both sides sum to 1. With it the solver may fail by rounding.
    solution = linprog(cost.flatten(), A_eq=equal[:-1], b_eq=[*sources, *sinks][:-1], method="highs")
    return np.clip(solution.x, 0, None).reshape(cost.shape)


def _cheap_gain(mass: np.ndarray, moved: np.ndarray) -> list[float]:
    """Return new masses Σc / c_l, normalised, where c_l = moved_l / w_l is the cost of a unit of layer l's mass w_l."""
    unit = np.maximum(moved / mass, 1e-12)
    gained = unit.sum() / unit
    return (gained / gained.sum()).tolist()
