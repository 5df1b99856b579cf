"""Share code between operators: checks at the public boundary, and gradients kept from the forward pass.

Shape letters: B sequences, H heads, N tokens of a sequence, D features, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

REDUCTIONS = ("mean", "sum")

# A vector shorter than this has no direction: its cosine with anything is 0 and it gets no gradient.
NORM_FLOOR = 1e-12

_NOTHING = contextlib.nullcontext()
_ends_alone = False  # whether `blocks` leaves out the middle blocks

# compute(needs) -> (total, one gradient of the total for each needed input, None for the others)
Compute = Callable[[Sequence[bool]], tuple[Tensor, Sequence[Tensor | None]]]


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return float64 if any input is float64, else float32, so that half-precision inputs are summed in float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_tensor(
    name: str, tensor: Tensor, expected: Mapping[str, int | None], *, like: Tensor | None = None
) -> None:
    """Raise ValueError unless `tensor` is floating, of the expected shape, and on the device of `like`.

    expected: shape letters in order with their sizes; None allows any size.
    """
    wanted = tuple(expected.values())
    # The first comparison is quick, since Python compares tuples in C. Most calls need no other.
    if tensor.shape != wanted and not _fits(tensor.shape, wanted):
        letters = ", ".join(k if v is None else f"{k}={v}" for k, v in expected.items())
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected ({letters})")
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name}: got dtype {tensor.dtype}, expected a floating-point dtype")
    if like is not None:
        check_device(name, tensor, like)


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(
        size is None or size == got for got, size in zip(shape, wanted, strict=True)
    )


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: got device {tensor.device}, expected {like.device} as the student's tensors"
        )


def check_mask(mask: Tensor | None, shape: tuple[int, ...], like: Tensor, name: str = "mask") -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise ValueError(f"{name}: got dtype {mask.dtype}, expected torch.bool (True = valid)")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name}: got shape {tuple(mask.shape)}, expected {tuple(shape)}")
    check_device(name, mask, like)


def check_index(index: Tensor | None, mask: Tensor | None, like: Tensor) -> None:
    """Raise ValueError unless `index` is None, or (K,) int64 on the device of `like` with no `mask` given.

    The values of `index` are not checked, since that would wait for the device.
    """
    if index is None:
        return
    if mask is not None:
        raise ValueError("mask, index: got both, expected one of them")
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"index: got {tuple(index.shape)} {index.dtype}, expected (K,) int64")
    check_device("index", index, like)


def check_rows(rows: tuple[Tensor, Tensor | None], shape: tuple[int, int], like: Tensor) -> None:
    """Raise ValueError unless `rows` holds an index (B, R) int64, and weights of the same shape or None.

    Positions are checked only on a CPU, where this needs no synchronisation, and not while a graph is traced.
    """
    index, weights = rows
    if index.dim() != 2 or len(index) != shape[0] or index.dtype != torch.int64:
        got = f"{tuple(index.shape)} {index.dtype}"
        raise ValueError(f"rows: got an index {got}, expected ({shape[0]}, R) int64")
    check_device("rows", index, like)
    if weights is not None:
        check_tensor("weights of rows", weights, {"B": shape[0], "R": index.shape[1]}, like=like)
    seen = index.device.type == "cpu" and not torch.compiler.is_compiling()
    if seen and index.numel() and int(index.max()) >= shape[1]:
        raise ValueError(f"rows: got position {int(index.max())}, expected at most N − 1 = {shape[1] - 1}")


def valid_rows(index: Tensor, mask: Tensor | None) -> Tensor:
    """Return (B, R) bool, True where an index (B, R) names a token that the mask (B, N) does not hide."""
    named = index >= 0
    return named if mask is None else named & mask.gather(1, index.clamp(min=0))


def weights_of_rows(index: Tensor, weights: Tensor | None, mask: Tensor | None, tokens: int, dtype) -> Tensor:
    """Return each row's weight, (B, R): `weights`, or n_b/R_b if None; 0 if the index is −1 or the token is masked."""
    counts = valid_rows(index, mask)
    if weights is None:
        valid = torch.full_like(index[:, :1], tokens) if mask is None else mask.sum(1, keepdim=True)
        weights = (valid / counts.sum(1, keepdim=True).clamp(min=1).to(dtype)).expand(index.shape)
    return weights.detach().to(dtype).masked_fill(~counts, 0)


