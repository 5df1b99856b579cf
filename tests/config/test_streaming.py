"""A run that streams its train set refuses settings that need the whole set."""

import re

import pytest

from dsdistill.config import UserError
from dsdistill.config.load import make_config
from tests.conftest import merge

STREAMED = {
    "task": "causal_lm",
    "data.source": "some/set",
    "data.train": "train",
    "data.dev": "validation",
    "data.streaming": True,
    "train.steps": 10,
    "train.epochs": None,
}


@pytest.mark.parametrize("changes", [{}, {"task": "masked_lm"}, {"data.sampler": "random_masked"}])
def test_what_runs(settings, changes):
    assert make_config(merge(settings, STREAMED | changes)).data.streaming


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.steps": None}, "data.streaming: got true without train.steps"),
        ({"data.source": "files"}, "data.streaming: got true with data.source files"),
        ({"data.source": "docstrings"}, "data.streaming: got true with data.source docstrings"),
        ({"data.root": "here"}, "data.streaming: got true with data.source some/set and data.root"),
        ({"task": "classification"}, "data.streaming: got true with task classification"),
        ({"data.train": [{"subset": "a"}, {"subset": "b"}]}, "data.streaming: got true with several sources"),
        ({"data.sampler": "entropy"}, "data.sampler: got entropy with data.streaming true"),
        ({"data.fraction": 0.5}, "data.fraction: got 0.5 with data.streaming true"),
        ({"data.max_train": 100}, "data.max_train: got 100 with data.streaming true"),
        ({"data.train_tokenizer": 500}, "data.train_tokenizer: got 500 with data.streaming true"),
        ({"train.group_by_length": True}, "train.group_by_length: got true with data.streaming true"),
        ({"run.evaluate_every": "epoch"}, "run.evaluate_every: got epoch with data.streaming true"),
    ],
)
def test_what_is_refused(settings, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make_config(merge(settings, STREAMED | changes))
