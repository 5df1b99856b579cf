"""At 2,048 tokens no term makes a tensor of N×N or tokens×vocabulary, in the forward or the backward pass."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsdistill.alignment.terms import TERMS
from tests.alignment.rig import Rig, make_batch
from tests.alignment.synthetic import CASES, NO_KERNEL, Synthetic, term_of

N, LENGTHS, VOCABULARY = 2048, (2048, 1500), 6144
# "auto" runs them in C++, unwatched here.
NATIVE = {"hidden", "feature_map", "attention", "pairwise", "trajectory", "domain"}
RUNS = [(case, "auto") for case in CASES]
RUNS += [(case, "chunked") for case in CASES if term_of(case) in NATIVE and case not in NO_KERNEL]

WHOLE = N * N * 4 / 2**20  # MiB of an N×N matrix in float32
# Case, backend, MiB that its step may need at most; from small to large, since freed memory is used again.
PEAKS = [(case, "auto", WHOLE / 2) for case in ("hidden", "pairwise", "domain", "smooth")]
PEAKS += [("trajectory", "auto", WHOLE), ("soft_label", "auto", N * VOCABULARY * 4 / 2**20)]


class Largest(TorchDispatchMode):
    """Largest records the number of elements of the largest tensor that any operation returned."""

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
    """Return the elements in memory: an expanded tensor has fewer than its shape says."""
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
    assert seen.elements <= N * VOCABULARY / 4  # 512 tokens


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak is read from /proc")
def test_peak_of_the_process():
    """Only this test sees what native code holds.

    It runs in a process of its own, where no earlier peak hides a later one.
    """
    arguments = [x for case, backend, _ in PEAKS for x in (case, backend)] + ["pairwise", "reference"]
    worker = Path(__file__).with_name("memory_worker.py")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, worker, *arguments],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *found, reference = json.loads(done.stdout.splitlines()[-1])
    for (case, backend, most), mib in zip(PEAKS, found, strict=True):
        assert mib < most, (case, backend)
    assert reference > WHOLE  # the measurement does see a whole matrix


@pytest.mark.parametrize("case", ["attention", "pairwise"])
def test_a_whole_matrix_is_seen(case):
    assert largest(case, "reference", lengths=(512,)).elements >= 512**2


def test_every_term_is_here():
    assert {term_of(case) for case in CASES} == set(TERMS)


def test_teacher_layers_go_as_they_are_read():
    """Each layer is freed once its last term has read it, and not before."""
    rig, batch = Rig("bert"), make_batch("classification")
    teacher, counts, seen = rig.teacher_trace(batch), rig.counts([batch]), {}
    mapped = set(teacher.hidden), set(teacher.attention)
    for name, term in rig.objective.terms.items():

        def sums(*arguments, _name=name, _sums=term.sums):
            seen[_name] = set(teacher.hidden), set(teacher.attention)
            return _sums(*arguments)

        term.sums = sums
    rig.module.loss(batch, teacher, counts)
    assert seen["hidden"] == mapped and seen["attention"][1] == mapped[1]
    assert seen["attention"][0] == seen["pairwise"][0] == rig.objective.terms["pairwise"].teacher_hidden
    assert seen["pairwise"][1] == set()
    assert teacher.hidden == teacher.attention == {}
