"""Helpers of the operators' tests: every check × case × backend × dtype, gradcheck, and hand-computed values."""

from __future__ import annotations

import pytest
import torch

from dsdistill.bench.cases import FUNCTIONS, STUDENT, Case, all_cases
from dsdistill.bench.verify import CHECKS, DTYPES, cast, runnable
from dsdistill.ops import available_backends
from dsdistill.ops.gpu import interpreting

# Backends that take CPU tensors: Triton does so in its interpreter, but not on a machine with a GPU.
BACKENDS = tuple(b for b in available_backends() if b not in ("triton", "cuda") or interpreting())


def every_check(operator: str):
    """Parametrise a test over (check, case, backend, dtype) for one operator."""
    combinations = [
        pytest.param(check, case, backend, dtype, id=f"{check}-{case.name}-{backend}-{str(dtype)[6:]}")
        for check in CHECKS
        for case in all_cases()
        if case.operator == operator
        for backend in available_backends()
        for dtype in DTYPES
        if runnable(case, backend, dtype, check)
    ]
    return pytest.mark.parametrize(("check", "case", "backend", "dtype"), combinations)


def run_check(check: str, case: Case, backend: str, dtype: torch.dtype) -> None:
    CHECKS[check](case, backend, dtype)


def gradient_cases(operator: str, *names: str):
    """Parametrise a gradcheck over named cases and the backends that run them in float64."""
    cases = [case for case in all_cases() if case.operator == operator and case.name in names]
    assert len(cases) == len(names), f"{operator} has no cases {set(names) - {case.name for case in cases}}"
    combinations = [
        pytest.param(case, backend, id=f"{case.name}-{backend}")
        for case in cases
        for backend in BACKENDS
        if runnable(case, backend, torch.float64)
    ]
    return pytest.mark.parametrize(("case", "backend"), combinations)


def run_gradcheck(case: Case, backend: str) -> None:
    """Compare the operator's gradients with numerical derivatives along random directions."""
    case = cast(case, torch.float64)
    names = [name for name in STUDENT[case.operator] if name in case.tensors]
    fixed = {k: v for k, v in case.tensors.items() if k not in names}

    def loss(*tensors):
        given = dict(zip(names, tensors, strict=True))
        return FUNCTIONS[case.operator](**given, **fixed, **case.options, backend=backend)

    inputs = [case.tensors[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)
