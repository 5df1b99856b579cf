"""Compute hidden-state alignment on GPUs: one pass over each token's row in CUDA C++ or Triton, and products by cuBLAS.

y = W h + b is computed in chunks of CHUNK_ELEMENTS. With g = ∂L/∂y: dh = g W, dW = Σ g hᵀ, db = Σ g.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsdistill.ops.backends import register_gradients
from dsdistill.ops.common import storage_dtype, zero_masked
from dsdistill.ops.gpu import (
    Tile,
    architecture,
    interpreting,
    launch,
    product,
    product_dtype,
    rows_contiguous,
)
from dsdistill.ops.hidden.native import COSINE

# Elements of y in a chunk: 128 MiB in float32, so that every product fills the GPU.
CHUNK_ELEMENTS = 1 << 25
# Features that a program holds at a time: 16 a thread, which are two 16-byte accesses in half precision.
LONGEST_ROW = 4096


def triton_rows(
    y: Tensor,
    target: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    factor: Tensor,
    divergence: int,
    gradient_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Return each token's weighted value, (T,) float32, and ∂(value · factor)/∂y in `gradient_dtype` (None: none)."""
    from dsdistill.ops.hidden.triton_kernel import rows_kernel

    tokens, width = y.shape
    y, target = rows_contiguous(y), rows_contiguous(target)
    values = torch.empty(tokens, device=y.device)
    gradient = None if gradient_dtype is None else torch.empty(y.shape, dtype=gradient_dtype, device=y.device)
    block = min(LONGEST_ROW, max(128, 1 << (width - 1).bit_length()))
    # A program has one row, or several short ones, so that it has at least 1024 features.
    block_tokens = 32 if architecture(y.device) == "interpreter" else max(1, 1024 // block)
    arguments = {
        "y": y,
        "target": target,
        "bias": factor if bias is None else bias.contiguous(),
        "weights": weights,
        "factor": factor,
        "values": values,
        "gradient": values if gradient is None else gradient,
        "y_n": y.stride(0),
        "t_n": target.stride(0),
        "T": tokens,
        "D": width,
        "BT": block_tokens,
        "BD": block,
        "COSINE": divergence == COSINE,
        "BIASED": bias is not None,
        "WITH_GRADIENT": gradient is not None,
        "UPCAST": interpreting() and y.device.type == "cpu",
    }
    # 8 elements a thread are one 16-byte access in half precision.
    tile = Tile(block_tokens, block, 8 if block >= 4096 else 4, 1)
    launch(rows_kernel, -(-tokens // block_tokens), arguments, tile)
    return values, gradient


def cuda_rows(y, target, bias, weights, factor, divergence, gradient_dtype):
    """Return what `triton_rows` does, computed by csrc/hidden/cuda.cu."""
    y, target = rows_contiguous(y), rows_contiguous(target)
    gradient = None if gradient_dtype is None else torch.empty(y.shape, dtype=gradient_dtype, device=y.device)
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    arguments = (y, target, bias, weights, factor, divergence, gradient)
    if not y.is_cuda:  # the same arithmetic in plain C++, for tests; `backend="cuda"` refuses it
        return torch.ops.dsdistill.hidden_rows(*arguments, 0), gradient
    with torch.cuda.device(y.device):
        stream = torch.cuda.current_stream(y.device).cuda_stream
        return torch.ops.dsdistill.hidden_rows(*arguments, stream), gradient


ROWS = {"triton": triton_rows, "cuda": cuda_rows}


@torch.library.custom_op(
    "dsdistill::hidden_alignment_rows",
    mutates_args=(),
    schema=(
        "(Tensor student, Tensor teacher, Tensor? projection, Tensor? bias, Tensor? mask, Tensor weights, "
        "Tensor coefficient, int divergence, str backend, bool student_gradient, bool projection_gradient, "
        "bool bias_gradient) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def hidden_alignment_rows(
    student, teacher, projection, bias, mask, weights, coefficient, divergence, backend, *wanted
):
    """Return loss · coefficient, and its gradients at student, projection and bias (empty where not asked for).

    weights: (B, N), 0 where masked. coefficient: float32 scalar.
    """
    rows = ROWS[backend]
    weights = weights.to(torch.float32).flatten()
    target = teacher.reshape(-1, teacher.shape[2])
    if projection is None:
        hidden = student.reshape(-1, student.shape[2])
        dtype = storage_dtype(student) if wanted[0] else None
        values, gradient = rows(hidden, target, None, weights, coefficient, divergence, dtype)
        gradients = [None if gradient is None else gradient.view(student.shape), None, None]
        return values.sum() * coefficient, *_returned((student, None, None), gradients)
    # NaN in padding must not pass through the products.
    hidden = zero_masked(student, mask).reshape(-1, student.shape[2])
    value, gradients = _projected(
        rows, hidden, target, projection, bias, weights, coefficient, divergence, wanted
    )
    if gradients[0] is not None:
        gradients[0] = gradients[0].view(student.shape)
    return value * coefficient, *_returned((student, projection, bias), gradients)


def _projected(
    rows, hidden, target, projection, bias, weights, coefficient, divergence: int, wanted: Sequence[bool]
):
    tokens, device = hidden.shape[0], hidden.device
    rounded = product_dtype(hidden, projection)
    matrix = projection if projection.dtype == hidden.dtype else projection.float()
    if projection.dtype != hidden.dtype:
        hidden = hidden.float()
    value = torch.zeros((), device=device)
    d_hidden = torch.empty(hidden.shape, dtype=storage_dtype(hidden), device=device) if wanted[0] else None
    d_projection = torch.zeros(projection.shape, device=device) if wanted[1] else None
    d_bias = torch.zeros(projection.shape[0], device=device) if wanted[2] else None
    step = max(128, CHUNK_ELEMENTS // projection.shape[0])
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        y = product(hidden[part], matrix.t())
        values, gradient = rows(
            y,
            target[part],
            bias,
            weights[part],
            coefficient,
            divergence,
            rounded if any(wanted) else None,
        )
        value += values.sum()
        if d_hidden is not None:
            d_hidden[part] = product(gradient, matrix)
        if d_projection is not None:
            d_projection += product(gradient.t(), hidden[part])
        if d_bias is not None:
            d_bias += gradient.sum(0, dtype=torch.float32)
    return value, [d_hidden, d_projection, d_bias]


def _returned(inputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> list[Tensor]:
    like = inputs[0]
    assert like is not None  # the student is always given
    out = []
    for x, gradient in zip(inputs, gradients, strict=True):
        dtype = storage_dtype(like if x is None else x)
        out.append(like.new_empty(0, dtype=dtype) if gradient is None else gradient.to(dtype))
    return out


@torch.library.register_fake("dsdistill::hidden_alignment_rows")
def _fake(student, teacher, projection, bias, mask, weights, coefficient, divergence, backend, *wanted):
    def gradient(x, want):
        like = student if x is None else x
        return like.new_empty(like.shape if want and x is not None else 0, dtype=storage_dtype(like))

    loss = student.new_empty((), dtype=torch.float32)
    return loss, *(gradient(x, want) for x, want in zip((student, projection, bias), wanted, strict=True))


register_gradients("dsdistill::hidden_alignment_rows", arguments=12, differentiable=(0, 2, 3))
