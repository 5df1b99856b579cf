"""(seed, epoch, example) alone decides which tokens are hidden."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from dsdistill.config.errors import UserError
from dsdistill.data import NO_LABEL, Examples, Loader, collate, evaluation_batches
from dsdistill.data.masking import masking
from tests.data.rig import made

MASK, SPECIAL = 4, {0, 1, 2, 3, 4}


@pytest.fixture
def tokenizer(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir)


def examples(hide, lengths=(30, 3, 12, 2, 21, 8, 17)) -> Examples:
    """Return examples [CLS] words [SEP]; the example of 2 tokens has no word."""
    rng = np.random.default_rng(0)
    rows = [[2, *rng.integers(5, 30, n - 2), 3] for n in lengths]
    return made(rows, masking=hide)


def test_shares(tokenizer):
    hide = masking(tokenizer, 0.15, 0.15, seed=0)
    tokens = np.array([2, *np.random.default_rng(1).integers(5, 30, 20000), 3], dtype=np.int32)
    seen, labels = hide.draw(tokens, 0, 0)
    chosen = labels != NO_LABEL
    assert chosen.sum() == 3000 and (labels[chosen] == tokens[chosen]).all()
    assert not chosen[[0, -1]].any() and (seen[[0, -1]] == tokens[[0, -1]]).all()
    assert (seen[chosen] == MASK).mean() == pytest.approx(0.8, abs=0.03)
    assert (seen[chosen] == tokens[chosen]).mean() == pytest.approx(0.1 + 0.1 / 25, abs=0.02)
    assert not np.isin(seen[chosen & (seen != MASK)], list(SPECIAL)).any()
    hidden = ~chosen & (seen != tokens)  # those of random_masked, which nobody predicts
    assert hidden.sum() == 3000 and (seen[hidden] == MASK).all()


def test_a_short_example_predicts_one_token_and_an_empty_one_none(tokenizer):
    hide = masking(tokenizer, 0.15, 0.0, seed=0)
    assert (hide.draw(np.array([2, 7, 3]), 0, 0)[1] != NO_LABEL).sum() == 1
    seen, labels = hide.draw(np.array([2, 3]), 0, 0)
    assert seen.tolist() == [2, 3] and (labels == NO_LABEL).all()


def test_each_epoch_draws_anew_and_neither_ranks_nor_micro_batches_matter(tokenizer):
    data = examples(masking(tokenizer, 0.15, 0.0, seed=5))

    def drawn(world_size, micro_batch_size, epoch):
        found = {}
        for rank in range(world_size):
            loader = Loader(data, 4, micro_batch_size, world_size, rank, seed=5, pad_id=0)
            for step in range(loader.steps_per_epoch):
                for batch in loader.step(epoch, step):
                    for name, ids, labels, mask in zip(
                        batch.ids, batch.input_ids, batch.labels, batch.mask, strict=True
                    ):
                        found[name] = (ids[mask].tolist(), labels[mask].tolist())
        return {name: found[name] for name in data.given_ids}

    first = drawn(1, 4, 0)
    assert first == drawn(2, 1, 0) == drawn(2, 2, 0)
    assert first != drawn(1, 4, 1)


def test_the_dev_set_has_one_draw(tokenizer):
    batches = [
        list(evaluation_batches(examples(masking(tokenizer, 0.15, 0.0, seed)), 3, 1, 0, 0)) for seed in (0, 1)
    ]
    for left, right in zip(*batches, strict=True):
        assert torch.equal(left.input_ids, right.input_ids) and torch.equal(left.labels, right.labels)


def test_hidden_tokens_are_still_what_a_causal_model_predicts(tokenizer):
    data = examples(masking(tokenizer, 0.0, 0.15, seed=0))
    batch, plain = (collate(of, [0, 2], 0, epoch=0) for of in (data, replace(data, masking=None)))
    assert torch.equal(batch.labels, plain.labels)
    assert ((batch.input_ids != plain.input_ids).sum(1) == torch.tensor([4, 2])).all()


def test_without_a_mask_token_it_is_refused(tokenizer):
    tokenizer.mask_token = None
    with pytest.raises(UserError, match="without a mask token"):
        masking(tokenizer, 0.15, 0.0, seed=0)
