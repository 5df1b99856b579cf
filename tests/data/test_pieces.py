"""Long texts that are cut into pieces must have the tokens of the whole text."""

import itertools

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dsdistill.data import pieces
from dsdistill.data.bytes_bpe import train_bytes_tokenizer
from dsdistill.data.encode import PlainEncoder
from dsdistill.data.pieces import Cutter

PARAGRAPHS = [
    "The dogs of the north  ran,\n  and ran.",
    "“Stop!” cried she — 12 345 times.",
    "\tTabs;\r\nold line ends.",
]
TEXTS = {
    "paragraphs": "\n\n".join(PARAGRAPHS * 40),
    "three line feeds": "\n\n\n".join(PARAGRAPHS * 40),
    "lines": "\n".join(PARAGRAPHS * 40),
    "no line end": " ".join(PARAGRAPHS * 40).replace("\n", " "),
    "blank lines of spaces": "\n \t \n".join(PARAGRAPHS * 40),
    "no space": "abcdefgh" * 600,
    "Chinese": "高血压患者能吃党参吗？\n\n" * 300,
}


def prefixed():
    """Return a tokenizer that puts a space before every text, like Llama 2's: every cut changes its tokens."""
    core = Tokenizer(models.BPE(unk_token="?"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Replace("▁", " ")
    core.train_from_iterator(
        TEXTS.values(), trainers.BpeTrainer(vocab_size=300, special_tokens=["?"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")


def lines_joined():
    """Return a tokenizer that makes one word of all line feeds in a row, like Qwen's."""
    core = Tokenizer(models.BPE())
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(__import__("tokenizers").Regex(pattern), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(TEXTS.values(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = train_bytes_tokenizer(TEXTS.values(), 600, str(tmp_path_factory.mktemp("cache")))
    return {"gpt2": AutoTokenizer.from_pretrained(folder), "joined": lines_joined(), "prefixed": prefixed()}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["gpt2", "joined", "prefixed"])
def test_pieces_have_the_tokens_of_the_whole(tokenizers, monkeypatch, name, text):
    monkeypatch.setattr(pieces, "PIECE", 256)
    monkeypatch.setattr(pieces, "WINDOW", 64)
    text, tokenizer = TEXTS[text], tokenizers[name]
    for parts in ([text], text.splitlines(keepends=True)):
        found = list(Cutter(tokenizer).pieces(parts))
        assert "".join(found) == text
        encode = PlainEncoder(tokenizer)
        (whole, _), *_ = encode([text], "here")
        assert np.array_equal(whole, np.concatenate([ids for ids, _ in encode(found, "here")]))
        cuttable = name != "prefixed" and "\n" in text and not text.startswith("高")
        assert len(found) > 3 if cuttable else found


def test_a_text_that_cannot_be_cut_comes_whole(tokenizers, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 256)
    assert list(Cutter(tokenizers["prefixed"]).pieces([TEXTS["paragraphs"]])) == [TEXTS["paragraphs"]]


def test_nothing_has_no_piece(tokenizers):
    assert list(Cutter(tokenizers["gpt2"]).pieces([])) == [] == list(Cutter(tokenizers["gpt2"]).pieces([""]))


def test_a_long_text_is_held_in_parts(tokenizers, monkeypatch):
    """Besides the piece that is handed out, at most two pieces of an endless text are held."""
    monkeypatch.setattr(pieces, "PIECE", 256)
    taken = itertools.count()
    endless = (f"Line {next(taken)}.\n\n" for _ in iter(int, 1))
    assert len("".join(itertools.islice(Cutter(tokenizers["gpt2"]).pieces(endless), 20))) > 2000
    assert next(taken) < 1500
