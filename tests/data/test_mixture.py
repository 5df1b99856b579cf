"""Examples of several sources: shares, order, resumption, losses by source."""

import numpy as np
import pytest
import torch

from dsdistill.alignment.by_source import SourceLosses
from dsdistill.alignment.terms import TERMS, Pair, Shape
from dsdistill.config import UserError
from dsdistill.config.load import make_config
from dsdistill.config.terms import Task
from dsdistill.data import Ahead, Loader, Mixture, Packed, collate
from dsdistill.data.packing import best_fit
from dsdistill.data.sources import parts
from dsdistill.models.trace import Trace
from tests.data.rig import made


def mixture(sizes=(50, 30, 20), weights=(1.0, 3.0, 6.0)) -> Mixture:
    """Return a mixture; examples of source s hold only the token s."""
    sources = tuple(made([[source] * (2 + i % 4) for i in range(size)]) for source, size in enumerate(sizes))
    return Mixture(sources, tuple("abc"[: len(sizes)]), weights)


@pytest.mark.parametrize("weights", [(1.0, 3.0, 6.0), (1.0, 1.0, 1.0), (0.001, 1.0, 1.0)])
def test_every_run_of_draws_has_the_shares(weights):
    mixed, shares = mixture(weights=weights), np.array(weights) / sum(weights)
    drawn = np.concatenate([mixed.order(3, epoch) for epoch in range(5)])
    owners = np.searchsorted(mixed.bounds, drawn, side="right") - 1
    for start, count in ((0, 500), (0, 40), (137, 60)):
        found = np.bincount(owners[start : start + count], minlength=3)
        assert np.abs(found - shares * count).max() <= 3


