"""Compute losses over a vocabulary on a GPU: cuBLAS multiplies by the heads, one Triton kernel does the rest.

The kernel replaces the PyTorch passes of `losses.py`, of which there are about 15: it reads a block's logits 2 or 3
times and writes the gradient once. `chunked.py` has the blocks, products and sums around it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dsdistill.ops.gpu import Tile, architecture, interpreting, launch
from dsdistill.ops.soft_label.divergence import FUSED, Formula
from dsdistill.ops.soft_label.head import Head
from dsdistill.ops.soft_label.losses import Labels, Loss, Places, SoftLabels

# Tokens and entries of a program's block, by architecture. Reading logits bounds the kernel, so a program has only one
# token: a block of 256 tokens then has programs for every multiprocessor of a GPU. With 4 entries a thread, each model
# needs one 16-byte load; with 8, some variants spill 8 or 16 bytes (Triton 3.7.1).
TILES = {
    "sm_80": Tile(1, 1024, 8, 1),
    "sm_90": Tile(1, 1024, 8, 1),
    "interpreter": Tile(64, 32, 4, 1),
}


# The rows of a gradient begin at multiples of this many elements, so that products load 16 bytes at once.
ALIGNED = 8


def aligned_rows(tokens: int, entries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an empty (tokens, entries) tensor whose rows begin at multiples of ALIGNED elements."""
    return torch.empty(tokens, -(-entries // ALIGNED) * ALIGNED, dtype=dtype, device=device)[:, :entries]


def fused_block(
    head: Head,
    rows: Tensor,
    places: Places,
    losses: Sequence[Loss],
    weights: Tensor | None,
    totals: Tensor,
    with_gradient: bool,
    out: Tensor | None,
) -> Tensor | None:
    """Add the losses of a block to `totals`; return the gradient at its logits, if asked for.

    losses: Labels, SoftLabels or both in this order. The gradient at the products before bias and soft cap, (tokens,
    V), is written to `out`. If `out` is None, the gradient overwrites logits of its own type, or goes to a new matrix.
    """
    task = next((loss for loss in losses if isinstance(loss, Labels)), None)
    soft = next((loss for loss in losses if isinstance(loss, SoftLabels)), None)
    z = head.products(rows)
    given = {"labels": z if task is None else task.labels[places], "teacher": z}
    if soft is not None:
        given["teacher"] = soft.teacher.products(soft.hidden[places])
    if weights is None:
        weights = torch.ones(2, device=z.device)
    gradient = z if out is None else out
    if out is None and with_gradient and head.gradient_dtype != z.dtype:
        gradient = aligned_rows(len(z), z.shape[1], head.gradient_dtype, z.device)
    values = run(head, z, given, task, soft, weights, gradient if with_gradient else None)
    totals += values.sum(0)[0 if task else 1 : 2 if soft else 1]
    return gradient if with_gradient else None


def run(
    head: Head,
    z: Tensor,
    given: dict[str, Tensor],
    task: Labels | None,
    soft: SoftLabels | None,
    weights: Tensor,
    gradient: Tensor | None,
) -> Tensor:
    """Return the values of task and soft labels, (tokens, 2), and write the gradient of weights · values.

    z: (tokens, V) products of the student's hidden states with its head. given: `labels` of the tokens, and `teacher`,
    the teacher's products.
    """
    from dsdistill.ops.soft_label.triton_vocabulary import vocabulary_kernel

    tile = TILES[architecture(z.device)]
    values = torch.empty(len(z), 2, device=z.device)
    teacher = head if soft is None else soft.teacher
    formula = Formula("forward_kl", 0.5, 0.5, 0.5) if soft is None else soft.formula
    share = formula.beta if formula.divergence == "jsd" else formula.alpha
    arguments = {
        **given,
        "student": z,
        "student_bias": z if head.bias is None else head.bias,
        "teacher_bias": z if teacher.bias is None else teacher.bias,
        "weights": weights,
        "values": values,
        "gradient": z if gradient is None else gradient,
        "s_n": z.stride(0),
        "t_n": given["teacher"].stride(0),
        "g_n": z.stride(0) if gradient is None else gradient.stride(0),
        "T": len(z),
        "V": z.shape[1],
        "C": given["teacher"].shape[1],
        "inverse_temperature": 1.0 if soft is None else 1 / soft.temperature,
        "student_cap": head.softcap or 1.0,
        "teacher_cap": teacher.softcap or 1.0,
        "smoothing": 0.0 if task is None else task.smoothing,
        "share": share,
        "log_share": math.log(share) if share > 0 else -math.inf,
        "log_rest": math.log1p(-share) if share < 1 else -math.inf,
        "BT": tile.rows,
        "BV": tile.columns,
        "DIVERGENCE": FUSED.index(formula.divergence),
        "TASK": task is not None,
        "SOFT": soft is not None,
        "SMOOTHED": task is not None and task.smoothing > 0,
        "BIASED_S": head.bias is not None,
        "BIASED_T": soft is not None and teacher.bias is not None,
        "CAPPED_S": head.softcap is not None,
        "CAPPED_T": soft is not None and teacher.softcap is not None,
        "WITH_GRADIENT": gradient is not None,
        "UPCAST": interpreting() and z.device.type == "cpu",
    }
    if len(z):
        wanted = {name: arguments[name] for name in vocabulary_kernel.arg_names}
        launch(vocabulary_kernel, -(-len(z) // tile.rows), wanted, tile)
    return values
