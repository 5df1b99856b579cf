"""Keep the student's last layer near its state at the end of the stage before."""

from dsdistill.alignment.terms.base import AlignmentTerm, Pair
from dsdistill.config.terms import Smooth


class SmoothTerm(AlignmentTerm):
    """Compute the mean over valid tokens of ‖H − H_before‖₂ / √D on the same batch.

    H_before comes from the student as the stage before left it, frozen and without dropout. The published method
    names the loss ‖H^k − H^(k−1)‖; layer, mean and scale are the project's own reading. H is read after the final norm,
    or with `final_norm: before` as the layer outputs it.
    """

    name = "smooth"
    needs_teacher = False
    needs_previous = True

    def __init__(self, config: Smooth, pair: Pair):
        super().__init__(config, pair)
        self.student_hidden = frozenset([pair.student.depth])

    def counts(self, batch, geometry):
        return batch.mask.sum().double()[None]

    def sums(self, student, teacher, batch):
        now = self.state(student, self.pair.student.depth).float()
        before = self.state(student.previous, self.pair.student.depth).float()
        moved = (now - before)[batch.mask].square().mean(-1)
        # The square root has an infinite slope where nothing has moved, as at a stage's first step. The clamp makes
        # loss and slope 0 there.
        return moved.clamp_min(1e-12).sqrt().sub(1e-6).sum()[None]
