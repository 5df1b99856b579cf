"""The term `smooth`, how far the student has moved since the stage before, is checked by hand."""

import pytest
import torch

from dsdistill.alignment.terms import TERMS, Pair, Shape
from dsdistill.config.terms import Smooth
from dsdistill.data.batch import Batch
from dsdistill.models.trace import Trace

STUDENT = Shape(depth=1, width=2, heads=1, key_heads=1, head_width=2, vocabulary=9)
PAIR = Pair(STUDENT, None, "classification", "auto")


def test_by_hand():
    """Two valid tokens of width 2 move by (3, 4) and (0, 1); a padded token does not count, wherever it moves."""
    term = TERMS["smooth"](Smooth(), PAIR)
    before = torch.tensor([[[1.0, 2.0], [5.0, 5.0], [7.0, 7.0]]])
    now = (before + torch.tensor([[[3.0, 4.0], [0.0, 1.0], [100.0, 100.0]]])).requires_grad_()
    mask = torch.tensor([[True, True, False]])
    batch = Batch(mask.long(), mask, None)
    value = term.sums(Trace(hidden={1: now}, previous=Trace(hidden={1: before})), None, batch)
    assert value.item() == pytest.approx((5 + 1) / 2**0.5, rel=1e-5)
    assert term.counts(batch, {}).tolist() == [2.0]
    (gradient,) = torch.autograd.grad(value.sum(), now)
    expected = torch.tensor([[[0.6, 0.8], [0.0, 1.0], [0.0, 0.0]]]) / 2**0.5
    torch.testing.assert_close(gradient, expected)


def test_nothing_has_moved_at_first():
    """The gradient of a norm has no limit at 0; here the loss is 0 and its gradient finite."""
    term = TERMS["smooth"](Smooth(), PAIR)
    states = torch.ones(1, 1, 2, requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    traces = Trace(hidden={1: states}, previous=Trace(hidden={1: states.detach()}))
    value = term.sums(traces, None, Batch(mask.long(), mask, None))
    assert value.item() == 0
    assert torch.equal(torch.autograd.grad(value.sum(), states)[0], torch.zeros(1, 1, 2))