def blocks(starts: range) -> Sequence[int]:
    """Return the starts of the blocks that an operator processes: all; inside `ends_alone` the first and last two."""
    if not _ends_alone or len(starts) <= 3:
        return starts
    return [starts[0], starts[-2], starts[-1]]


@contextlib.contextmanager
def ends_alone() -> Iterator[None]:
    """Make operators in PyTorch process only their first block and their last two, for the planner.

    The values are then wrong, but the peak memory is right. The first block allocates what later blocks add to. Each
    block runs with the memory that the one before it left. With causal attention the last blocks are the largest.
    """
    global _ends_alone
    before, _ends_alone = _ends_alone, True
    try:
        yield
    finally:
        _ends_alone = before


def check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, expected a number in [{low}, {high}]")


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context without autocast, which would turn the operators' float32 sums into bfloat16."""
    if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(device.type):
        return _NOTHING  # entering torch.autocast takes 10 µs
    return torch.autocast(device.type, enabled=False)


def row_weights(mask: Tensor | None, weights: Tensor | None, shape: tuple[int, int], dtype, device) -> Tensor:
    """Return each token's weight, (B, N): `weights` (1 for None) where valid, 0 where masked."""
    weights = torch.ones(shape, dtype=dtype, device=device) if weights is None else weights.detach().to(dtype)
    return weights if mask is None else weights.masked_fill(~mask, 0)


def zero_masked(x_BND: Tensor, mask_BN: Tensor | None) -> Tensor:
    """Return `x` with masked tokens set to 0, so that nothing written in padding, NaN included, is ever read."""
    return x_BND if mask_BN is None else x_BND.masked_fill(~mask_BN[..., None], 0)


def unit_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x / ‖x‖ over the last axis and 1/‖x‖ (both 0 below NORM_FLOOR), differentiable without NaN."""
    inverse = inverse_norms(x)[..., None]
    return x * inverse, inverse


def inverse_norms(x: Tensor) -> Tensor:
    """Return 1/‖x‖ over the last axis, which is removed; 0 below NORM_FLOOR."""
    norm = torch.linalg.vector_norm(x, dim=-1)
    has_direction = norm > NORM_FLOOR
    return torch.where(has_direction, 1 / torch.where(has_direction, norm, 1), 0)


def unit_vectors_backward(grad_unit: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Return the gradient at x, given the one at x/‖x‖: its part orthogonal to the unit vector, divided by ‖x‖."""
    return (grad_unit - unit * (grad_unit * unit).sum(-1, keepdim=True)) * inverse


def readable(x: Tensor) -> bool:
    """Return whether values of `x` can be read without waiting for a device or breaking a graph being traced."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def safe_divide(total: Tensor, count: Tensor | int) -> Tensor:
    """Return total / count, or total itself (which is then 0) if count is 0.

    If count is a Python number, this takes one operation instead of five.
    """
    if isinstance(count, int):
        return total / max(count, 1)
    return total / torch.where(count > 0, count, 1).to(total.dtype)


def reduced(rows: Tensor, count: Tensor | int | None) -> Tensor:
    """Return the sum of rows divided by count (None: not divided). Rows that do not count must be 0."""
    if isinstance(count, int) and 0 < count == rows.numel():
        return rows.mean()  # one operation instead of two
    return rows.sum() if count is None else safe_divide(rows.sum(), count)


def storage_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which the gradient of `x` is stored until backward.

    float16 gradients are stored in float32, so that neither 1/count nor a later loss scale leaves the type's range.
    """
    return torch.float32 if x.dtype == torch.float16 else x.dtype


