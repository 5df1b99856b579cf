"""Run pairwise alignment by Triton: relation tiles in panels of rows, and the gradient as a product with each panel.

The panel of coefficients holds at most PANEL_ELEMENTS for any N. Nothing is added atomically.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsdistill.ops.backends import register_gradients
from dsdistill.ops.common import storage_dtype, unit_vectors, unit_vectors_backward, zero_masked
from dsdistill.ops.gpu import (
    Tile,
    architecture,
    block_width,
    interpreting,
    launch,
    product,
    product_dtype,
    rows_contiguous,
)
from dsdistill.ops.pairwise.chunked import centred
from dsdistill.ops.pairwise.native import RELATION_CODES

PANEL_ELEMENTS = 1 << 22
MEANS, LOSS, COEFFICIENTS, BOTH = range(4)  # stages of the kernel

# Features of one step of a product, and the tile, by architecture and whether the inputs are half precision.
TILES = {
    # float32 products run on plain cores, or in TF32 in three parts: operands and results are both in registers.
    ("sm_80", False): (32, Tile(64, 32, 8, 2)),
    ("sm_90", False): (32, Tile(64, 32, 8, 2)),
    # Two accumulators of 128 × 64 over 8 warps leave registers for the epilogue; three loads in flight.
    ("sm_80", True): (32, Tile(128, 64, 8, 3)),
    ("sm_90", True): (64, Tile(128, 64, 8, 3)),
    ("interpreter", False): (32, Tile(32, 64, 4, 1)),
    ("interpreter", True): (32, Tile(32, 64, 4, 1)),
}


def run(student, teacher, mask, weights, coefficient, relation, gradient):
    """Return loss · coefficient, and its gradient at the student (empty if not asked for).

    weights: (B, N), 0 where masked. coefficient: float32 scalar.
    """
    call = _Call(student, teacher, mask, weights, relation)
    d_student: Tensor | None
    if student.numel() == 0 or student.shape[1] == 0:
        loss, d_student = coefficient.new_zeros(()), torch.zeros_like(student, dtype=torch.float32)
    elif relation == RELATION_CODES["distance"]:
        loss, d_student = call.distance(gradient)
    else:
        loss, d_student = call.gram(gradient)
    if d_student is None or not gradient:
        return loss * coefficient, student.new_empty(0, dtype=storage_dtype(student))
    return loss * coefficient, d_student.mul_(coefficient).to(storage_dtype(student))


torch.library.custom_op(
    "dsdistill::pairwise_alignment_triton",
    run,
    mutates_args=(),
    schema=(
        "(Tensor student, Tensor teacher, Tensor? mask, Tensor weights, Tensor coefficient, int relation, "
        "bool gradient) -> (Tensor, Tensor)"
    ),
)


@torch.library.register_fake("dsdistill::pairwise_alignment_triton")
def _fake(student, teacher, mask, weights, coefficient, relation, gradient):
    return (
        student.new_empty((), dtype=torch.float32),
        student.new_empty(student.shape if gradient else 0, dtype=storage_dtype(student)),
    )


register_gradients("dsdistill::pairwise_alignment_triton", arguments=7, differentiable=(0,))
operator = torch.ops.dsdistill.pairwise_alignment_triton


class _Call:
    def __init__(self, student, teacher, mask, weights, relation):
        self.student = rows_contiguous(zero_masked(student, mask))
        self.teacher = rows_contiguous(zero_masked(teacher, mask))
        compared = self.student, self.teacher
        if relation == RELATION_CODES["distance"]:
            compared = centred(self.student.float(), mask), centred(self.teacher.float(), mask)
            if (
                student.dtype == torch.float32
            ):  # half precision holds the model's values exactly, but not the centred ones
                self.student = compared[0]
        self.batch, self.tokens, self.width = student.shape
        self.relation = relation
        sizes = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) for x in compared]
        if relation == RELATION_CODES["cosine"]:
            sizes = [unit_vectors(size[..., None])[1][..., 0] for size in sizes]
        elif relation == RELATION_CODES["distance"]:
            sizes = [size.square() for size in sizes]
        half = all(x.dtype != torch.float32 for x in compared)
        arch = architecture(student.device)
        depth, self.tile = TILES[arch, half]
        weights = weights.to(torch.float32).contiguous()
        self.given = {
            "student": compared[0],
            "teacher": compared[1],
            "valid": weights if mask is None else mask.to(torch.int8).contiguous(),
            "weights": weights,
            "sizes_s": sizes[0],
            "sizes_t": sizes[1],
            "means": weights,
            "coefficients": weights,
            "s_b": compared[0].stride(0),
            "s_n": compared[0].stride(1),
            "t_b": compared[1].stride(0),
            "t_n": compared[1].stride(1),
            "N": self.tokens,
            "DS": self.width,
            "DT": teacher.shape[2],
            "BR": self.tile.rows,
            "BC": self.tile.columns,
            "BK": min(depth, block_width(max(self.width, teacher.shape[2]))),
            "RELATION": relation,
            "MASKED": mask is not None,
            "UPCAST": interpreting() and student.device.type == "cpu",
        }
        self.sizes = sizes

    def panels(self):
        """Yield the first row and the number of rows of each panel. All panels but the last have the same number."""
        rows = max(
            self.tile.rows, PANEL_ELEMENTS // (self.batch * self.tokens) // self.tile.rows * self.tile.rows
        )
        for first in range(0, self.tokens, rows):
            yield first, min(rows, self.tokens - first)

    def run(self, first: int, rows: int, stage: int, **more) -> Tensor:
        """Return (B, 4) sums over the tiles of the panel."""
        from dsdistill.ops.pairwise.triton_kernel import relation_kernel

        blocks = -(-rows // self.tile.rows) * -(-self.tokens // self.tile.columns)
        partial = torch.zeros(self.batch, blocks, 4, device=self.student.device)
        given = (
            self.given | more | {"first_row": first, "panel_rows": rows, "partial": partial, "STAGE": stage}
        )
        wanted = {name: given[name] for name in relation_kernel.arg_names}
        launch(relation_kernel, self.batch * blocks, wanted, self.tile)
        return partial.sum(1)

    def over_rows(self, stage: int, **more) -> Tensor:
        """Return (B, 4) sums over all tiles. Nothing is stored, so one panel holds all rows."""
        return self.run(0, self.tokens, stage, **more)

    def panel(self, rows: int) -> Tensor:
        dtype = product_dtype(self.student)
        return torch.empty(self.batch, rows, self.tokens, dtype=dtype, device=self.student.device)

    def gram(self, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        if not with_gradient:
            return self.over_rows(LOSS)[:, 0].sum(), None
        loss = self.student.new_zeros((), dtype=torch.float32)
        gradient = torch.empty(self.student.shape, device=self.student.device)
        for first, rows in self.panels():
            coefficients = self.panel(rows)
            loss += self.run(first, rows, BOTH, coefficients=coefficients)[:, 0].sum()
            gradient[:, first : first + rows] = product(coefficients, self.student)
        gradient.mul_(4)
        if self.relation == RELATION_CODES["cosine"]:
            inverse = self.sizes[0][..., None]
            gradient = unit_vectors_backward(gradient, self.student * inverse, inverse)
        return loss, gradient

    def distance(self, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        sums = self.over_rows(MEANS)
        positive = sums[:, 2:].clamp(min=1)
        # μ = 1 where no distance is positive.
        inverse = torch.where(sums[:, 2:] > 0, positive / torch.where(sums[:, :2] > 0, sums[:, :2], 1), 1)
        means = torch.cat([inverse, inverse[:, :1]], 1)
        sums = self.over_rows(LOSS, means=means)
        if not with_gradient:
            return sums[:, 0].sum(), None
        means[:, 2] = sums[:, 1] * inverse[:, 0].square() / positive[:, 0]
        gradient = torch.empty(self.student.shape, device=self.student.device)
        for first, rows in self.panels():
            coefficients = self.panel(rows)
            self.run(first, rows, COEFFICIENTS, means=means, coefficients=coefficients)
            # The rounded values are summed, so that Σ_j c_ij (x_i − x_j) stays small where all x_j are alike.
            own = coefficients.sum(-1, keepdim=True, dtype=torch.float32)
            block = slice(first, first + rows)
            gradient[:, block] = own * self.student[:, block] - product(coefficients, self.student)
        return sums[:, 0].sum(), gradient.mul_(2)
