"""Operators that read unwritten memory are caught: by conftest.py in Python, by torch itself in C++."""

import pytest
import torch

from dsdistill.bench import cases, verify
from dsdistill.bench.cases import all_cases
from dsdistill.ops import available_backends
from dsdistill.ops.common import with_stored_gradients

MAKERS = {
    "empty": lambda x: torch.empty(x.shape, dtype=x.dtype),
    "empty_like": lambda x: torch.empty_like(x),
    "empty_strided": lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype),
    "new_empty": lambda x: x.new_empty(x.shape),
}


def sum_of_squares(x, make, written):
    """Return Σ x²; its gradient is written only at the first `written` tokens."""

    def compute(needs):
        gradient = make(x)
        gradient[:, :written] = 2 * x.detach()[:, :written]
        return x.detach().square().sum(), [gradient]

    return with_stored_gradients(compute, (x,), None)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_what_was_not_written_is_nan(make):
    x = torch.ones(2, 5, 3, requires_grad=True)
    right, wrong = (torch.autograd.grad(sum_of_squares(x, make, written), x)[0] for written in (5, 4))
    assert torch.equal(right, torch.full_like(right, 2))
    assert wrong[:, 4].isnan().all() and not wrong[:, :4].isnan().any()


def test_integers_and_bools_are_filled_too():
    assert torch.empty(3, dtype=torch.int32).tolist() == [2**31 - 1] * 3
    assert torch.empty(3, dtype=torch.bool).all()


def test_other_devices_stay_what_they_are():
    with torch.device("meta"):
        assert torch.empty(3).is_meta and torch.zeros(3).is_meta


def test_the_checks_refuse_such_an_operator(monkeypatch):
    """The case that tests every operator fails for an operator that leaves a token's gradient unwritten."""
    case = next(
        case for case in all_cases() if case.operator == "hidden" and "projection" not in case.tensors
    )
    right = cases.FUNCTIONS["hidden"]

    def wrong(student, teacher, *, backend, **rest):
        tokens = student.shape[1] - (backend == "chunked")
        return sum_of_squares(student, torch.empty_like, tokens) + 0 * right(student, teacher, **rest)

    monkeypatch.setitem(cases.FUNCTIONS, "hidden", wrong)
    verify.check_parity(case, "reference", torch.float32)
    with pytest.raises(verify.Mismatch, match="gradient of student: off by inf"):
        verify.check_parity(case, "chunked", torch.float32)


@pytest.fixture
def filled_by_torch():
    """Use deterministic algorithms, under which torch fills the memory of new tensors with NaN, in C++ too."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif("cpp" not in available_backends(), reason="the native operators are not built")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_compiled_operators_write_their_outputs(filled_by_torch, dtype):
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.zeros(3).new_empty(3).isnan().all()
    native = [case for case in all_cases() if verify.runnable(case, "cpp", dtype)]
    assert len(native) > 20
    for case in native:
        verify.check_parity(case, "cpp", dtype)
        verify.check_padding(case, "cpp", dtype)
