"""In every loop two real ranks must train the same student as one process does."""

import os

import pytest
import torch

from tests.distiller import loops
from tests.engine.launch import launch


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train by every loop on two ranks; return the folder of the results."""
    out = tmp_path_factory.mktemp("loops")
    loops.teacher().save_pretrained(out / "teacher")
    done = launch(loops.__file__, out, *loops.LOOPS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return out


@pytest.fixture(scope="module")
def truth():
    """Return what one process trains to and where it starts, without and with layer weights that move."""
    return {
        "": (loops.run("plain"), loops.weights(loops.distiller())),
        "moving": (loops.run("plain-moving"), loops.weights(loops.distiller(terms=loops.MOVING))),
    }


@pytest.mark.parametrize("loop", loops.LOOPS)
def test_trains_to_the_same_weights(trained, truth, loop):
    expected, start = truth["moving" if loop.endswith("moving") else ""]
    found = torch.load(os.path.join(trained, f"{loop}.pt"))
    assert found.keys() == expected.keys() and any("projectors" in name for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
        assert name == "means" or (value - start[name]).abs().max() > 1e-5, f"{name} has not moved"


def test_layer_weights_move():
    """Without update() the weights would stay, and training would give another result."""
    moving = loops.run("plain-moving")
    made = loops.distiller(terms=loops.MOVING)
    made.update = lambda outputs: None
    still = loops.descend(made, made)
    assert max((value - moving[name]).abs().max() for name, value in still.items()) > 1e-5


def test_counts_matter(truth):
    """If each micro-batch counts as a step of its own, training gives another result."""
    made = loops.distiller()
    optimizer = torch.optim.SGD(made.parameters(), lr=loops.RATE)
    for step in range(loops.STEPS):
        for batch in loops.own(step):
            (made(batch).loss / loops.MICRO).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = loops.weights(made)
    assert max((found[name] - value).abs().max() for name, value in truth[""][0].items()) > 1e-4
