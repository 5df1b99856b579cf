"""Map vectors from the student's width to the teacher's."""

from typing import Any

from torch import Tensor, nn

from dsdistill.ops import hidden_alignment


class Projection(nn.Linear):
    """Map vectors (…, D_s) to (…, D_t) linearly, without a bias; the weight has Xavier initialisation."""

    def __init__(self, student_width: int, teacher_width: int):
        super().__init__(student_width, teacher_width, bias=False)
        nn.init.xavier_uniform_(self.weight)

    def forward(self, student: Tensor) -> Tensor:
        return super().forward(student.to(self.weight.dtype)).to(student.dtype)


class Projector(Projection):
    """Project one layer's hidden states and compare them with the teacher's.

    It calls the alignment operator inside its own forward for two reasons: under ZeRO-3 its weight is whole only there,
    and the operator then never needs to hold all projected states.
    """

    # A linear map takes one tensor; this module compares two, so that its weight is used inside its own forward.
    def forward(  # type: ignore[override]
        self, student: Tensor, teacher: Tensor, centre: bool = False, **options: Any
    ) -> Tensor:
        """Return hidden_alignment of (B, N, D_s) with (B, N, D_t) through this projection.

        centre: subtract from each projected state the mean of its D_t values.
        """
        weight = self.weight - self.weight.mean(0) if centre else self.weight
        return hidden_alignment(student, teacher, projection=weight, **options)
