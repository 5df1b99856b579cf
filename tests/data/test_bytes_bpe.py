"""A byte-level tokenizer made from the train texts loses nothing, and its special tokens end texts and turns."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dsdistill.config.errors import UserError
from dsdistill.data.bytes_bpe import train_bytes_tokenizer
from dsdistill.data.prompted import special_tokens

TEXTS = ["高血压患者能吃党参吗？", "The doctor said: drink water", "water, doctors; water"] * 3


@pytest.fixture
def tokenizer(tmp_path):
    return AutoTokenizer.from_pretrained(train_bytes_tokenizer(TEXTS, 320, str(tmp_path)))


@pytest.mark.parametrize(
    "text", ["The doctor", "  two  spaces \r\n\t", "don 't stop .", "高é\u0000😀\ufeff", "İ ﬁ"]
)
def test_texts_come_back_as_they_were(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) <= len(text.encode())


def test_its_words_are_those_of_the_texts(tokenizer):
    assert tokenizer.tokenize(" water") == ["Ġwater"] and 256 + 3 < len(tokenizer) <= 320


def test_tokens_that_end_texts_and_turns(tokenizer):
    assert special_tokens(tokenizer)[0] == [] and special_tokens(tokenizer)[2] == [tokenizer.eos_token_id]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token_id not in (
        None,
        tokenizer.eos_token_id,
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    assert tokenizer.decode(ids) == text and ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\na\nassistant\nb\n"


def test_it_is_made_once_and_always_the_same(tmp_path):
    folder = train_bytes_tokenizer(TEXTS, 320, str(tmp_path / "a"))
    before = Path(folder, "tokenizer.json").stat().st_mtime_ns
    assert train_bytes_tokenizer(TEXTS, 320, str(tmp_path / "a")) == folder
    assert Path(folder, "tokenizer.json").stat().st_mtime_ns == before
    assert train_bytes_tokenizer(TEXTS, 321, str(tmp_path / "a")) != folder
    code = "from dsdistill.data.bytes_bpe import train_bytes_tokenizer as train;"
    code += f"train({TEXTS!r}, 320, {str(tmp_path / 'b')!r})"
    subprocess.run([sys.executable, "-c", code], check=True)  # another process, another hash seed
    (other,) = (tmp_path / "b").iterdir()
    assert other.name == Path(folder).name
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (other / name).read_bytes() == Path(folder, name).read_bytes()


def test_a_size_below_all_bytes_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^data.train_tokenizer: got 299, expected at least 300 with"):
        train_bytes_tokenizer(TEXTS, 299, str(tmp_path))
    assert not list(tmp_path.iterdir())
