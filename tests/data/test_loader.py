import itertools

import numpy as np
import pytest
import torch

from dsdistill.config.errors import UserError
from dsdistill.data import NO_LABEL, Loader, collate, evaluation_batches, restore
from tests.data.rig import made

PAD = 99
SHARES = [(1, 24), (1, 8), (2, 4), (3, 2), (4, 6), (24, 1)]  # ranks, micro-batch: all divide steps of 24


def examples(n, labels=torch.int64, token_types=False):
    """Example i has 1 + i % 5 tokens, all of them i, and label i."""
    rows = [[i] * (i % 5 + 1) for i in range(n)]
    return made(
        rows,
        labels=None if labels is None else torch.arange(n).to(labels),
        ids=[f"row {i}" for i in range(n)],
        types=[[i % 2] * len(row) for i, row in enumerate(rows)] if token_types else None,
    )


def loaders(n, world_size, micro_batch_size, seed=3):
    data = examples(n)
    return [Loader(data, 24, micro_batch_size, world_size, rank, seed, PAD) for rank in range(world_size)]


@pytest.mark.parametrize("world_size, micro_batch_size", SHARES)
@pytest.mark.parametrize("n", [61, 96])
def test_draws_belong_to_steps_and_examples_however_they_are_shared(n, world_size, micro_batch_size):
    def drawn(ranks, epoch, step):
        batches = list(itertools.chain(*(rank.step(epoch, step) for rank in ranks)))
        assert all(batch.draw.shape == batch.rows.shape for batch in batches)
        pairs = zip(
            torch.cat([b.index for b in batches]).tolist(),
            torch.cat([b.draw for b in batches]).tolist(),
            strict=True,
        )
        return {place: draw for place, draw in pairs if place >= 0}

    reference, every = loaders(n, 1, 24), []
    for epoch, step in ((0, 0), (0, 1), (1, 0), (1, 1)):
        # A new loader, as in a resumed run, draws the same as a loader that got there step by step.
        found = drawn(loaders(n, world_size, micro_batch_size), epoch, step)
        assert found == drawn(reference, epoch, step)
        every += found.values()
    assert len(set(every)) == len(every) and min(every) >= 0 and max(every) < 2**32
    assert set(drawn(loaders(n, 1, 24, seed=4), 0, 0).values()).isdisjoint(every)


def seen(batches):
    """Return the places in the data set of the example rows, after checking that each row holds its example."""
    places = []
    for batch in batches:
        for row, place in enumerate(batch.index.tolist()):
            if place < 0:
                assert not batch.mask[row].any() and batch.ids[row] == ""
                continue
            assert batch.rows[row] and batch.ids[row] == f"row {place}" and batch.labels[row] == place
            assert batch.input_ids[row][batch.mask[row]].tolist() == [place] * (place % 5 + 1)
            places.append(place)
    return places