def test_a_source_is_gone_through_before_it_comes_again():
    mixed = mixture()
    drawn = np.concatenate([mixed.order(3, epoch) for epoch in range(6)])
    for source, size in enumerate((50, 30, 20)):
        first, past = mixed.bounds[source], mixed.bounds[source + 1]
        own = drawn[(drawn >= first) & (drawn < past)] - first
        for turn in range(len(own) // size):
            assert sorted(own[turn * size : (turn + 1) * size]) == list(range(size))
        assert not len(own) >= 2 * size or own[:size].tolist() != own[size : 2 * size].tolist()


def test_an_epoch_depends_on_seed_and_number_alone():
    assert mixture().order(3, 4).tolist() == mixture().order(3, 4).tolist()
    assert mixture().order(3, 4).tolist() != mixture().order(4, 4).tolist()
    assert mixture().order(3, 4).tolist() != mixture().order(3, 5).tolist()


def test_other_weights_from_a_draw_on():
    """Earlier draws stay the same, each part of the run has its shares, and a source continues where it stopped."""
    mixed, schedule = mixture(), [(130, (6.0, 3.0, 1.0)), (210, (0.0, 1.0, 1.0))]
    plain = np.concatenate([mixed.order(3, epoch) for epoch in range(3)])
    drawn = np.concatenate([mixed.order(3, epoch, schedule) for epoch in range(3)])
    assert drawn[:130].tolist() == plain[:130].tolist()
    owners = np.searchsorted(mixed.bounds, drawn, side="right") - 1
    for start, end, weights in ((0, 130, mixed.weights), (130, 210, (6, 3, 1)), (210, 300, (0, 1, 1))):
        shares = np.array(weights) / sum(weights)
        found = np.bincount(owners[start:end], minlength=3)
        assert np.abs(found - shares * (end - start)).max() <= 3
    for source, size in enumerate((50, 30, 20)):
        own = (drawn - mixed.bounds[source])[owners == source]
        for turn in range(len(own) // size):
            assert sorted(own[turn * size : (turn + 1) * size]) == list(range(size))


def test_a_loader_and_its_thread_take_other_weights():
    """Batches that the thread has already made are made again."""
    mixed, weights = mixture(), (0.0, 0.0, 1.0)
    ahead = Ahead(Loader(mixed, 8, 8, 1, 0, 3, 0), 40, pinned=False)
    for step in range(14):  # in the second epoch of 13 steps
        ahead.step(step)
    ahead.reweigh(14, weights)
    sources = [batch.source.unique().tolist() for step in range(14, 30) for batch in ahead.step(step)]
    ahead.close()
    assert sources == [[2]] * 16
    assert [batch.source.unique().tolist() for batch in Loader(mixed, 8, 8, 1, 0, 3, 0).step(1, 1)] != [[2]]


@pytest.mark.parametrize("ranks", [1, 2])
def test_batches_tell_their_sources(ranks):
    mixed = mixture()
    rows = []
    for rank in range(ranks):
        for step in range(3):
            for batch in Loader(mixed, 8, 2, ranks, rank, 3, 0).step(1, step):
                assert batch.source.tolist() == batch.input_ids[:, 0].tolist()
                rows += batch.index.tolist()
    assert sorted(rows) == sorted(mixed.order(3, 1)[:24])
    empty = collate(mixed, [], 0)
    assert empty.source.tolist() == [-1] and not empty.mask.any()


def test_packed_sources():
    mixed = mixture()
    packed = Mixture(
        tuple(Packed(part, *best_fit(part.lengths.numpy(), 12)) for part in mixed.parts),
        *(mixed.names, mixed.weights),
    )
    batch = collate(packed, [0, len(packed) - 1], 0)
    valid = batch.mask.flatten()
    assert batch.source[batch.owners[valid]].tolist() == batch.input_ids.flatten()[valid].tolist()
    assert len(set(batch.index.tolist())) == len(batch.index)


def test_losses_by_source_by_hand():
    """The cross-entropy of each source's tokens is reported separately; together they are the task's loss."""
    torch.manual_seed(0)
    mixed = mixture(sizes=(4, 4), weights=(1.0, 1.0))
    pair = Pair(Shape(2, 8, 2, 2, 4, 16), None, "causal_lm", "auto", 16)
    for examples in (
        mixed,
        Mixture(
            tuple(Packed(part, *best_fit(part.lengths.numpy(), 9)) for part in mixed.parts),
            mixed.names,
            mixed.weights,
        ),
    ):
        batch = collate(examples, [0, 1, len(examples) - 1], 0)
        states, head = torch.randn(*batch.input_ids.shape, 8), torch.randn(16, 8)
        trace = Trace(output=states, head=head)
        watch = SourceLosses(pair, 2)
        watch.add(trace, batch)
        losses = -(states @ head.T).log_softmax(-1)
        expected = torch.zeros(2, 2, dtype=torch.float64)
        width = batch.input_ids.shape[1]
        for place in batch.counted.tolist():
            row, column = divmod(place, width)
            token = int(batch.input_ids[row, column])  # the token is the source's number
            expected[token] += torch.tensor([losses[row, column - 1, token], 1.0], dtype=torch.float64)
        torch.testing.assert_close(watch.sums, expected, rtol=1e-5, atol=1e-5)
        term = TERMS["task"](Task(), pair)
        torch.testing.assert_close(watch.sums[:, 0].sum().float(), term.sums(trace, None, batch)[0])


def test_losses_of_classes_by_source():
    pair = Pair(Shape(2, 8, 2, 2, 4, 16), None, "classification", "auto", 16)
    mixed = Mixture((made([[1], [2]], labels=[0, 1]), made([[3]], labels=[1])), ("a", "b"), (1.0, 1.0))
    batch = collate(mixed, [0, 1, 2], 0)
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    watch = SourceLosses(pair, 2)
    watch.add(Trace(logits=logits), batch)
    each = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none").double()
    torch.testing.assert_close(
        watch.sums, torch.tensor([[each[0] + each[1], 2.0], [each[2], 1.0]], dtype=torch.float64)
    )


def test_batches_made_ahead_are_those_of_the_loader():
    loader = Loader(mixture(), 8, 4, 1, 0, 3, 0)
    ahead = Ahead(Loader(mixture(), 8, 4, 1, 0, 3, 0), end=30, pinned=False)
    for step in (0, 1, 2, 14, 15, 29):  # a resume may ask for any step
        wanted = loader.step(*divmod(step, loader.steps_per_epoch))
        for one, other in zip(ahead.step(step), wanted, strict=True):
            assert torch.equal(one.input_ids, other.input_ids) and one.ids == other.ids
    ahead.close()


def test_a_failure_on_the_thread_is_raised_by_its_step():
    loader = Loader(mixture(), 8, 4, 1, 0, 3, 0)
    ahead = Ahead(loader, end=30, pinned=False)
    ahead.step(0)
    loader.examples = None
    ahead._next = None
    with pytest.raises(TypeError):
        ahead.step(20)
    ahead.close()


BASE = {"task": "causal_lm", "student": {"path": "x"}}


def test_parts_take_over_what_they_do_not_say():
    data = make_config(
        BASE
        | {
            "data": {
                "source": "files",
                "root": "r",
                "text": ["q", "a"],
                "dev": "d.jsonl",
                "train": [
                    {"train": "a.jsonl", "weight": 2.0},
                    {"source": "org/set", "subset": "s", "messages": "m"},
                ],
            }
        }
    ).data
    (first, weight, one), (second, other, two) = parts(data)
    assert (first, weight, one.train, one.text, one.root) == ("a.jsonl", 2.0, "a.jsonl", ("q", "a"), "r")
    assert (second, other, two.source, two.train, two.messages) == ("s", 1.0, "org/set", "train", "m")


@pytest.mark.parametrize(
    "data, message",
    [
        ({"train": [{"weight": 1.0}]}, r"data\.train\.0: got neither source, subset nor train"),
        (
            {"source": "files", "train": [{"source": "files"}]},
            r"data\.train\.0\.train: got nothing with source files",
        ),
        ({"train": [{"train": "a", "weight": 0.0}]}, r"data\.train.*weight: got 0\.0"),
        (
            {"source": "files", "train": [{"train": "a"}], "sampler": "entropy"},
            r"data\.sampler: got entropy with several",
        ),
        (
            {"train": [{"source": "x/y", "train": ["a", "b"]}]},
            r"data\.train\.0\.train: got a list with source x/y",
        ),
    ],
)
def test_refusals(data, message):
    with pytest.raises(UserError, match=message):
        make_config(BASE | {"data": data})
