"""Multiply blocks of tokens by a model's output layer, and choose the size of a block."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dsdistill.ops.gpu import product, product_dtype

# Elements of one block of logits: 32 MiB in float32, so that a product takes far longer than the call to it.
BLOCK_ELEMENTS = 1 << 23
MAX_TOKENS, MIN_TOKENS = 512, 64
# Bytes of the logits of all models in a block on a GPU. With the memory of a slice and a head's gradient in float32, a
# student 3584 wide with 152,000 entries then takes less than V·D·4 bytes + 0.6 GiB
# (tests/planner/test_vocabulary_memory.py).
GPU_BYTES = 320 << 20
GPU_MAX_TOKENS = 2048
# Bytes of a panel: the gradients at the logits of several blocks, in bfloat16, which one product reads together. The
# fused kernel needs no slices, which leaves room for a panel. A head's gradient in float32 is read and written once for
# each panel.
PANEL_BYTES = 224 << 20
# Elements of a slice, which is the part of a block that all passes between the products treat at a time. On a CPU it is
# 1 MiB in float32, so that it stays in cache; on a GPU 16 MiB, so that a block needs few calls and little more memory.
SLICE_ELEMENTS, GPU_SLICE_ELEMENTS = 1 << 18, 1 << 22
# Elements of a panel of the head on a CPU. A product with all of a large matrix's rows takes 1.6 times as long as one
# with panels of 1 MiB (MKL on an AMD EPYC, V = 30522, D = 768: 628 against 345 ms for 512 tokens).
PANEL_ELEMENTS = 1 << 18


class Head:
    """Hold the (V, D) matrix, (V,) bias and soft cap of an output layer, in the type in which it is multiplied.

    gradient_dtype: type in which a gradient at the logits is multiplied; bfloat16 for a head in bfloat16. float16 would
    lose small gradients: with 152,000 entries most probabilities lie below its smallest normal number.
    """

    def __init__(
        self,
        matrix: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        softcap: float | None = None,
        fused: bool = False,
    ):
        # Triton's interpreter on a CPU takes the same path as a GPU.
        self.on_gpu = matrix.is_cuda or fused
        # On a GPU half precision is multiplied without a cast and summed in float32; elsewhere the matrix is cast once.
        self.native = (
            self.on_gpu and matrix.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32
        )
        self.matrix = matrix.detach() if self.native else matrix.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.dtype = dtype
        self.gradient_dtype = product_dtype(self.matrix) if self.native else dtype
        self.softcap = softcap

    def operand(self, x: Tensor) -> Tensor:
        """Return x in the type in which the head multiplies."""
        return x.to(self.matrix.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (tokens, V), soft-capped, of hidden states (tokens, D)."""
        z = self.products(hidden)
        z = z if self.bias is None else z.add_(self.bias)
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

    def products(self, hidden: Tensor) -> Tensor:
        """Return (tokens, V) products of (tokens, D) with the rows of the matrix, before bias and soft cap."""
        hidden = self.operand(hidden)
        if self.on_gpu:
            return self._product(hidden, self.matrix.t())
        vocabulary, width = self.matrix.shape
        z = hidden.new_empty(len(hidden), vocabulary)
        size = max(64, PANEL_ELEMENTS // max(1, width))
        for panel, part in zip(self.matrix.split(size), z.split(size, 1), strict=True):
            torch.mm(hidden, panel.t(), out=part)
        return z

    def below_cap(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Return the gradient before the soft cap, given the one at the logits, which may be overwritten.

        With y = c tanh(z / c), ∂y/∂z = 1 − (y / c)².
        """
        return gradient if self.softcap is None else gradient.mul_(1 - (logits / self.softcap).square_())

    def at_hidden(self, gradient: Tensor) -> Tensor:
        """Return the gradient at hidden states, (tokens, D), given the one at their products, (tokens, V)."""
        gradient = gradient.to(self.gradient_dtype)
        if self.gradient_dtype == self.matrix.dtype:
            return self._product(gradient, self.matrix)
        total = gradient.new_zeros(len(gradient), self.matrix.shape[1])
        size = self._rows_of_a_panel()  # a float16 matrix is cast panel by panel, never whole
        for part, panel in zip(gradient.split(size, 1), self.matrix.split(size), strict=True):
            total.addmm_(part, panel.to(self.gradient_dtype))
        return total

    def add_at_matrix(self, total: Tensor | None, gradient: Tensor, hidden: Tensor) -> Tensor:
        """Return `total` (None: 0) plus Σ over tokens of gradient · hidden, (V, D), in the accumulating dtype.

        gradient: (tokens, V). hidden: (tokens, D). The sum is added to `total` in place.
        """
        left, right = gradient.to(self.gradient_dtype).t(), hidden.to(self.gradient_dtype)
        if total is None:
            return self._product(left, right)
        if self.gradient_dtype == self.dtype:
            return total.addmm_(left, right)
        if _adds_half(total.device, left.dtype):
            return torch.addmm(total, left, right, out_dtype=self.dtype, out=total)
        size = self._rows_of_a_panel()  # so that no second matrix of this size is made
        for rows, part in zip(left.split(size), total.split(size), strict=True):
            part.add_(product(rows, right))
        return total

    def _rows_of_a_panel(self) -> int:
        return max(1, GPU_SLICE_ELEMENTS // self.matrix.shape[1])

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        return product(left, right) if self.native else left @ right


def block_tokens(on_gpu: bool, vocabulary: int, others: int = 0) -> int:
    """Return how many tokens a block has.

    vocabulary: entries of the student's head. others: entries of further heads whose logits exist at the same time.
    """
    if not on_gpu:
        return max(MIN_TOKENS, min(MAX_TOKENS, BLOCK_ELEMENTS // max(1, vocabulary)))
    size = max(MIN_TOKENS, min(GPU_MAX_TOKENS, GPU_BYTES // (4 * max(1, vocabulary + others))))
    return size - size % MIN_TOKENS


def panel_tokens(size: int, vocabulary: int) -> int:
    """Return how many tokens a panel of gradients in bfloat16 has: those of a whole number of blocks, at least one."""
    return max(1, PANEL_BYTES // (2 * max(1, vocabulary)) // size) * size


def slice_tokens(on_gpu: bool, vocabulary: int) -> int:
    """Return how many tokens a slice of a block has."""
    return max(1, (GPU_SLICE_ELEMENTS if on_gpu else SLICE_ELEMENTS) // vocabulary)


@functools.cache
def _adds_half(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch can add a product of half-precision matrices to one in float32 here.

    On CUDA `addmm` takes `out_dtype`, but in its first versions the added matrix must be in half precision, too. The
    check waits for the device once in a process.
    """
    total, half = torch.ones(16, 16, device=device), torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(total, half, half, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())
