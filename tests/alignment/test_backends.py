"""`train.backend` must reach every operator of every term."""

import pytest

from dsdistill.alignment.terms import TERMS
from dsdistill.ops import available_backends, backends, backends_taken
from dsdistill.ops.gpu import interpreting
from tests.alignment.synthetic import CASES, LANGUAGE, NO_KERNEL, Synthetic, term_of


@pytest.fixture(autouse=True)
def taken_by_auto(monkeypatch):
    monkeypatch.setattr(backends, "_taken", {})
    return backends_taken


def loss(case: str, backend: str) -> float:
    found = Synthetic(case, (9, 4, 1), backend=backend).loss()
    found.backward()
    return found.item()


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_to_auto(case, taken_by_auto):
    expected = loss(case, "reference")
    assert taken_by_auto() == {}
    native = term_of(case) not in LANGUAGE and case not in NO_KERNEL
    kernels = {"triton"} if interpreting() and term_of(case) in LANGUAGE else {"cpp"} if native else set()
    for backend in ("chunked", *(kernels & {*available_backends()})):
        assert loss(case, backend) == pytest.approx(expected, rel=1e-4), backend
        assert taken_by_auto() == {}, backend


@pytest.mark.parametrize("case", sorted(LANGUAGE))
@pytest.mark.parametrize("backend", ["cpp", "cuda"])
def test_operators_over_a_vocabulary_have_no_other_kernels(case, backend, taken_by_auto):
    loss(case, backend)
    assert list(taken_by_auto().values()) == [["reference"]]  # few logits


def test_every_term_is_tried():
    assert {term_of(case) for case in CASES} == {*TERMS}
