"""The loader's notes of which tokens are to be predicted must agree with the labels."""

import pytest
import torch

from dsdistill.data import NO_LABEL, Examples, Loader, collate, evaluation_batches
from dsdistill.data.masking import Masking
from tests.data.rig import made

LENGTHS = (5, 1, 3, 8, 2)


def examples(**changes) -> Examples:
    tokens = iter(range(5, 5 + sum(LENGTHS)))
    return made([[next(tokens) for _ in range(length)] for length in LENGTHS], ids=list("abcde"), **changes)


def masking(predicted: float, hidden: float) -> Masking:
    return Masking(predicted, hidden, 4, torch.arange(5).numpy(), torch.arange(5, 40).numpy(), seed=0)


CAUSAL = {
    "plain": {},
    "prompted": {"ranges": [[(2, 5)], [(0, 1)], [(1, 3)], [(7, 8)], []]},
    "hidden, not predicted": {"masking": masking(0.0, 0.3)},
}


def places(batch) -> list[tuple[int, int]]:
    width = batch.mask.shape[1]
    assert batch.counted.dtype == torch.int64 and batch.counted.tolist() == sorted(
        set(batch.counted.tolist())
    )
    return [divmod(place, width) for place in batch.counted.tolist()]


@pytest.mark.parametrize("changes", CAUSAL.values(), ids=CAUSAL)
def test_causal(changes):
    """All valid tokens with a label count, except the first of each row."""
    data = examples(**changes)
    batch = collate(data, [3, 0, 1, 4], pad_id=0, epoch=0)
    prompts = [2, 0, 1, 7, 2] if data.prompted else [0] * 5
    assert places(batch) == [
        (i, n) for i, row in enumerate([3, 0, 1, 4]) for n in range(max(1, prompts[row]), LENGTHS[row])
    ]


def test_masked():
    """All tokens with a label count, even the first of a row."""
    batch = collate(examples(masking=masking(0.6, 0.0)), [3, 0, 1], pad_id=0, epoch=0)
    assert places(batch) == [(b, n) for b, n in (batch.labels != NO_LABEL).nonzero().tolist()]
    assert (2, 0) in places(batch) and batch.mask.flatten()[batch.counted].all()


@pytest.mark.parametrize("changes", [*CAUSAL.values(), {"masking": masking(0.6, 0.0)}])
def test_filler_counts_nothing(changes):
    assert collate(examples(**changes), [], pad_id=0).counted.tolist() == []


def test_labels_of_whole_examples_leave_it_out():
    data = examples(labels=torch.zeros(5, dtype=torch.int64))
    assert collate(data, [0, 1], pad_id=0).counted is None and collate(data, [], pad_id=0).counted is None


def test_every_way_to_a_batch_has_it():
    data = examples()
    trained = [
        batch for step in range(3) for batch in Loader(data, 2, 2, 1, 0, seed=0, pad_id=0).step(0, step)
    ]
    for batches in (trained, evaluation_batches(data, 2, 1, 0, pad_id=0)):
        assert sum(batch.counted.numel() for batch in batches) == sum(LENGTHS) - len(LENGTHS)
    assert trained[0].to("meta").counted.device.type == "meta"
