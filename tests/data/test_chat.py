"""Conversations have the ids of plain transformers, labels on what the model is to write, and one line per mistake."""

import json
import logging

import pytest
from transformers import AddedToken, AutoTokenizer

from dsdistill.config.errors import UserError
from dsdistill.data.bytes_bpe import train_bytes_tokenizer
from dsdistill.data.chat import Chat
from dsdistill.data.chat_template import read_template
from dsdistill.data.rendered import Rendered, labelled, lay_out
from tests.data import templates

TEMPLATES = {name: value for name, value in vars(templates).items() if name[0].isupper()}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def say(role: str, content: str, **others: object) -> dict:
    return {"role": role, "content": content, **others}


def call(name: str) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": {"a": 1}}}


SHORT = [say("user", "one and one"), say("assistant", "two")]
LONG = [
    say("system", "be brief"),
    say("user", " 1 + 1?\n"),
    say("assistant", "two é高\n"),
    say("user", "sure?"),
    say("assistant", "yes"),
]
CALLING = [
    say("user", "add one"),
    say("assistant", "", tool_calls=[call("add")]),
    say("tool", "two"),
    say("assistant", "it is two"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    made = AutoTokenizer.from_pretrained(
        train_bytes_tokenizer(["one and one are two, user assistant"] * 3, 300, str(folder))
    )
    made.bos_token = "<|im_start|>"
    return made


def learned(chat: Chat, conversation: object) -> list[list[str]]:
    """Return the labelled text of each example."""
    return [
        [chat.tokenizer.decode(ids[first:last]) for first, last in ranges]
        for ids, ranges in chat.encode(conversation)
    ]


def plain(chat: Chat, messages: list[dict], **how: object) -> list[int]:
    """Return the ids of plain transformers."""
    how = {"chat_template": chat.template.given, "return_dict": False} | how
    return chat.tokenizer.apply_chat_template(messages, **how)


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"HARMONY", "AHEAD"}))
@pytest.mark.parametrize("conversation", [SHORT, LONG], ids=["short", "long"])
def test_ids_are_those_of_the_library(tokenizer, name, conversation):
    if name == "STRICT":
        conversation = [message for message in conversation if message["role"] != "system"]
    for train_on in ("assistant", "last", "all"):
        chat = Chat(tokenizer, TEMPLATES[name], train_on=train_on)
        examples = chat.encode(conversation)
        for ids, ranges in examples:
            ends = [end for end in range(1, len(conversation) + 1) if plain(chat, conversation[:end]) == ids]
            assert ends and ranges
        assert ends == [len(conversation)]


@pytest.mark.parametrize("name", ["PLAIN", "MARKED", "MERGED", "CLOSED", "PARTS"])
def test_labels_are_what_the_model_would_write(tokenizer, name):
    chat = Chat(tokenizer, TEMPLATES[name])
    last = "yes<|im_end|>\n<|endoftext|>" if name == "CLOSED" else "yes<|im_end|>"
    assert learned(chat, LONG) == [["two é高\n<|im_end|>", last]]
    ((ids, ranges),) = chat.encode(LONG)
    for turn, (first, _) in zip((2, 4), ranges, strict=True):
        assert ids[:first] == plain(chat, LONG[:turn], add_generation_prompt=True)
    assert learned(Chat(tokenizer, TEMPLATES[name], train_on="last"), LONG) == [[last]]
    assert Chat(tokenizer, TEMPLATES[name], train_on="all").encode(LONG) == [(ids, [(0, len(ids))])]


@pytest.mark.parametrize("before", ["", "{{ bos_token }}"])
def test_marks_are_those_of_the_library(tokenizer, before):
    chat = Chat(tokenizer, before + templates.MARKED)
    ((ids, ranges),) = chat.encode(LONG)
    theirs = plain(chat, LONG, return_dict=True, return_assistant_tokens_mask=True)
    assert ids == theirs["input_ids"]
    assert [any(a <= i < b for a, b in ranges) for i in range(len(ids))] == list(
        map(bool, theirs["assistant_masks"])
    )
    chat = Chat(tokenizer, "{{ 'named' if messages[0].name is defined }}" + templates.MARKED)
    assert chat.render([{**SHORT[0], "name": None}, SHORT[1]], "here") == chat.render(SHORT, "here")


