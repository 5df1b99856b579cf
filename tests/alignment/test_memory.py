"""At 2,048 tokens no term makes a tensor of N×N or tokens×vocabulary, in the forward or the backward pass."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsdistill.alignment.terms import TERMS
from tests.alignment.rig import Rig, make_batch
from tests.alignment.synthetic import CASES, Synthetic, term_of

N, LENGTHS, VOCABULARY = 2048, (2048, 1500), 8192
NATIVE = {
    "hidden",
    "attention",
    "pairwise",
    "trajectory",
    "domain",
}  # that "auto" runs in C++, which is not watched here
RUNS = [(case, "auto") for case in CASES]
RUNS += [(case, "chunked") for case in CASES if term_of(case) in NATIVE and "mean heads" not in case]


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements, self.where = 0, ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and (held := _held(leaf)) > self.elements:
                self.elements, self.where = held, str(function)
        return found


def _held(x: torch.Tensor) -> int:
    """Elements in memory: an expanded tensor has fewer than its shape says."""
    return min(x.numel(), x.untyped_storage().nbytes() // x.element_size())


def largest(case: str, backend: str, lengths=LENGTHS) -> Largest:
    synthetic = Synthetic(case, lengths, VOCABULARY, backend)
    with Largest() as seen:
        loss = synthetic.loss()
        loss.backward()
    assert loss.isfinite()
    return seen


@pytest.mark.parametrize(("case", "backend"), RUNS)
def test_largest_tensor(case, backend):
    seen = largest(case, backend)
    assert seen.elements < N * N, seen.where
    assert seen.elements < N * VOCABULARY / 4


@pytest.mark.parametrize("case", ["attention", "pairwise"])
def test_a_whole_matrix_is_seen(case):
    assert largest(case, "reference", lengths=(512,)).elements >= 512**2


def test_every_term_is_here():
    alone = {"smooth"}  # compares states of one model token by token
    assert {term_of(case) for case in CASES} | alone == set(TERMS)


def test_teacher_layers_go_as_they_are_read():
    """Each is gone once its last term has read it, not before."""
    rig, batch = Rig("bert"), make_batch("classification")
    teacher, counts, seen = rig.teacher_trace(batch), rig.counts([batch]), {}
    mapped = set(teacher.hidden), set(teacher.attention)
    for name, term in rig.objective.terms.items():

        def sums(*arguments, _name=name, _sums=term.sums):
            seen[_name] = set(teacher.hidden), set(teacher.attention)
            return _sums(*arguments)

        term.sums = sums
    rig.module(batch, teacher, counts)
    assert seen["hidden"] == mapped and seen["attention"][1] == mapped[1]
    assert seen["attention"][0] == seen["pairwise"][0] == rig.objective.terms["pairwise"].teacher_hidden
    assert seen["pairwise"][1] == set()
    assert teacher.hidden == teacher.attention == {}
