import pytest
import torch
from operator_checks import BACKENDS, every_check, gradient_cases, run_check, run_gradcheck

from dsdistill.ops import hidden_alignment
from dsdistill.ops.hidden import chunked


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


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("divergence", ["mse", "cosine"])
def test_several_blocks_are_one(divergence, projected, monkeypatch):
    """Tokens in blocks of 7, some of them masked and one of them 0, give what all tokens at once give."""
    torch.manual_seed(0)
    student = torch.randn(2, 23, 6, dtype=torch.float64)
    student[0, 3] = 0
    inputs = [student.requires_grad_()]
    options = {"mask": torch.rand(2, 23) > 0.2, "weights": torch.rand(2, 23), "divergence": divergence}
    if projected:
        inputs += [
            torch.randn(9, 6, dtype=torch.float64).requires_grad_(),
            torch.randn(9).double().requires_grad_(),
        ]
        options |= {"projection": inputs[1], "bias": inputs[2]}
    teacher = torch.randn(2, 23, 9 if projected else 6, dtype=torch.float64)
    kept = [x.detach().clone() for x in (student, teacher)]
    expected = hidden_alignment(student, teacher, **options, backend="reference")
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(chunked, "MIN_TOKENS", 7)
    found = hidden_alignment(student, teacher, **options, backend="chunked")
    torch.testing.assert_close(found, expected)
    for mine, true in zip(*(torch.autograd.grad(x, inputs) for x in (found, expected)), strict=True):
        torch.testing.assert_close(mine, true)
    assert torch.equal(student, kept[0]) and torch.equal(
        teacher, kept[1]
    )  # blocks are computed in their own memory


def test_no_tokens_give_a_gradient_of_zero():
    projection = torch.randn(4, 3, requires_grad=True)
    loss = hidden_alignment(
        torch.randn(0, 5, 3), torch.randn(0, 5, 4), projection=projection, backend="chunked"
    )
    loss.backward()
    assert loss.item() == 0 and not projection.grad.any()