# Elements that `narrowed` copies at a time.
NARROWED_AT_ONCE = 1 << 24


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return contiguous x in a type at most half as wide. The result overwrites x in its own memory.

    This way a V×D gradient in float32 never has a half-precision copy beside it. The result keeps all the memory of x
    until it is freed.
    """
    flat = x.view(-1)
    out = flat.view(dtype)[: flat.numel()]
    for start in range(0, flat.numel(), NARROWED_AT_ONCE):
        # The bytes written end at most half as far as the bytes read, so nothing unread is overwritten.
        piece = flat[start : start + NARROWED_AT_ONCE].to(dtype)
        out[start : start + NARROWED_AT_ONCE] = piece
    return out.view(x.shape)


def with_stored_gradients(
    compute: Compute,
    inputs: Sequence[Tensor | None],
    count: Tensor | int | None,
    wide: Sequence[bool] | None = None,
) -> Tensor:
    """Return total / count (total itself for None), with the gradients that `compute` found in the forward pass.

    The teacher is frozen and the loss is a scalar. So the forward pass can find the gradients up to one factor, which
    backward brings. `compute` is told which gradients are needed and must skip the others.

    wide: marks inputs with very large gradients. These are stored in the type in which they were summed, and backward
    rounds them in their own memory. The other gradients are rounded at once, to save memory. Default: none is marked.
    """
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    if any(needs):
        return _StoredGradients.apply(compute, needs, count, wide or [False] * len(inputs), *inputs)
    with torch.no_grad():
        total, _ = compute(needs)
        return total if count is None else safe_divide(total, count)


def with_native_gradients(operator, arguments: Sequence, inputs: Sequence[Tensor | None]) -> Tensor:
    """Return the loss of a compiled operator that divides by its own count.

    The operator's last arguments say which gradients to return.
    """
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    if torch.compiler.is_compiling():
        return operator(*arguments, *needs)[0]

    def compute(_):
        # No gradient is recorded here: the operator's own autograd would only cost time.
        with torch._C._AutoDispatchBelowAutograd():
            loss, *gradients = operator(*arguments, *needs)
        return loss, [g if need else None for g, need in zip(gradients, needs, strict=True)]

    if not any(needs):
        return compute(needs)[0]
    return _StoredGradients.apply(compute, needs, None, [False] * len(inputs), *inputs)


class _StoredGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute, needs, count, wide, *inputs):
        total, gradients = compute(needs)
        factor: Tensor | float | None = None
        if count is not None:
            number = isinstance(count, int)
            factor = 1 / max(count, 1) if number else safe_divide(torch.ones_like(total), count)
        ctx.gradients = []
        for g, x, stays in zip(gradients, inputs, wide, strict=True):
            if g is not None and factor is not None:
                g.mul_(factor)  # before it is rounded to half precision, so that it is rounded once
            ctx.gradients.append(g if g is None or stays else g.to(storage_dtype(x)))
        ctx.wide = wide
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return total if factor is None else total * factor

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if ctx.gradients is None:
            raise RuntimeError(
                "backward ran a second time through an alignment loss that had handed over its gradients; "
                "pass retain_graph=True to the first backward"
            )
        gradients = ctx.gradients
        if torch._C._autograd._get_current_graph_task_keep_graph():
            scaled = [None if g is None else g * upstream for g in gradients]
        else:
            # Only this node holds these tensors, and they are not asked for again, so they are scaled in place.
            ctx.gradients = None
            scaled = [None if g is None else g.mul_(upstream) for g in gradients]
        out = [
            g if g is None or g.dtype == dtype else narrowed(g, dtype) if stays else g.to(dtype)
            for g, dtype, stays in zip(scaled, ctx.dtypes, ctx.wide, strict=True)
        ]
        return None, None, None, None, *out
