import pytest
import torch
from operator_checks import BACKENDS, every_check, gradient_cases, run_check, run_gradcheck

from dsdistill.ops import hidden_alignment


@every_check("hidden")
def test_check(check, case, backend, dtype):
    run_check(check, case, backend, dtype)


@gradient_cases("hidden", *(f"{d}-{v}" for d in ("mse", "cosine") for v in ("ragged", "bias", "weighted")))
def test_gradcheck(case, backend):
    run_gradcheck(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("divergence", "expected"), [("mse", (1 + 9) / (2 * 2)), ("cosine", (0.0 + 2.0) / 2)]
)
def test_by_hand(backend, divergence, expected):
    student = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    teacher = torch.tensor([[[2.0, 0.0], [0.0, -2.0]]])
    loss = hidden_alignment(student, teacher, divergence=divergence, backend=backend)
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_projection_by_hand(backend):
    # y = (1·2 + 1, 1·3 − 1) = (3, 2) against (1, 1).
    loss = hidden_alignment(
        torch.tensor([[[1.0]]]),
        torch.tensor([[[1.0, 1.0]]]),
        projection=torch.tensor([[2.0], [3.0]]),
        bias=torch.tensor([1.0, -1.0]),
        backend=backend,
    )
    assert loss.item() == pytest.approx((4 + 1) / 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_projection_gets_no_gradient(backend):
    student = torch.randn(1, 5, 3, requires_grad=True)
    projection = torch.randn(4, 3)
    hidden_alignment(student, torch.randn(1, 5, 4), projection=projection, backend=backend).backward()
    assert projection.grad is None
    assert student.grad.shape == student.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_projection_learns(backend):
    projection = torch.randn(4, 3, requires_grad=True)
    hidden_alignment(
        torch.randn(1, 5, 3), torch.randn(1, 5, 4), projection=projection, backend=backend
    ).backward()
    assert projection.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": torch.randn(2, 6, 5)}, "projection: got None"),
        ({"projection": torch.randn(3, 4)}, "D_t=4"),
        ({"bias": torch.randn(4)}, "without a projection"),
        ({"divergence": "l1"}, "'mse', 'cosine'"),
        ({"weights": torch.ones(2, 5)}, "N=6"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    arguments = {"student": torch.randn(2, 6, 4), "teacher": torch.randn(2, 6, 4)} | changes
    with pytest.raises(ValueError, match=message):
        hidden_alignment(arguments.pop("student"), arguments.pop("teacher"), **arguments)
