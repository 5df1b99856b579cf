import math

import pytest
import torch
from operator_checks import BACKENDS, every_check, gradient_cases, run_check, run_gradcheck

from dsdistill.ops import pairwise_alignment


@every_check("pairwise")
def test_check(check, case, backend, dtype):
    run_check(check, case, backend, dtype)


@gradient_cases(
    "pairwise",
    *(
        f"{relation}-{variant}"
        for relation in ("cosine", "dot", "distance")
        for variant in ("plain", "weighted")
    ),
    "cosine-long-ragged",
    "dot-long-ragged",
    "cosine-plain-rows",
    "dot-long-rows",
)
def test_gradcheck(case, backend):
    run_gradcheck(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("relation", "expected"),
    [
        # Student (1,0), (1,1); teacher (1,0), (0,2). The pairs (0,1) and (1,0) differ, and for dot (1,1).
        ("cosine", 2 * 0.5 / 4),
        ("dot", (2 * 1**2 + (2 - 4) ** 2) / 4),
        # Both models have one distinct distance, which is its own mean.
        ("distance", 0.0),
    ],
)
def test_by_hand(backend, relation, expected):
    student = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    loss = pairwise_alignment(student, teacher, relation=relation, backend=backend)
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_distance_by_hand(backend):
    # Points 0, 1, 3: distances 1, 3, 2 of mean 2. Points 0, 1, 9: distances 1, 9, 8 of mean 6.
    student, teacher = torch.tensor([[[0.0], [1.0], [3.0]]]), torch.tensor([[[0.0], [1.0], [9.0]]])
    differences = [1 / 2 - 1 / 6, 3 / 2 - 9 / 6, 1 - 8 / 6]
    expected = 2 * sum(d * d / 2 for d in differences) / 9
    loss = pairwise_alignment(student, teacher, relation="distance", backend=backend)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_distance_is_linear_beyond_one(backend):
    # Nine points at 0 and one at 1 against the same with the outlier elsewhere: |Δ| > 1 takes |Δ| − ½.
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 12, 3), torch.randn(1, 12, 3)
    student[0, 0] = 40.0
    d_s, d_t = torch.cdist(student, student)[0], torch.cdist(teacher, teacher)[0]
    delta = (d_s / d_s[d_s > 0].mean() - d_t / d_t[d_t > 0].mean()).abs()
    assert (delta > 1).any()
    expected = torch.where(delta < 1, delta**2 / 2, delta - 0.5).mean()
    loss = pairwise_alignment(student, teacher, relation="distance", backend=backend)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relation", ["cosine", "dot", "distance"])
def test_rotation_and_scaling(backend, relation):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 30, 8), torch.randn(2, 30, 6)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8))
    loss = pairwise_alignment(student, teacher, relation=relation, backend=backend)
    rotated = pairwise_alignment(student @ rotation, teacher, relation=relation, backend=backend)
    torch.testing.assert_close(rotated, loss, rtol=1e-4, atol=1e-6)
    if relation != "dot":
        scaled = pairwise_alignment(student * 7, teacher, relation=relation, backend=backend)
        torch.testing.assert_close(scaled, loss, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_default_weights_are_a_mean_over_pairs_then_sequences(backend):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 7, 4), torch.randn(3, 7, 4)
    mask = torch.arange(7)[None] < torch.tensor([[7], [4], [0]])
    parts = [pairwise_alignment(student[b : b + 1, :n], teacher[b : b + 1, :n]) for b, n in ((0, 7), (1, 4))]
    whole = pairwise_alignment(student, teacher, mask=mask, backend=backend)
    torch.testing.assert_close(whole, sum(parts) / 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_vectors_have_no_direction(backend):
    student = torch.randn(1, 6, 4)
    student[0, 2] = 0
    student.requires_grad_()
    loss = pairwise_alignment(student, torch.randn(1, 6, 4), backend=backend)
    loss.backward()
    assert math.isfinite(loss.item())
    assert torch.isfinite(student.grad).all()
    assert torch.equal(student.grad[0, 2], torch.zeros(4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": torch.randn(2, 5, 4)}, "N=6"),
        ({"relation": "angle"}, "'cosine', 'dot', 'distance'"),
        ({"weights": torch.ones(2, 5)}, "N=6"),
        ({"mask": torch.ones(2, 6)}, "torch.bool"),
        ({"student": torch.randn(6, 4)}, "expected"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    arguments = {"student": torch.randn(2, 6, 4), "teacher": torch.randn(2, 6, 4)} | changes
    with pytest.raises(ValueError, match=message):
        pairwise_alignment(arguments.pop("student"), arguments.pop("teacher"), **arguments)
