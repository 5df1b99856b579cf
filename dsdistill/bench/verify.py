"""Check the operators by one rule for errors, and by properties that hold for every operator and backend.

The truth is the reference in float64, on the inputs as rounded to the dtype under test. The error of a result may be
at most twice that of the reference in the dtype under test, plus a few units of that dtype scaled by the RMS of the
truth (or by both models' own sizes if the value is a difference that cancels).

Each check raises `Mismatch` with figures; tests/ops runs them one by one, `run_verify` all of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dsdistill import disk
from dsdistill.bench.arguments import check_instruction_set
from dsdistill.bench.cases import FUNCTIONS, STUDENT, TOKEN_AXIS, Case, all_cases
from dsdistill.ops import available_backends
from dsdistill.ops.backends import extension
from dsdistill.ops.gpu import interpreting
from dsdistill.ops.soft_label.divergence import FUSED

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Units in the last place, relative to the RMS of the truth. Half precision: gradients are rounded once at the end;
# bfloat16 products of the native attention kernel round dS as well. float32: 130 is the largest error seen, in
# Triton's interpreter on an AMD EPYC of 2026, where numpy adds in another order than on earlier machines.
SLACK_ULPS = {torch.float64: 4096, torch.float32: 160, torch.bfloat16: 3, torch.float16: 2}


class Mismatch(AssertionError):
    """An operator's result is further from the truth than the rule allows."""


# Triton's interpreter takes a second where a GPU takes a millisecond. With the interpreter only these cases get all
# checks in bfloat16, and parity in float16. Parity in float32 is checked on more cases.
INTERPRETED = {
    "kl-packed",
    "mse-grouped-ragged",
    "kl-mean-heads-masked",
    "kl-rows-packed",
    "cosine-odd-ragged",
    "distance-odd-ragged",
    "mse-bias",
    "cosine-weighted",
    "forward_kl-warm",
    "jsd-capped",
    "smoothed",
    "padded-capped",
}


# The interpreter checks parity in float32 only on those mse and score_mse cases whose names end with one of these.
FEW = ("packed", "grouped-ragged", "peaked", "odd-width", "mean-heads")


def runnable(case: Case, backend: str, dtype: torch.dtype, check: str = "parity") -> bool:
    """Return whether a `backend` of this machine must run `case` in `dtype`; the interpreter runs a selection."""
    if backend == "cpp":
        return case.native
    if backend not in ("triton", "cuda"):
        return True
    if dtype == torch.float64:
        return False
    if (
        case.operator in ("soft-label", "vocabulary")
        and case.options.get("divergence", FUSED[0]) not in FUSED
    ):
        return False
    if case.options.get("heads") == "group" or (case.operator == "pairwise" and "row_index" in case.tensors):
        return False
    if backend == "cuda":
        return case.operator == "hidden"
    if not interpreting():
        return True
    if dtype == torch.float32:
        few = case.operator == "attention" and not case.name.startswith("kl")
        return check == "parity" and (not few or case.name.endswith(FEW))
    return case.name in INTERPRETED and (dtype == torch.bfloat16 or check == "parity")


def device_of(backend: str) -> str:
    """Return where a backend is checked: the C++ kernels on the CPU, all others on the GPU if there is one."""
    return "cuda" if backend != "cpp" and torch.cuda.is_available() and not interpreting() else "cpu"


def on_device(case: Case, backend: str) -> Case:
    device = device_of(backend)
    return dataclasses.replace(case, tensors={k: v.to(device) for k, v in case.tensors.items()})


def cast(case: Case, dtype: torch.dtype) -> Case:
    """Return the case with its floating-point tensors in `dtype`."""
    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.tensors.items()}
    return dataclasses.replace(case, tensors=tensors)