def test_a_template_without_an_end_token_ends_turns_itself(tokenizer):
    assert learned(Chat(tokenizer, templates.BARE), LONG) == [[" two é高\n\n\n", " yes\n\n"]]


def test_no_prompt_for_the_assistant_means_that_it_writes_its_name(tokenizer):
    chat = Chat(tokenizer, templates.BEGINNING)
    assert learned(chat, SHORT) == [["assistant: two<|im_end|>"]]
    ((ids, _),) = chat.encode(SHORT)
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_turns_that_the_template_rewrites_are_examples_of_their_own(tokenizer):
    thought = [
        dict(message, reasoning_content="hm") if message["role"] == "assistant" else message
        for message in LONG
    ]
    chat = Chat(tokenizer, templates.THINKING)
    assert learned(chat, thought) == [
        ["<think>hm</think>two é高\n<|im_end|>"],
        ["<think>hm</think>yes<|im_end|>"],
    ]
    first, second = (ids for ids, _ in chat.encode(thought))
    assert first == plain(chat, thought[:3]) and second == plain(chat, thought)
    assert len(chat.encode(thought[:3])) == 1
    assert learned(Chat(tokenizer, templates.THINKING, train_on="last"), thought) == [
        ["<think>hm</think>yes<|im_end|>"]
    ]
    without = Chat(tokenizer, templates.THINKING, {"enable_thinking": False})
    assert learned(without, LONG) == [["two é高\n<|im_end|>"], ["yes<|im_end|>"]]
    with pytest.raises(
        UserError, match=r"^f, line 2, message 3: got a turn whose text the chat template changes"
    ):
        Chat(tokenizer, templates.THINKING, turns="refuse").render(thought, "f, line 2")


def test_a_prompt_that_opens_more_than_the_turn_shows(tokenizer, caplog):
    chat = Chat(tokenizer, templates.OPENED)
    with caplog.at_level(logging.WARNING, "dsdistill"):
        assert learned(chat, [*SHORT, *SHORT]) == [["two<|im_end|>"], ["two<|im_end|>"]]
    assert len(caplog.messages) == 1 and "labels begin where the two first differ" in caplog.text
    assert learned(chat, [SHORT[0], say("assistant", "<b>two</b>")]) == [["<b>two</b><|im_end|>"]]
    with pytest.raises(
        UserError, match="got a chat template whose assistant turns do not begin with its prompt"
    ):
        Chat(tokenizer, templates.AHEAD).render(SHORT, "here")


