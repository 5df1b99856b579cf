"""Prompts and responses are laid out as a template's turns, or raw."""

import logging

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from dsdistill.config.data_section import Data
from dsdistill.config.errors import UserError
from dsdistill.data import layout as layout_module
from dsdistill.data.bytes_bpe import train_bytes_tokenizer
from dsdistill.data.chat import Chat
from dsdistill.data.layout import Raw, default_layout, render_template
from dsdistill.data.rendered import encode_rendered
from tests.data import templates


@pytest.fixture
def tokenizer(tmp_path):
    return AutoTokenizer.from_pretrained(train_bytes_tokenizer(["words"], 300, str(tmp_path / "cache")))


def test_the_default_is_the_template_where_there_is_one(tokenizer, tokenizer_dir, caplog):
    layout_module._tell.cache_clear()  # else the log line appears only once
    without = AutoTokenizer.from_pretrained(tokenizer_dir)
    with caplog.at_level(logging.INFO, "dsdistill"):
        assert default_layout(tokenizer, Data(layout="raw")) == "raw" and not caplog.messages
        assert default_layout(tokenizer, Data()) == "template"
        assert default_layout(without, Data()) == "separator"
        assert default_layout(without, Data(chat_template="file.jinja")) == "template"
    assert len(caplog.messages) == 2 and "data.layout is template" in caplog.messages[0]


def test_template_makes_two_turns_of_them(tokenizer):
    rendered = render_template(Chat(tokenizer, templates.PLAIN), "one and", "one", "here")
    ids, ((first, last),) = encode_rendered(tokenizer, rendered, "here")
    turns = [{"role": "user", "content": "one and"}, {"role": "assistant", "content": "one"}]
    assert ids == tokenizer.apply_chat_template(turns, chat_template=templates.PLAIN, return_dict=False)
    assert tokenizer.decode(ids[first:last]) == "one<|im_end|>"
    with pytest.raises(UserError, match="here: got an empty response, expected text"):
        render_template(Chat(tokenizer), "one", "", "here")


@pytest.mark.parametrize(
    "prompt, response, whole, learned",
    [
        ("one and", " one", "one and one<|im_end|>", " one<|im_end|>"),
        ("", "one", "one<|im_end|>", "one<|im_end|>"),
        ("a ", "b<|im_end|>", "a b<|im_end|>", "b<|im_end|>"),
        ("a ", "b<|im_end|>\n", "a b<|im_end|>\n", "b<|im_end|>"),
        ("a<|im_end|>", "b\n", "a<|im_end|>b\n<|im_end|>", "b\n<|im_end|>"),
    ],
)
@pytest.mark.parametrize("begins", [None, False, True])
def test_raw_leaves_texts_as_they_stand(tokenizer, prompt, response, whole, learned, begins):
    if begins is not None:  # there is a token that begins texts
        tokenizer.bos_token = "<|im_start|>"
    if begins:  # and the tokenizer adds it
        start = [("<|im_start|>", tokenizer.bos_token_id)]
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            "<|im_start|> $A", special_tokens=start
        )
    for before in ("", "<|im_start|>") if begins else ("",):  # it is there once, whoever adds it
        rendered = Raw(tokenizer).render(before + prompt, response, "here")
        ids, ((first, last),) = encode_rendered(tokenizer, rendered, "here")
        assert tokenizer.decode(ids) == "<|im_start|>" * bool(begins) + whole
        assert tokenizer.decode(ids[first:last]) == learned
    with pytest.raises(UserError, match="here: got an empty response, expected text"):
        Raw(tokenizer).render(prompt, "", "here")
