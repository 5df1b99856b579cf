"""Every term with fillers, single tokens and numbers near the end of float16: finite losses, finite gradients."""

import pytest
import torch

from tests.alignment.synthetic import CASES, Synthetic

LENGTHS = {
    "fillers": (9, 0, 5, 0),
    "single tokens": (1, 1, 1),
    "one sequence": (9,),
    "one token": (1,),
    "filler alone": (0, 0),
}


def run(case, lengths, **options):
    # At least two tokens wide, as batches are, because a language model needs a next token to predict.
    synthetic = Synthetic(case, lengths, **options) if max(lengths) > 1 else _widened(case, lengths, options)
    loss = synthetic.loss()
    loss.backward()
    gradients = [leaf.grad for leaf in synthetic.leaves if leaf.grad is not None]
    gradients += [p.grad for p in synthetic.objective.parameters() if p.grad is not None]
    assert loss.isfinite() and gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    return loss, gradients


def _widened(case, lengths, options):
    synthetic = Synthetic(case, (*lengths, 2), **options)
    batch = synthetic.batch
    batch.mask[-1] = False
    if batch.labels.dim() == 2:
        batch.labels[-1] = -100
    object.__setattr__(batch, "spans", batch.spans[batch.spans[:, 0] < len(lengths)])
    return synthetic


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("case", CASES)
def test_shapes(case, kind):
    loss, gradients = run(case, LENGTHS[kind])
    if kind == "filler alone":
        assert loss.item() == 0 and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("case", CASES)
def test_padding_gets_no_gradient(case):
    synthetic = Synthetic(case, (9, 4))
    synthetic.loss().backward()
    for leaf in synthetic.leaves:
        if leaf.grad is not None and leaf.dim() > 2:
            tokens = leaf.grad.transpose(1, 2) if leaf.dim() == 4 else leaf.grad
            assert not tokens[1, 4:].any()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_half_precision(case, scale):
    """Squares of 1e4 overflow in float16, and so would gradients of the undivided sum."""
    if case == "attention, scores" and scale > 1:
        scale = 100  # the gradient of squared scores grows with the cube, so its true value would overflow
    run(case, (9, 4, 1), scale=scale / 4, dtype=torch.float16)