def test_a_turn_that_ends_otherwise_in_a_conversation(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(train_bytes_tokenizer(["a"], 300, str(tmp_path)))
    names = ("start", "channel", "message", "end", "return", "call")
    tokenizer.add_tokens([AddedToken(f"<|{name}|>", special=True) for name in names])
    final = "<|channel|>final<|message|>"
    assert learned(Chat(tokenizer, templates.HARMONY), [*SHORT, *SHORT]) == [[f"{final}two<|return|>"]] * 2


def test_a_turn_after_one_that_is_written_otherwise(tokenizer):
    messages = [*SHORT, say("tool", "3"), say("assistant", "three")]
    assert learned(Chat(tokenizer, templates.UNEVEN), messages) == [["two<|im_end|>"], ["three<|im_end|>"]]


def test_the_assistant_may_speak_first(tokenizer):
    assert learned(Chat(tokenizer, templates.PLAIN), SHORT[::-1]) == [["two<|im_end|>"]]
    with pytest.raises(UserError, match="got a conversation that begins with the assistant"):
        Chat(tokenizer, templates.BEGINNING).render(SHORT[::-1], "here")


def test_calls_and_tools(tokenizer):
    chat = Chat(tokenizer, templates.TOOLS)
    expected = [['add{"a": 1}<|im_end|>', "it is two<|im_end|>"]]
    assert learned(chat, {"messages": CALLING, "tools": json.dumps([TOOL])}) == expected
    ((ids, _),) = chat.encode({"messages": CALLING, "tools": [TOOL]})
    assert ids == plain(chat, CALLING, tools=[TOOL]) != plain(chat, CALLING)
    assert Chat(tokenizer, templates.TOOLS, {"tools": [TOOL]}).encode(CALLING)[0][0] == ids


def test_calls_without_content(tokenizer):
    silent = [CALLING[0], {"role": "assistant", "tool_calls": [call("add")]}, *CALLING[2:]]
    for message in (silent[1], {**silent[1], "content": None}):
        chat = Chat(tokenizer, templates.SILENT)
        assert learned(chat, [silent[0], message, *silent[2:]]) == [["add<|im_end|>", "it is two<|im_end|>"]]
        texts_alone = Chat(tokenizer, templates.TOOLS)
        assert texts_alone.render([silent[0], message, *silent[2:]], "here") == texts_alone.render(
            CALLING, "here"
        )


def test_forms_of_conversations(tokenizer):
    chat = Chat(tokenizer, templates.TOOLS)
    assert chat.render(json.dumps(SHORT), "here") == chat.render({"conversations": SHORT}, "here")
    sharegpt = [
        {"from": "human", "value": "add one", "role": None},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "two"},
        {"from": "gpt", "value": "it is two"},
    ]
    assert chat.render(sharegpt, "here") == chat.render(CALLING, "here")
    apart = {"prompt": LONG[:4], "completion": LONG[4:]}
    for template in (templates.PLAIN, templates.MARKED):
        assert learned(Chat(tokenizer, template), apart) == [["yes<|im_end|>"]]
    many = [say("user", [{"type": "text", "text": "one "}, {"type": "text", "text": "and one"}]), SHORT[1]]
    for template in (templates.PLAIN, templates.TRIMMED):  # these know only texts
        chat = Chat(tokenizer, template)
        assert chat.render(many, "here") == chat.render(SHORT, "here")
    chat = Chat(tokenizer, templates.PARTS)
    ((ids, _),) = chat.encode(many)
    assert ids == plain(chat, many) and "one /and one" in tokenizer.decode(ids)


@pytest.mark.parametrize(
    "conversation, template, said",
    [
        ([], "PLAIN", "here: got an empty list, expected at least one message"),
        ("[1", "PLAIN", "here: got '[1' ("),
        ('["\\ud800"]', "PLAIN", "here: got '[\"\\\\ud800\"]' ("),
        (7, "PLAIN", "here: got a int, expected a list of messages"),
        ({"text": "a"}, "PLAIN", "here: got a dict of text, expected a list of messages, or a dict with"),
        ([7], "PLAIN", "here, message 1: got a int, expected a dict with role and content"),
        ([{"content": "a"}], "PLAIN", "here, message 1: got role None"),
        ([say("user", None)], "PLAIN", "here, message 1: got content of type NoneType, expected text"),
        ([SHORT[0], {"role": "assistant"}], "PLAIN", "here, message 2: got content of type NoneType"),
        ([say("user", [{"type": "image"}])], "PARTS", "here, message 1: got a part of type 'image'"),
        (
            [{"from": "narrator", "value": "a"}],
            "PLAIN",
            "here, message 1: got from 'narrator', expected one of system",
        ),
        ([{"from": "function_call", "value": "{}"}], "PLAIN", "here, message 1: got the call '{}'"),
        (SHORT[:1], "PLAIN", "here: got only turns of user, expected a turn of the assistant"),
        (
            SHORT * 2 + SHORT[:1] * 2,
            "MERGED",
            "here: got a conversation that the chat template refuses (turns must",
        ),
        (LONG, "STRICT", "here, message 1: got role 'system', which the chat template leaves out"),
        (CALLING, "PLAIN", "here, message 2: got tool_calls, which the chat template leaves out"),
        ([SHORT[0], say("assistant", "")], "BEGINNING", None),
        ([SHORT[0], say("assistant", "")], "JOINED", "here: got an empty turn of the assistant"),
        (
            {"messages": SHORT, "tools": ["add"]},
            "TOOLS",
            "here, tools: got ['add'], expected a list of dicts",
        ),
    ],
)
def test_what_is_no_conversation_is_refused(tokenizer, conversation, template, said):
    chat = Chat(tokenizer, TEMPLATES[template])
    if said is None:
        assert chat.render(conversation, "here")
        return
    with pytest.raises(UserError) as refused:
        chat.render(conversation, "here")
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(
    "template, options, said",
    [
        ("{% for %}", {}, "data.chat_template: got a chat template with an error in line 1"),
        ("", {}, "data.chat_template: got an empty template"),
        (
            templates.PLAIN,
            {"enable_thinking": False},
            "data.template_options.enable_thinking: got an option that",
        ),
        (templates.PLAIN, {"tools": [TOOL]}, "data.template_options.tools: got an option that"),
        (templates.TOOLS, {"tools": "add"}, "data.template_options, tools: got 'add'"),
        (
            templates.PLAIN,
            {"tokenize": True},
            "data.template_options.tokenize: got an argument of apply_chat_template",
        ),
        (
            templates.PLAIN,
            {"add_generation_prompt": True},
            "data.template_options.add_generation_prompt: got a",
        ),
    ],
)
def test_templates_and_options_that_do_not_work_are_refused(tokenizer, template, options, said):
    with pytest.raises(UserError) as refused:
        Chat(tokenizer, template, options)
    assert str(refused.value).startswith(said)