def evaluate(case: Case, backend: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the gradients of the student's tensors, on the CPU."""
    case = on_device(case, backend)
    tensors = {k: v.detach().clone() if v.is_floating_point() else v for k, v in case.tensors.items()}
    wanted = [name for name in STUDENT[case.operator] if name in tensors]
    for name in wanted:
        tensors[name] = _like_layout(tensors[name], case.tensors[name]).requires_grad_()
    loss = FUNCTIONS[case.operator](**tensors, **case.options, backend=backend)
    gradients = torch.autograd.grad(loss, [tensors[name] for name in wanted])
    return loss.detach().cpu(), {k: g.cpu() for k, g in zip(wanted, gradients, strict=True)}


def _like_layout(copy: Tensor, original: Tensor) -> Tensor:
    """Return `copy` with the strides of `original`, so that a test of non-contiguous inputs keeps them."""
    return torch.empty_strided(
        original.shape, original.stride(), dtype=copy.dtype, device=original.device
    ).copy_(copy)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def gradient_size(case: Case, truth: Tensor) -> float:
    """Return the size that rounding of a gradient is relative to.

    It is the largest of its RMS, an eighth of its largest entry (for gradients of few large entries, such as peaked
    attention), and, for a case whose gradient vanishes, the size of the terms that cancel.
    """
    return max(rms(truth), truth.abs().max().item() / 8, case.gradient_floor)


def worst(x: Tensor, truth: Tensor) -> float:
    """Return the largest absolute error, infinite if `x` is not finite."""
    difference = (x.double() - truth.double()).abs()
    return math.inf if not torch.isfinite(x).all() else (difference.max().item() if x.numel() else 0.0)


def require(name: str, result: Tensor, truth: Tensor, same_precision: Tensor, size: float) -> float:
    """Apply the rule for errors; return error / allowed. size: the magnitude that rounding is relative to."""
    dtype = result.dtype
    allowed = 2 * worst(same_precision, truth) + SLACK_ULPS[dtype] * torch.finfo(dtype).eps * size
    error = worst(result, truth)
    if not error <= allowed:
        raise Mismatch(f"{name}: off by {error:.3e}, allowed {allowed:.3e} (size {size:.3e})")
    return error / allowed if allowed else 0.0


def own_size(case: Case) -> float:
    """Return the loss against a zero teacher plus that of a zero student: the size of terms in a value that cancels."""
    total = 0.0
    students = STUDENT[case.operator]
    for zeroed in (lambda name: name in students, lambda name: name not in students):
        tensors = {
            k: torch.zeros_like(v) if v.is_floating_point() and "weights" not in k and zeroed(k) else v
            for k, v in case.tensors.items()
        }
        total += evaluate(dataclasses.replace(case, tensors=tensors), "reference")[0].item()
    return total


def check_parity(case: Case, backend: str, dtype: torch.dtype) -> float:
    """Check loss and gradients against float64; return the worst error / allowed."""
    rounded = cast(case, dtype)
    exact = cast(rounded, torch.float64)
    loss, gradients = evaluate(rounded, backend)
    true_loss, true_gradients = evaluate(exact, "reference")
    same_loss, same_gradients = evaluate(rounded, "reference")
    size = own_size(exact) if case.cancels else abs(true_loss.item())
    ratio = require("loss", loss, true_loss, same_loss, size)
    for name, gradient in gradients.items():
        if gradient.dtype != dtype:
            raise Mismatch(f"gradient of {name}: dtype {gradient.dtype}, expected {dtype}")
        truth = true_gradients[name]
        ratio = max(
            ratio,
            require(f"gradient of {name}", gradient, truth, same_gradients[name], gradient_size(case, truth)),
        )
    return ratio


def check_padding(case: Case, backend: str, dtype: torch.dtype, extra: int = 5) -> float:
    """Check that padding full of NaN changes neither the loss nor the gradients, and receives no gradient."""
    short = cast(case, dtype)
    # Sum and mean both count only valid tokens, so the truth is the unpadded case.
    tensors = dict(short.tensors)
    some = next(v for k, v in tensors.items() if TOKEN_AXIS.get(k) is not None)
    tokens = some.shape[TOKEN_AXIS[next(k for k in tensors if TOKEN_AXIS.get(k) is not None)]]
    if "labels" not in tensors:
        tensors.setdefault("mask", torch.ones(some.shape[0], tokens, dtype=torch.bool))
    filler = {"mask": False, "segments": 0, "labels": -100, "weights": 1.0}
    for name, value in tensors.items():
        axis = TOKEN_AXIS.get(name)
        if axis is not None:
            shape = [*value.shape[:axis], extra, *value.shape[axis + 1 :]]
            tensors[name] = torch.cat([value, value.new_full(shape, filler.get(name, math.nan))], axis)
    loss, gradients = evaluate(dataclasses.replace(short, tensors=tensors), backend)
    exact = cast(short, torch.float64)
    true_loss, true_gradients = evaluate(exact, "reference")
    same_loss, same_gradients = evaluate(short, "reference")
    size = own_size(exact) if case.cancels else abs(true_loss.item())
    ratio = require("loss with padding", loss, true_loss, same_loss, size)
    for name, gradient in gradients.items():
        axis = TOKEN_AXIS.get(name)
        if axis is not None:
            padding = gradient.narrow(axis, tokens, extra)
            if not torch.equal(padding, torch.zeros_like(padding)):
                raise Mismatch(
                    f"gradient of {name}: padding received {padding.abs().max().item()}, expected 0"
                )
            gradient = gradient.narrow(axis, 0, tokens)
        truth = true_gradients[name]
        ratio = max(
            ratio,
            require(f"gradient of {name}", gradient, truth, same_gradients[name], gradient_size(case, truth)),
        )
    return ratio


def as_identical(case: Case) -> Case | None:
    """Return the case with the student as its own teacher; None if that has no meaning."""
    if "labels" in case.tensors or case.options.get("heads") == "mean":
        return None
    tensors = {k: v for k, v in case.tensors.items() if k not in ("projection", "bias")}
    for name in list(tensors):
        if name.startswith("student"):
            tensors[name.replace("student", "teacher")] = tensors[name]
    if "teacher_bias" in tensors and "student_bias" not in tensors:
        del tensors["teacher_bias"]
    options = {k: v for k, v in case.options.items() if not k.endswith(("_scale", "_softcap"))}
    return dataclasses.replace(case, tensors=tensors, options=options)


def check_identical(case: Case, backend: str, dtype: torch.dtype) -> float:
    """Check that teacher = student gives 0, with a gradient of 0, up to rounding of the ordinary case's sizes."""
    same = as_identical(case)
    if same is None:
        return 0.0
    exact = cast(case, torch.float64)
    ordinary_loss, ordinary_gradients = evaluate(exact, "reference")
    size = own_size(cast(same, torch.float64)) if case.cancels else abs(ordinary_loss.item())
    loss, gradients = evaluate(cast(same, dtype), backend)
    if loss.item() < -SLACK_ULPS[torch.float32] * torch.finfo(loss.dtype).eps * max(size, 1e-3):
        raise Mismatch(f"teacher = student: loss {loss.item():.3e}, expected at least 0")
    zero = torch.zeros_like(loss)
    ratio = require("loss of teacher = student", loss, zero, zero, max(size, 1e-3))
    for name, gradient in gradients.items():
        zero = torch.zeros_like(gradient)
        size = max(ordinary_gradients[name].abs().max().item(), 1e-3)
        ratio = max(ratio, require(f"gradient of {name} at teacher = student", gradient, zero, zero, size))
    return ratio


def check_nothing_valid(case: Case, backend: str, dtype: torch.dtype) -> float:
    """Check that inputs of only padding, all NaN, give exactly 0, connected to the graph, with zero gradients."""
    tensors = dict(cast(case, dtype).tensors)
    for name, value in tensors.items():
        axis = TOKEN_AXIS.get(name)
        if axis is not None and value.is_floating_point() and name != "weights":
            tensors[name] = torch.full_like(value, math.nan)
            shape = (value.shape[0], value.shape[axis])
    if "labels" in tensors:
        tensors["labels"] = torch.full(shape, -100)
    else:
        tensors["mask"] = torch.zeros(shape, dtype=torch.bool)
    loss, gradients = evaluate(dataclasses.replace(case, tensors=tensors), backend)
    if loss.item() != 0:
        raise Mismatch(f"nothing valid: loss {loss.item()}, expected 0")
    for name, gradient in gradients.items():
        if not torch.equal(gradient, torch.zeros_like(gradient)):
            raise Mismatch(
                f"nothing valid: gradient of {name} reaches {gradient.abs().max().item()}, expected 0"
            )
    return 0.0


def check_magnitude(case: Case, backend: str, dtype: torch.dtype, magnitude: float = 1e4) -> float:
    """Check inputs of size 1e4 and 1e-4: every value is finite if the dtype can hold the true one."""
    for factor in (magnitude, 1 / magnitude):
        tensors = {
            k: v * factor if TOKEN_AXIS.get(k) is not None and v.is_floating_point() and k != "weights" else v
            for k, v in case.tensors.items()
        }
        if dtype == torch.float16:
            tensors = {k: v.clamp(-6e4, 6e4) if v.is_floating_point() else v for k, v in tensors.items()}
        large = cast(dataclasses.replace(case, tensors=tensors), dtype)
        loss, gradients = evaluate(large, backend)
        true_loss, true_gradients = evaluate(cast(large, torch.float64), "reference")
        results = [("loss", loss, true_loss)] + [(k, gradients[k], true_gradients[k]) for k in gradients]
        for name, result, truth in results:
            representable = truth.abs().max().item() < torch.finfo(result.dtype).max / 2
            if result.isnan().any() or (representable and not result.isfinite().all()):
                raise Mismatch(f"inputs times {factor}: {name} is not finite")
    return 0.0


def check_layout(case: Case, backend: str, dtype: torch.dtype) -> float:
    """Check that non-contiguous inputs give the same loss and gradients as contiguous ones."""
    plain = cast(case, dtype)
    tensors = {
        k: v.transpose(0, -1).contiguous().transpose(0, -1) if v.is_floating_point() and v.dim() > 1 else v
        for k, v in plain.tensors.items()
    }
    loss, gradients = evaluate(dataclasses.replace(plain, tensors=tensors), backend)
    straight_loss, straight = evaluate(plain, backend)
    ratio = require("loss of strided inputs", loss, straight_loss, straight_loss, abs(straight_loss.item()))
    for name, gradient in gradients.items():
        expected = straight[name]
        size = gradient_size(case, expected)
        ratio = max(ratio, require(f"strided gradient of {name}", gradient, expected, expected, size))
    return ratio


def check_value_only(case: Case, backend: str, dtype: torch.dtype) -> float:
    """Check that if no input needs a gradient, the value is the same and autograd records nothing."""
    plain = cast(case, dtype)
    placed = on_device(plain, backend)
    loss = FUNCTIONS[case.operator](**placed.tensors, **case.options, backend=backend)
    if loss.requires_grad:
        raise Mismatch("no input requires a gradient, yet the loss does")
    with_gradient, _ = evaluate(plain, backend)
    size = own_size(cast(plain, torch.float64)) if case.cancels else abs(with_gradient.item())
    return require("loss without gradients", loss.cpu(), with_gradient, with_gradient, size)


CHECKS: dict[str, Callable[[Case, str, torch.dtype], float]] = {
    "parity": check_parity,
    "padding": check_padding,
    "identical": check_identical,
    "nothing-valid": check_nothing_valid,
    "magnitude": check_magnitude,
    "layout": check_layout,
    "value-only": check_value_only,
}


def run_verify(json_path: str | Path | None = None) -> int:
    """Run every check on every case, backend and dtype of this machine; print a table.

    json_path: file to write the rows to as well. Returns 0 if everything passed, 1 otherwise. Raises UserError for an
    instruction set that does not exist.
    """
    check_instruction_set()
    if (native := extension()) is not None:
        usable = ", ".join(native.instruction_sets())
        print(f"native operators run {native.instruction_set()}; built and usable here: {usable}")
    rows = []
    for backend in available_backends():
        for dtype in DTYPES:
            for check, run in CHECKS.items():
                rows += _run_cases(check, run, backend, dtype)
    print(f"{'operator':14} {'backend':10} {'dtype':9} {'check':14} cases  failed  worst error/allowed")
    for row in rows:
        dtype = row["dtype"]
        print(
            f"{row['operator']:14} {row['backend']:10} {dtype:9} {row['check']:14} {row['cases']:5}  "
            f"{len(row['failures']):6}  {row['worst']:.2f}"
        )
        for failure in row["failures"]:
            print(f"    {failure}")
    if json_path is not None:
        disk.save_json(json_path, rows)
    return int(any(row["failures"] for row in rows))


def _run_cases(check: str, run: Callable, backend: str, dtype: torch.dtype) -> list[dict]:
    by_operator: dict[str, dict] = {}
    for case in all_cases():
        if not runnable(case, backend, dtype, check):
            continue
        row = by_operator.setdefault(
            case.operator,
            {
                "operator": case.operator,
                "backend": backend,
                "dtype": str(dtype).removeprefix("torch."),
                "check": check,
                "cases": 0,
                "failures": [],
                "worst": 0.0,
            },
        )
        row["cases"] += 1
        try:
            row["worst"] = max(row["worst"], run(case, backend, dtype))
        except Mismatch as error:
            row["failures"].append(f"{case.name}: {error}")
    return list(by_operator.values())
