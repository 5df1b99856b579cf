"""Check conversations in their common forms, and convert them to messages for a chat template."""

import json
from dataclasses import dataclass
from typing import Any

from dsdistill.config.errors import UserError

Message = dict[str, Any]

# ShareGPT's names of speakers, and common variants.
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """Hold the messages of a conversation, each with a role, and the tools that the assistant may call."""

    messages: list[Message]
    prompt: int = 0  # number of messages in the prompt, if prompt and completion were given separately
    tools: list[dict[str, Any]] | None = None  # for the template


def read_conversation(value: Any, place: str) -> Conversation:
    """Return the conversation that a value of a data set holds.

    Args:
        value: a list of messages, {role, content, ...} or ShareGPT's {from, value}; or a dict with such a list under
            `messages` or `conversations`, or with two such lists under `prompt` and `completion`. The dict may also
            have `tools`. Any of these may be given as JSON text. Content is text, or a list of parts of type text.
            Other keys of a message are kept.
        place: for messages, such as a file and line.

    Raises:
        UserError: the value has another form, or a message has no content.
    """
    value = _parsed(value, place)
    if not isinstance(value, dict):
        return Conversation(_messages(value, place))
    tools = read_tools(value.get("tools"), place)
    if value.get("prompt") is not None and value.get("completion") is not None:
        prompt, completion = (_messages(value[name], f"{place}, {name}") for name in ("prompt", "completion"))
        return Conversation([*prompt, *completion], len(prompt), tools)
    for name in ("messages", "conversations"):
        if value.get(name) is not None:
            return Conversation(_messages(value[name], place), tools=tools)
    raise UserError(
        place,
        f"a dict of {', '.join(map(str, value)) or 'nothing'}",
        "a list of messages, or a dict with messages or with prompt and completion",
    )


def _parsed(value: Any, place: str) -> Any:
    """Return the value of JSON text; anything else is returned unchanged."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
        if "\\u" in value:  # JSON can write half of a surrogate pair, which UTF-8 cannot
            json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UserError(
            place, f"{value[:60]!r} ({error})", "a list of messages, or JSON text of such a list"
        ) from None
    return parsed


def _messages(value: Any, place: str) -> list[Message]:
    value = _parsed(value, place)
    if not isinstance(value, list):
        raise UserError(place, f"a {type(value).__name__}", "a list of messages")
    if not value:
        raise UserError(place, "an empty list", "at least one message")
    return [_message(message, f"{place}, message {i}") for i, message in enumerate(value, 1)]


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise UserError(place, f"a {type(message).__name__}", "a dict with role and content")
    if message.get("role") is None and message.get("from") is not None:
        message = _of_sharegpt(message, place)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise UserError(place, f"role {role!r}", "a name such as user or assistant")
    if isinstance(content, list):
        for part in content:
            _check_part(part, place)
    elif content is None and message.get("tool_calls"):
        pass  # it calls tools and says nothing
    elif not isinstance(content, str):
        raise UserError(place, f"content of type {type(content).__name__}", "text")
    return message


def _check_part(part: Any, place: str) -> None:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise UserError(
            place, f"a part of type {kind!r} in its content", "only parts of the form {type: text, text: ...}"
        )


def _of_sharegpt(message: Message, place: str) -> Message:
    speaker, said = message["from"], message.get("value")
    role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise UserError(place, f"from {speaker!r}", f"one of {', '.join(SPEAKERS)}")
    others = {key: value for key, value in message.items() if key not in ("from", "value", "role", "content")}
    if speaker == "function_call":
        return {"role": role, "content": "", "tool_calls": _calls(said, place)} | others
    return {"role": role, "content": said} | others


def _calls(said: Any, place: str) -> list[dict[str, Any]]:
    """Return the tool calls in ShareGPT's JSON text: one call {"name": ..., "arguments": {...}}, or a list of them."""
    calls = _parsed(said, place)
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise UserError(place, f"the call {str(said)[:60]!r}", "JSON with name and arguments")
    if not calls:
        raise UserError(place, "no call", "JSON with name and arguments")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
        for call in calls
    ]


def read_tools(value: Any, place: str) -> list[dict[str, Any]] | None:
    """Return the tools of one conversation or of all; None if there are none."""
    tools = _parsed(value, f"{place}, tools") if value else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(
            f"{place}, tools", f"{str(tools)[:60]}", "a list of dicts: the JSON schemas of the tools"
        )
    return tools
