"""Prompts and responses: token layout, truncation, labels, spans, and which tokens the losses count."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dsdistill.alignment.terms import TERMS, Pair, Shape
from dsdistill.config.errors import UserError
from dsdistill.config.schema import Data as Section
from dsdistill.config.terms import SoftLabel, Task
from dsdistill.data import NO_LABEL, collate
from dsdistill.data.batch import PHRASE, WORD
from tests.data.rig import lists, load, tokenize

A, CLS, SEP, PAD = 4, 2, 3, 0  # ids: a is 4, b is 5, …


def letters(text):
    return [A + "abcdefghijklmnopqrstuvwxyz".index(letter) for letter in text]


@pytest.fixture(scope="module")
def decoder_tokenizer():
    """Return a tokenizer like GPT-2's: one token begins and ends texts; no separator; the line break is a token."""
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", "\n", " ", *"abcdefgh"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=core, **ends)


def test_layout_with_class_token_and_separator(tokenizer):
    examples = tokenize([("ab", "cde"), ("f", "g")], tokenizer, 16, "causal_lm")
    assert lists(examples) == [
        [CLS, *letters("ab"), SEP, *letters("cde"), SEP],
        [CLS, *letters("f"), SEP, *letters("g"), SEP],
    ]
    assert (
        [examples.context(i) for i in range(len(examples))] == [4, 3]
        and examples.labels is None
        and examples.documents.types is None
    )


def test_layout_without_a_separator(decoder_tokenizer):
    examples = tokenize([("ab", "cd")], decoder_tokenizer, 16, "causal_lm")
    assert lists(examples) == [[3, 4, 1, 5, 6, 0]]
    assert [examples.context(i) for i in range(len(examples))] == [3]
    batch = collate(examples, [0, 0], pad_id=0)  # padding is the end token too; see the mask
    assert batch.labels[0].tolist() == [NO_LABEL] * 3 + [5, 6, 0]


@pytest.mark.parametrize(
    "prompt, response, kept",
    [
        ("abcdef", "gh", ("abcde", "gh", True)),  # room for 8: the prompt is cut
        ("abcdef", "ghijkl", ("abcd", "ghij", False)),  # half for each
        ("ab", "cdefghi", ("ab", "cdefgh", False)),  # the response gets the room that the prompt leaves
        ("", "cdefghij", ("", "cdefghij", False)),
        ("abcd", "efg", ("abcd", "efg", True)),
    ],
)
def test_truncation_keeps_room_for_the_response(tokenizer, prompt, response, kept):
    examples = tokenize([(prompt, response)], tokenizer, 10, "causal_lm")
    prompt, response, whole = kept
    assert lists(examples) == [[CLS, *letters(prompt), SEP, *letters(response), *[SEP] * whole]]
    assert [examples.context(i) for i in range(len(examples))] == [len(prompt) + 2]


@pytest.mark.parametrize("overlong", ["drop", "split"])
def test_the_layout_of_special_tokens_truncates(tokenizer, overlong):
    with pytest.raises(
        UserError, match=f"data.overlong: got {overlong} with layout separator, which always truncates"
    ):
        tokenize([("ab", "cd")], tokenizer, 10, "causal_lm", overlong=overlong)
    found = lists(tokenize([("ab", "cd")], tokenizer, 10, "causal_lm", overlong="truncate"))
    assert found == lists(tokenize([("ab", "cd")], tokenizer, 10, "causal_lm"))


def test_labels_are_the_response_alone(tokenizer):
    examples = tokenize([("ab", "cde"), ("f", "g")], tokenizer, 16, "causal_lm")
    batch = collate(examples, [1, 0], PAD)
    assert batch.labels.tolist() == [
        [NO_LABEL] * 3 + [*letters("g"), SEP] + [NO_LABEL] * 3,
        [NO_LABEL] * 4 + [*letters("cde"), SEP],
    ]
    assert batch.mask.sum(1).tolist() == [5, 8]  # hidden states and attention see the prompts
    again = collate(examples.take([1]), [0], PAD)
    assert again.labels.tolist() == [[NO_LABEL] * 3 + [*letters("g"), SEP]]
    pair = Pair(*[Shape(2, 8, 2, 2, 4, 64)] * 2, "causal_lm", "auto", 64)
    for name, config in (("task", Task()), ("soft_label", SoftLabel())):
        assert TERMS[name](config, pair).counts(batch, {}).tolist() == [2 + 4]


