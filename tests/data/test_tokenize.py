import pytest
import torch

from dsdistill.config.errors import UserError
from dsdistill.config.schema import Data as Section
from tests.data.rig import lists, load, tokenize

A, CLS, SEP = 4, 2, 3  # ids: a is 4, b is 5, …


def test_single_texts(tokenizer):
    examples = tokenize(["ab", "abcdef"], tokenizer, 5, "classification", labels=[1, 0])
    assert lists(examples) == [[CLS, A, A + 1, SEP], [CLS, A, A + 1, A + 2, SEP]]
    assert examples.labels.tolist() == [1, 0] and examples.labels.dtype == torch.int64
    assert len(examples) == 2 and examples.lengths.tolist() == [4, 5]


def test_pairs_are_told_apart_and_the_longer_is_cut(tokenizer):
    examples = tokenize([("a", "bcdef")], tokenizer, 6, "regression", labels=[2.5])
    assert lists(examples) == [[CLS, A, SEP, A + 1, A + 2, SEP]]
    assert [examples.types(i).tolist() for i in range(len(examples))] == [[0, 0, 0, 1, 1, 1]]
    assert examples.labels.tolist() == [2.5] and examples.labels.dtype == torch.float32


def test_more_rows_than_one_call_of_the_tokenizer(tokenizer, monkeypatch):
    whole = tokenize(["ab", "c", "def"], tokenizer, 9, "classification", labels=[0, 1, 2])
    monkeypatch.setattr("dsdistill.data.store_writer.MOST", 2)
    parts = tokenize(["ab", "c", "def"], tokenizer, 9, "classification", labels=[0, 1, 2])
    assert lists(parts) == lists(whole) and [parts.types(i).tolist() for i in range(3)] == [
        whole.types(i).tolist() for i in range(3)
    ]


def test_documents_are_packed_with_a_separator_between(tokenizer):
    examples = tokenize(["abc", "d.e", "fghi"], tokenizer, 4, "causal_lm")
    stop = A + 38
    assert lists(examples) == [
        [A, A + 1, A + 2, SEP],
        [A + 3, stop, A + 4, SEP],
        [A + 5, A + 6, A + 7, A + 8],
    ]
    assert examples.labels is None and list(examples.given_ids) == ["0", "1", "2"]


@pytest.mark.parametrize(
    "text, lengths", [("abcde", [4]), ("abcdef", [4, 2]), ("ab", [2]), ("abcdefgh", [4, 4])]
)
def test_remainder(tokenizer, text, lengths):
    assert tokenize([text], tokenizer, 4, "causal_lm").lengths.tolist() == lengths


def test_limit_counts_blocks(tokenizer):
    examples = tokenize(["abcd", "abcd", "abcd"], tokenizer, 4, "causal_lm", limit=2)
    assert lists(examples) == [[A, A + 1, A + 2, A + 3], [SEP, A, A + 1, A + 2]]


@pytest.mark.parametrize(
    "given, max_length, task, message",
    [
        ([("a", "b")], 4, "classification", "data.max_length: got 4, expected above 4"),
        (["a"], 4, "causal_lm", "rows.jsonl: got a text of 1 tokens, expected at least 2"),
    ],
)
def test_refusals(tokenizer, given, max_length, task, message):
    with pytest.raises(UserError, match=message):
        tokenize(given, tokenizer, max_length, task, labels=[0] if task == "classification" else None)


def test_row_without_tokens(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer._tokenizer, "post_processor", None)  # no token is added, as with GPT-2
    with pytest.raises(UserError, match="here: got row 2, which gives no token"):
        tokenize(["a", " "], tokenizer, 4, "classification", labels=[0, 1])


def test_load_real_sets(tokenizer, real):
    section = Section(source="files", root=str(real), train="stsb/train.tsv.gz", dev="stsb/dev.tsv.gz",
                      text=("text_a", "text_b"), max_length=32, max_train=500, max_dev=20)  # fmt: skip
    data = load(section, "regression", tokenizer)
    assert (len(data.train), len(data.dev), data.labels) == (500, 20, ())
    assert data.train.lengths.max() == 32 and data.dev.labels[:2].tolist() == [5.0, pytest.approx(2.4)]
    section = Section(source="files", root=str(real), train="wikitext2/dev.txt.gz", dev="zhgeneral/dev.jsonl.gz",
                      text=("answer",), max_length=64, max_train=100, packing=False)  # fmt: skip
    data = load(section, "causal_lm", tokenizer)
    assert data.train.lengths.tolist() == [64] * 100
    assert set(data.dev.lengths[:-1].tolist()) == {64} and data.dev.lengths[-1] >= 2