def test_a_tokenizer_without_a_template_is_refused(tokenizer_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    with pytest.raises(
        UserError, match=r"^data.chat_template: got null, and a tokenizer without a chat template"
    ):
        Chat(tokenizer)
    with pytest.raises(
        UserError, match=r"no\.jinja: got no such file, expected a file with a Jinja template"
    ):
        read_template(str(tmp_path / "no.jinja"))
    (tmp_path / "bytes.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="expected a readable UTF-8 file"):
        read_template(str(tmp_path / "bytes.jinja"))
    (tmp_path / "plain.jinja").write_text(templates.PLAIN, encoding="utf-8")
    assert read_template(str(tmp_path / "plain.jinja")) == templates.PLAIN


def test_tools_that_the_template_does_not_read_are_said_once(tokenizer, caplog):
    chat = Chat(tokenizer, templates.PLAIN)
    for _ in range(2):
        chat.render({"messages": SHORT, "tools": [TOOL]}, "here")
    assert caplog.messages == ["here: the chat template does not read the tools"]


@pytest.mark.parametrize(
    "offsets, span, expected",
    [
        ([(0, 2), (2, 4), (4, 6)], (2, 4), [(1, 2)]),
        ([(0, 3), (3, 4), (4, 6)], (2, 5), [(1, 3)]),  # tokens across both borders
        (
            [(0, 2), (3, 3), (3, 5), (6, 7)],
            (3, 6),
            [(2, 3)],
        ),  # a space before the span, trimmed from its offsets
        ([(0, 2), (2, 3), (2, 3), (3, 4)], (2, 3), [(1, 3)]),  # two tokens of one character
        ([(0, 6)], (2, 4), []),
        ([], (0, 4), []),
    ],
)
def test_tokens_of_spans(offsets, span, expected):
    assert labelled(offsets, [span]) == expected


@pytest.mark.parametrize(
    "spans, start, end, whole, ranges",
    [
        (((0, 2),), (7,), (), [7, 1, 2], [(1, 2)]),
        (((2, 4),), (7,), (9,), [7, 1, 2, 9], [(2, 4)]),
        (((0, 2),), (), (9,), [1, 2, 9], [(0, 1), (2, 3)]),
        (None, (7,), (9,), [7, 1, 2, 9], [(0, 4)]),
    ],
)
def test_ids_around_a_text_move_its_ranges(spans, start, end, whole, ranges):
    ids, found = lay_out(Rendered("abcd", spans, start, end), [1, 2], [(0, 2), (2, 4)])
    assert list(ids) == whole and found == ranges
