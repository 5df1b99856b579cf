"""Rows are held out of a train set so that no text of theirs is trained on, neither in whole nor in part."""

import copy
import logging
import random

import numpy as np
import pytest

from dsdistill.config.errors import UserError
from dsdistill.config.load import make_config
from dsdistill.config.schema import Data as Section
from dsdistill.data.examples import TextPairs
from dsdistill.data.holdout import LONGEST, held_out
from tests.data.rig import load, made

BEGIN, END = 1, 2  # special tokens of the examples made by hand
SPECIAL = {BEGIN, END}


def treebank(sentences=60, seed=0):
    """Return rows like those of a treebank: sentences of 4 to 12 tokens, and phrases of them, in random order."""
    rng = random.Random(seed)
    rows = []
    for _ in range(sentences):
        words = [rng.randint(10, 60) for _ in range(rng.randint(4, 12))]
        rows.append(words)
        for _ in range(rng.randint(1, 8)):
            first = rng.randrange(len(words))
            rows.append(words[first : rng.randint(first + 1, len(words))])
    rng.shuffle(rows)
    return rows


def examples(rows):
    return made([[BEGIN, *row, END] for row in rows], labels=np.arange(len(rows)))


def words_of(examples):
    return [tuple(examples.tokens(row)[1:-1].tolist()) for row in range(len(examples))]


def lies_in(inner, outer):
    return any(outer[at : at + len(inner)] == inner for at in range(len(outer) - len(inner) + 1))


@pytest.mark.parametrize("seed", range(5))
def test_no_text_lies_in_a_text_of_the_other_side(seed):
    """Check every pair by the definition, and that no row is left out without a reason."""
    rows = [tuple(row) for row in treebank(seed=seed)]
    rest, held = held_out(examples(rows), 40, SPECIAL)
    ours, theirs = words_of(held), words_of(rest)
    assert len(ours) == 40 and len(theirs) > 100
    assert not any(lies_in(a, b) or lies_in(b, a) for a in ours for b in theirs)
    gone = set(range(len(rows))) - {*held.labels.tolist(), *rest.labels.tolist()}
    sentences = {text for text in rows if not any(text != other and lies_in(text, other) for other in rows)}
    kept = sentences & set(theirs)
    drawn = sentences - kept
    both = [row for row in gone if any(lies_in(rows[row], text) for text in kept)]
    for row in gone:
        assert any(lies_in(rows[row], text) for text in drawn)
    assert len(gone) - len(both) < 10  # the others are surplus rows of the last sentence


def test_rows_stay_in_their_order_with_their_labels():
    rows = treebank()
    for part in held_out(examples(rows), 30, SPECIAL):
        assert part.labels.tolist() == sorted(part.labels.tolist())
        assert words_of(part) == [tuple(rows[label]) for label in part.labels.tolist()]


def test_by_hand():
    """Two sentences, a phrase of each, one of both, and a copy: one sentence and its own rows are held out."""
    first, second = [11, 12, 13, 14], [15, 12, 13, 16]
    rows = [first, second, [11, 12], [13, 16], [12, 13], first]
    rest, held = held_out(examples(rows), 2, SPECIAL)
    found = {tuple(of.labels.tolist()) for of in (rest, held)}
    # The draw decides which sentence. The first one has three rows, and two are wanted.
    assert found in ({(1, 3), (0, 2)}, {(0, 2, 5), (1, 3)})


def test_equal_texts_alone_stay_together_without_containment():
    rows = [[11, 12, 13], [11, 12], [11, 12, 13], [14]] * 2
    rest, held = held_out(examples(rows), 2, None)
    assert not set(words_of(rest)) & set(words_of(held)) and len(rest) + len(held) in (7, 8, 6)
    pairs = TextPairs(made([[11], [12], [11], [13], [11], [12], [14], [15]]))
    rest, held = held_out(pairs, 1, None)
    assert isinstance(held, TextPairs) and len(held) == 1

    def of(part):
        return {tuple(part.texts.tokens(2 * i + j).item() for j in (0, 1)) for i in range(len(part))}

    assert not of(rest) & of(held) and of(rest) | of(held) == {(11, 12), (11, 13), (14, 15)}


def test_long_texts_are_not_searched():
    long = list(range(10, 11 + LONGEST))
    rest, held = held_out(examples([long, long[:-1], [500]]), 1, SPECIAL)
    assert len(rest) == 2 and len(held) == 1


@pytest.mark.parametrize("count", [6, 7])
def test_some_must_be_left(count):
    with pytest.raises(UserError, match=rf"data\.holdout: got {count} of 6 train examples, expected fewer"):
        held_out(examples([[i] for i in range(10, 16)]), count, SPECIAL)


@pytest.fixture
def section(tmp_path):
    """Return a function that makes a section of 12 rows to train on and 2 to score."""
    lines = [
        f"{text}\t{i % 2}" for i, text in enumerate(["the sum of a row", "the sum", "a list", "mean"] * 3)
    ]
    lines += ["of a row\t1", "a file is open\t0"]
    (tmp_path / "train.tsv").write_text("\n".join(["text\tlabel", *lines, ""]))
    (tmp_path / "dev.tsv").write_text("text\tlabel\nthe node\t0\na graph\t1\n")
    given = {"source": "files", "root": str(tmp_path), "train": "train.tsv", "dev": "dev.tsv"}
    return lambda **settings: Section(**given | {"cache": str(tmp_path / "cache")} | settings)


def test_the_set_is_a_dev_set_and_the_limit_is_for_the_rest(section, tokenizer, caplog):
    with caplog.at_level(logging.INFO, "dsdistill"):
        found = load(section(holdout=4), "classification", tokenizer)
    assert list(found.devs) == ["", "holdout"] and len(found.devs["holdout"]) == 4 and len(found.dev) == 2
    assert "holdout: 4 of 14 train examples" in caplog.text
    assert {*found.train.given_ids}.isdisjoint(found.devs["holdout"].given_ids)
    less = load(section(holdout=4, max_train=3), "classification", tokenizer, seed=5)
    assert less.devs["holdout"].given_ids == found.devs["holdout"].given_ids  # the same for every seed
    assert less.train.given_ids == found.train.given_ids[:3]


@pytest.mark.parametrize("task", ["masked_lm", "causal_lm", "embedding"])
def test_other_tasks(section, tokenizer, task):
    if task == "masked_lm":
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.mask_token = "[UNK]"
    found = load(section(holdout=3, label=None), task, tokenizer)
    assert len(found.devs["holdout"]) == 3
    assert (found.devs["holdout"].masking is not None) == (task == "masked_lm")


def test_refusals(settings):
    data = settings["data"]
    with pytest.raises(UserError, match=r"data\.dev: got a set named holdout together with data.holdout"):
        make_config(settings | {"data": data | {"holdout": 5, "dev": {"holdout": "dev"}}})
    parts = [{"train": "train"}, {"train": "dev"}]
    with pytest.raises(UserError, match=r"data\.holdout: got 5 with several sources in data.train"):
        make_config(settings | {"data": data | {"holdout": 5, "train": parts}})
