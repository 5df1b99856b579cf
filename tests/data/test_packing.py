import gzip
import json
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from dsdistill.data.batch import NO_LABEL, PHRASE, WORD
from dsdistill.data.packing import Document, best_fit, packed_batch


def room(lengths, order, starts, capacity):
    """Return the free room of each block."""
    return capacity - np.add.reduceat(np.asarray(lengths)[order], starts[:-1])


def plain(lengths: list[int], capacity: int) -> list[int]:
    """Return the free rooms after best fit decreasing by its definition, sorted."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [r for r in rooms if r >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return sorted(rooms)


def test_by_hand():
    """Blocks of 7 are 6, 5 + 2 and 4 + 3.

    Each block is in the order of the set, blocks are ordered by their first documents.
    """
    order, starts = best_fit(np.array([2, 4, 6, 5, 3]), 7)
    assert order.tolist() == [0, 3, 1, 4, 2] and starts.tolist() == [0, 2, 4, 5]


@pytest.mark.parametrize("seed", range(20))
def test_it_is_best_fit_decreasing(seed):
    chance = np.random.default_rng(seed)
    capacity = int(chance.integers(1, 80))
    lengths = chance.integers(1, capacity + 1, 150)
    order, starts = best_fit(lengths, capacity)
    assert np.array_equal(np.sort(order), np.arange(150))
    assert sorted(room(lengths, order, starts, capacity).tolist()) == plain(lengths.tolist(), capacity)
    blocks = [order[a:b] for a, b in pairwise(starts)]
    assert all((np.diff(block) > 0).all() for block in blocks)
    assert (np.diff([block[0] for block in blocks]) > 0).all()


@pytest.mark.parametrize(
    ("lengths", "expected"), [([], 0), ([8], 1), ([8] * 5, 5), ([1] * 9, 2), ([4, 4, 4], 2)], ids=str
)
def test_extremes(lengths, expected):
    order, starts = best_fit(np.array(lengths, dtype=int), 8)
    assert len(order) == len(lengths) and len(starts) == expected + 1 and starts[-1] == len(lengths)


@pytest.mark.parametrize("lengths", [[3, 9], [0, 3]], ids=str)
def test_a_length_that_no_block_holds_is_refused(lengths):
    with pytest.raises(ValueError, match="expected 1 to 8 tokens"):
        best_fit(np.array(lengths), 8)


def test_a_million_documents_take_seconds():
    lengths = np.random.default_rng(0).lognormal(5.5, 1.0, 1_000_000).clip(1, 4096).astype(int)
    started = time.process_time()
    order, starts = best_fit(lengths, 4096)
    assert time.process_time() - started < 10  # it takes 0.3
    assert room(lengths, order, starts, 4096).min() >= 0


@pytest.mark.parametrize("capacity", [256, 1024])
@pytest.mark.parametrize("name", ["multi30k_en_de", "novels"])
def test_real_documents_leave_little_room(name, capacity, real):
    """Documents are captions and paragraphs of novels, cut if too long; a token is a word or the end."""
    with gzip.open(real / name / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    if name == "novels":
        texts = [text for row in rows for text in row["text"].split("\n\n") if text.strip()]
    else:
        texts = [row["source"] for row in rows]
    lengths = np.array([len(text.split()) + 1 for text in texts]).clip(1, capacity)
    assert len(lengths) > 10_000 and lengths.std() > 1
    order, starts = best_fit(lengths, capacity)
    filler = room(lengths, order, starts, capacity)
    assert filler.min() >= 0 and filler.sum() <= 0.01 * capacity * len(filler)


def test_a_batch_by_hand():
    blocks = [
        [
            Document(
                np.array([5, 6, 7], np.int32), spans=np.array([[0, 2, WORD], [1, 3, PHRASE]]), id="a", index=4
            ),
            Document(np.array([8], np.int32), id="b", index=0),
        ],
        [Document(np.array([9, 3], np.int32), np.array([NO_LABEL, 3]), np.array([[1, 2, WORD]]), "c", 2)],
    ]
    batch = packed_batch(blocks, 1, spans=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 3, 1, 1]]
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.labels.tolist() == [[5, 6, 7, 8], [NO_LABEL, 3, NO_LABEL, NO_LABEL]]
    assert batch.segments.tolist() == [[0, 0, 0, 1], [0, 0, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0], [0, 1, 0, 1]]
    assert batch.places.tolist() == [[0, 1, 2], [3, -1, -1], [4, 5, -1]]
    assert batch.counted.tolist() == [1, 2, 5]
    assert batch.spans.tolist() == [[0, 0, 2, WORD], [0, 1, 3, PHRASE], [1, 1, 2, WORD]]
    assert batch.ids == ("a", "b", "c") and batch.index.tolist() == [4, 0, 2]
    assert batch.documents.tolist() == [True] * 3 and batch.token_chance is None
    rows = batch.unpacked
    assert rows.input_ids.tolist() == [[5, 6, 7], [8, 0, 0], [9, 3, 0]]
    assert rows.spans.tolist() == [[0, 0, 2, WORD], [0, 1, 3, PHRASE], [2, 1, 2, WORD]]
    assert rows.ids == batch.ids and rows.unpacked is rows and rows.index is batch.index


def test_draws_of_documents_reach_their_tokens():
    blocks = [[Document(np.arange(2)), Document(np.arange(1))], [Document(np.arange(1))]]
    batch = replace(packed_batch(blocks, 0), chance=torch.tensor([0.25, 0.5, 0.75]))
    assert batch.token_chance.tolist() == [[0.25, 0.25, 0.5], [0.75, 1.0, 1.0]]
    assert batch.unpacked.token_chance.tolist() == [[0.25], [0.5], [0.75]]


@pytest.mark.parametrize("blocks", [[], [()], [(), ()]], ids=str)
def test_filler_alone(blocks):
    batch = packed_batch(blocks, 1, spans=True)
    assert batch.input_ids.tolist() == [[1, 1]] * max(1, len(blocks)) and not batch.mask.any()
    assert batch.position_ids[0].tolist() == [0, 1] and batch.places.tolist() == [[-1]]
    assert not batch.documents.any() and len(batch.documents) == 1 and not len(batch.counted)
    assert batch.ids == ("",) and batch.index.tolist() == [-1] and batch.spans.shape == (0, 4)
    assert not batch.unpacked.mask.any() and batch.unpacked.labels.tolist() == [[NO_LABEL]]


def test_one_token_alone_is_two_wide():
    batch = packed_batch([[Document(np.array([7]))]], 0)
    assert batch.input_ids.tolist() == [[7, 0]] and batch.segments.tolist() == [[0, 1]]
    assert batch.spans is None and batch.places.tolist() == [[0]]