@pytest.mark.parametrize("world_size, micro_batch_size", SHARES)
@pytest.mark.parametrize("n", [3, 24, 61, 96])
def test_steps_hold_the_same_rows_however_they_are_shared(n, world_size, micro_batch_size):
    reference = loaders(n, 1, 24)[0]
    ranks = loaders(n, world_size, micro_batch_size)
    assert {rank.steps_per_epoch for rank in ranks} == {reference.steps_per_epoch} == {-(-n // 24)}
    whole = []
    for step in range(reference.steps_per_epoch):
        shares = [rank.step(5, step) for rank in ranks]
        assert {len(share) for share in shares} == {24 // (world_size * micro_batch_size)}
        rows = seen(itertools.chain(*shares))
        assert sorted(rows) == sorted(seen(reference.step(5, step)))
        filled = [int(batch.rows.sum()) for batch in itertools.chain(*shares)]
        assert max(filled) <= micro_batch_size and max(filled) - min(filled) <= 1
        whole += rows
    assert sorted(whole) == list(range(n))


def test_ragged_step_of_one_row_fills_the_other_ranks():
    ranks = loaders(25, 4, 6)
    last = [rank.step(0, 1) for rank in ranks]
    assert [int(batches[0].rows.sum()) for batches in last] == [1, 0, 0, 0]
    filler = last[1][0]
    assert filler.mask.shape == (1, 2) and filler.input_ids.tolist() == [[PAD, PAD]]
    assert filler.labels.tolist() == [NO_LABEL] and filler.index.tolist() == [-1]


def test_order_is_random_access_and_depends_on_epoch_and_seed():
    loader = loaders(61, 1, 8)[0]
    forward = {(epoch, step): seen(loader.step(epoch, step)) for epoch in (0, 1) for step in range(3)}
    for (epoch, step), rows in reversed(forward.items()):
        assert seen(loaders(61, 1, 8)[0].step(epoch, step)) == rows
        assert seen(loader.step(epoch, step)) == rows
    assert forward[0, 0] != forward[1, 0]
    assert seen(loaders(61, 1, 8, seed=4)[0].step(0, 0)) != forward[0, 0]
    assert set(loader.rows(0, 0)) != set(loader.rows(1, 0))


def test_order_is_pinned():
    # A run resumed after an update must go on with the same order.
    assert loaders(61, 1, 8)[0].rows(0, 0)[:6].tolist() == [22, 0, 3, 50, 38, 2]


def test_rows_of_like_length_share_a_micro_batch():
    batches = loaders(96, 1, 4)[0].step(0, 0)
    widths = [batch.input_ids.shape[1] for batch in batches]
    assert widths == sorted(widths) and widths[0] < widths[-1]


def test_steps_of_like_length():
    data, size = examples(2500), 24
    plain, grouped = (Loader(data, size, 24, 1, 0, 3, PAD, by_length=grouped) for grouped in (False, True))
    orders = [[loader.rows(0, k) for k in range(loader.steps_per_epoch)] for loader in (plain, grouped)]
    assert sorted(np.concatenate(orders[1])) == list(range(2500))
    assert [len(rows) for rows in orders[0]] == [len(rows) for rows in orders[1]]
    lengths = data.lengths.numpy()
    spread = [np.mean([np.ptp(lengths[rows]) for rows in order]) for order in orders]
    assert spread[1] < spread[0] / 4
    # Short and long steps come in random order, and another epoch has other steps.
    means = [lengths[rows].mean() for rows in orders[1]]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.4
    assert not np.array_equal(grouped.rows(1, 0), orders[1][0])


def test_step_outside_the_epoch():
    with pytest.raises(IndexError, match="step 3 of an epoch of 3 steps"):
        loaders(61, 1, 8)[0].step(0, 3)


def test_indivisible_batch():
    with pytest.raises(UserError, match=r"train.batch_size: got 24, expected a multiple of 20"):
        Loader(examples(61), 24, 4, 5, 0, 0, PAD)


@pytest.mark.parametrize("world_size, micro_batch_size", SHARES)
@pytest.mark.parametrize("n", [1, 24, 61])
def test_evaluation_sees_each_example_once_and_restores_order(n, world_size, micro_batch_size):
    data = examples(n)
    shares = [
        list(evaluation_batches(data, micro_batch_size, world_size, rank, PAD)) for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    batches = list(itertools.chain(*shares))
    assert sorted(seen(batches)) == list(range(n))
    assert all(len(batch.index) <= micro_batch_size for batch in batches)
    index = torch.cat([batch.index for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    assert restore(labels, index).tolist() == list(range(n))
    assert restore(labels[:, None].expand(-1, 3), index).shape == (n, 3)


def test_collate_by_hand():
    batch = collate(examples(9, token_types=True), [2, 5, 3], PAD)
    assert batch.input_ids.tolist() == [[2, 2, 2, PAD], [5, PAD, PAD, PAD], [3, 3, 3, 3]]
    assert batch.mask.int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert batch.token_types.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert batch.input_ids.dtype == batch.token_types.dtype == batch.labels.dtype == torch.int64
    assert batch.mask.dtype == torch.bool
    assert batch.ids == ("row 2", "row 5", "row 3")


@pytest.mark.parametrize("labels, filler", [(torch.float32, [-100.0]), (None, [[-100, -100]])])
def test_collate_labels(labels, filler):
    data = examples(9, labels)
    batch = collate(data, [1, 0], PAD)
    assert batch.labels.tolist() == ([1.0, 0.0] if labels else [[1, 1], [0, NO_LABEL]])
    empty = collate(data, [], PAD)
    assert empty.labels.tolist() == filler and empty.labels.dtype == batch.labels.dtype


def test_moving_a_batch_keeps_every_field():
    batch = collate(examples(9, token_types=True), [2, 5], PAD)
    moved = batch.to("meta")
    tensors = (moved.input_ids, moved.mask, moved.labels, moved.token_types, moved.index)
    assert all(tensor.device.type == "meta" for tensor in tensors) and moved.ids == batch.ids