def test_the_loss_knows_nothing_of_what_prompts_predict(tokenizer):
    """Compare with cross-entropy over response tokens by hand, from random states and a random head."""
    from dsdistill.models.trace import Trace

    batch = collate(tokenize([("ab", "cde"), ("f", "g")], tokenizer, 16, "causal_lm"), [0, 1], PAD)
    torch.manual_seed(0)
    states, head = torch.randn(2, 8, 8), torch.randn(64, 8)
    pair = Pair(Shape(2, 8, 2, 2, 4, 64), None, "causal_lm", "auto", 64)
    trace = Trace()
    trace.output, trace.head, trace.head_bias = states, head, None
    found = TERMS["task"](Task(), pair).sums(trace, None, batch)
    log_q = (states @ head.T).log_softmax(-1)
    wanted = {(0, 3): "c", (0, 4): "d", (0, 5): "e", (1, 2): "g"}
    expected = -sum(log_q[row, at, letters(to)[0]] for (row, at), to in wanted.items())
    expected -= log_q[0, 6, SEP] + log_q[1, 3, SEP]
    torch.testing.assert_close(found[0], expected)


def test_spans_lie_in_both_texts(tokenizer):
    def find(line):  # each text is one word, and a phrase from its second letter on
        return [(0, len(line))], [(1, len(line))]

    examples = tokenize([("abcdef", "ghi"), ("k", "lm")], tokenizer, 9, "causal_lm", chunk=find)
    assert lists(examples)[0] == [CLS, *letters("abc"), SEP, *letters("ghi"), SEP]
    found = [examples.spans(i).tolist() for i in range(2)]
    assert sorted(found[0]) == sorted([[1, 4, WORD], [5, 8, WORD], [2, 4, PHRASE], [6, 8, PHRASE]])
    assert sorted(found[1]) == sorted([[1, 2, WORD], [3, 5, WORD], [4, 5, PHRASE]])


def test_more_rows_than_one_call_of_the_tokenizer(tokenizer, monkeypatch):
    texts = [("ab", "c"), ("d", "ef"), ("g", "hij")]
    whole = tokenize(texts, tokenizer, 9, "causal_lm")
    monkeypatch.setattr("dsdistill.data.store_writer.MOST", 2)
    parts = tokenize(texts, tokenizer, 9, "causal_lm")
    assert lists(parts) == lists(whole) and [parts.context(i) for i in range(3)] == [
        whole.context(i) for i in range(3)
    ]


def test_refusals(tokenizer, decoder_tokenizer):
    with pytest.raises(UserError, match=r"data\.max_length: got 3, expected at least 4"):
        tokenize([("a", "b")], tokenizer, 3, "causal_lm")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: got an empty response"):
        tokenize([("a", "b"), ("a", " ")], tokenizer, 9, "causal_lm")
    nothing = PreTrainedTokenizerFast(tokenizer_object=decoder_tokenizer._tokenizer)
    with pytest.raises(UserError, match=r"data\.tokenizer: got a tokenizer without an end token"):
        tokenize([("a", "b")], nothing, 9, "causal_lm")


def test_rows_are_limited_before_tokenizing_and_plain_text_has_no_columns(tokenizer, tmp_path, data_dir):
    Path(tmp_path, "train.tsv").write_text("q\ta\nx\ty\nv\tw\n")
    section = Section(
        source="files", root=str(tmp_path), train="train.tsv", dev="train.tsv", text=("q", "a"), max_train=1
    )
    found = load(section.model_copy(update={"layout": "separator"}), "causal_lm", tokenizer)
    assert len(found.train) == 1 and len(found.dev) == 2
    section = section.model_copy(update={"dev": str(data_dir / "dev.txt")})
    with pytest.raises(UserError, match="got plain text, expected a file with the columns q and a"):
        load(section, "causal_lm", tokenizer)
