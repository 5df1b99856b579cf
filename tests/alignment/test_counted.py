"""Terms that are told which tokens count (`Batch.counted`) must agree with terms that look for them."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsdistill.data.batch import NO_LABEL
from tests.alignment.rig import Rig, make_batch, with_filler

CASES = {
    "causal_lm": ("gpt2", {"task": {}, "soft_label": {}, "fdd": {}}),
    "masked_lm": ("bert", {"task": {}, "soft_label": {}}),
}


class Asked(TorchDispatchMode):
    """Asked records the names of the operations that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


def batches(task):
    """Return a batch without and with `counted`: padding, filler rows and (causal) a prompt of three tokens."""
    batch = with_filler(make_batch(task), 1)
    if task == "causal_lm":
        batch.labels[2, :3] = NO_LABEL
    chosen = (batch.labels != NO_LABEL) & batch.mask
    if task == "causal_lm":
        chosen[:, 0] = False
    return batch, replace(batch, counted=chosen.flatten().nonzero()[:, 0])


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("task", CASES)
def test_losses_and_gradients_are_the_same_to_the_last_bit(task, backend):
    family, terms = CASES[task]
    rig = Rig(family, task, terms, backend=backend)
    without, with_counted = batches(task)
    assert torch.equal(rig.counts([without]), rig.counts([with_counted]))
    assert rig.counts([with_counted]).dtype == torch.float64
    expected, found = rig.step(without), rig.step(with_counted)
    assert found[:2] == expected[:2] and found[0] > 0.1
    for name, gradient in expected[2].items():
        assert torch.equal(found[2][name], gradient), name


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("task", CASES)
def test_nothing_is_searched_for(task, backend):
    """With `counted`, counts and sums call no `nonzero`, forward or backward; without it they do."""
    family, terms = CASES[task]
    rig = Rig(family, task, terms, backend=backend)
    asked = []
    for batch in batches(task):
        student, teacher = rig.module.trace(batch), rig.teacher_trace(batch)
        with Asked() as mode:
            for term in rig.objective.terms.values():
                term.counts(batch, {})
                term.sums(student, teacher, batch).sum().backward(retain_graph=True)
        asked.append(mode.names)
    assert "aten::nonzero" in asked[0] and "aten::nonzero" not in asked[1]
    assert "aten::_local_scalar_dense" not in asked[1] and "aten::mm" in asked[1]
