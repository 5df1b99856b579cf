import pytest
import torch

from dsdistill.config.errors import UserError
from dsdistill.config.schema import Data as Section
from dsdistill.data import Rows, load_data, tokenize

A, CLS, SEP = 4, 2, 3  # ids: a is 4, b is 5, …


def rows(*texts, labels=None, limit=None):
    return Rows("here", [t if isinstance(t, tuple) else (t,) for t in texts], labels, ["x", "y", "z"], limit)


def lists(examples, field="tokens"):
    flat = getattr(examples, field)
    return [flat[a:b].tolist() for a, b in zip(examples.starts, examples.starts[1:], strict=False)]


def test_single_texts(tokenizer):
    examples = tokenize(rows("ab", "abcdef", labels=[1, 0]), tokenizer, 5, "classification")
    assert lists(examples) == [[CLS, A, A + 1, SEP], [CLS, A, A + 1, A + 2, SEP]]
    assert examples.labels.tolist() == [1, 0] and examples.labels.dtype == torch.int64
    assert len(examples) == 2 and examples.lengths.tolist() == [4, 5]


def test_pairs_are_told_apart_and_the_longer_is_cut(tokenizer):
    examples = tokenize(rows(("a", "bcdef"), labels=[2.5]), tokenizer, 6, "regression")
    assert lists(examples) == [[CLS, A, SEP, A + 1, A + 2, SEP]]
    assert lists(examples, "token_types") == [[0, 0, 0, 1, 1, 1]]
    assert examples.labels.tolist() == [2.5] and examples.labels.dtype == torch.float32


def test_more_rows_than_one_call_of_the_tokenizer(tokenizer, monkeypatch):
    whole = tokenize(rows("ab", "c", "def", labels=[0, 1, 2]), tokenizer, 9, "classification")
    monkeypatch.setattr("dsdistill.data.tokens.AT_ONCE", 2)
    parts = tokenize(rows("ab", "c", "def", labels=[0, 1, 2]), tokenizer, 9, "classification")
    assert lists(parts) == lists(whole) and lists(parts, "token_types") == lists(whole, "token_types")


def test_documents_are_packed_with_a_separator_between(tokenizer):
    examples = tokenize(rows("abc", "d.e", "fghi"), tokenizer, 4, "causal_lm")
    stop = A + 38
    assert lists(examples) == [
        [A, A + 1, A + 2, SEP],
        [A + 3, stop, A + 4, SEP],
        [A + 5, A + 6, A + 7, A + 8],
    ]
    assert examples.labels is None and list(examples.ids) == ["0", "1", "2"]


@pytest.mark.parametrize(
    "text, lengths", [("abcde", [4]), ("abcdef", [4, 2]), ("ab", [2]), ("abcdefgh", [4, 4])]
)
def test_remainder(tokenizer, text, lengths):
    assert tokenize(rows(text), tokenizer, 4, "causal_lm").lengths.tolist() == lengths


def test_limit_counts_blocks(tokenizer, monkeypatch):
    monkeypatch.setattr("dsdistill.data.tokens.AT_ONCE", 1)
    examples = tokenize(rows("abcd", "abcd", "abcd", limit=2), tokenizer, 4, "causal_lm")
    assert lists(examples) == [[A, A + 1, A + 2, A + 3], [SEP, A, A + 1, A + 2]]


@pytest.mark.parametrize(
    "given, max_length, task, message",
    [
        (rows(("a", "b"), labels=[0]), 4, "classification", "data.max_length: got 4, expected above 4"),
        (rows("a"), 4, "causal_lm", "here: got a text of 1 tokens, expected at least 2"),
    ],
)
def test_refusals(tokenizer, given, max_length, task, message):
    with pytest.raises(UserError, match=message):
        tokenize(given, tokenizer, max_length, task)


def test_row_without_tokens(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer._tokenizer, "post_processor", None)  # nothing is added, as by GPT-2
    with pytest.raises(UserError, match="here: got row 'y' without a token"):
        tokenize(rows("a", " ", labels=[0, 1]), tokenizer, 4, "classification")


def test_load_real_sets(tokenizer, real):
    section = Section(source="files", root=str(real), train="stsb/train.tsv.gz", dev="stsb/dev.tsv.gz",
                      text=("text_a", "text_b"), max_length=32, max_train=500, max_dev=20)  # fmt: skip
    data = load_data(section, "regression", tokenizer)
    assert (len(data.train), len(data.dev), data.labels) == (500, 20, ())
    assert data.train.lengths.max() == 32 and data.dev.labels[:2].tolist() == [5.0, pytest.approx(2.4)]
    section = Section(source="files", root=str(real), train="wikitext2/dev.txt.gz", dev="zhgeneral/dev.jsonl.gz",
                      text=("answer",), max_length=64, max_train=100)  # fmt: skip
    data = load_data(section, "causal_lm", tokenizer)
    assert data.train.lengths.tolist() == [64] * 100
    assert set(data.dev.lengths[:-1].tolist()) == {64} and data.dev.lengths[-1] >= 2
