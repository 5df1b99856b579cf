"""Apply a chat template as the tokenizer does, and report each failure in one line."""

import inspect
import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from dsdistill.config.bounded import MIB, read_bytes
from dsdistill.config.errors import UserError
from dsdistill.data.conversation import Message, read_tools
from dsdistill.data.rendered import Range

log = logging.getLogger("dsdistill")

MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
PROBE = "a8d1c6"  # a text that no template contains


def read_template(path: str) -> str:
    """Return the text of a chat template's file; raise UserError if it cannot be read."""
    place = f"data.chat_template: {path}"
    try:
        return read_bytes(os.path.expanduser(path), MIB).decode("utf-8")
    except FileNotFoundError:
        raise UserError(place, "no such file", "a file with a Jinja template") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(place, str(error), "a readable UTF-8 file") from None


class ChatTemplate:
    """Hold a chat template (the tokenizer's own, or one that replaces it) and its options.

    Args:
        tokenizer: a transformers tokenizer.
        text: a template that replaces the tokenizer's.
        options: variables in addition to the messages; `tools` is used for conversations that have no tools.

    Raises:
        UserError: there is no template, it is broken, or it does not read an option.
    """

    def __init__(self, tokenizer: Any, text: str | None = None, options: Mapping[str, Any] | None = None):
        self.tokenizer, self.given = tokenizer, text
        self.options = dict(options or {})
        self.tools = read_tools(self.options.pop("tools", None), "data.template_options")
        self.text = self._checked_text()
        for name in self.options if self.tools is None else {**self.options, "tools": None}:
            self._check_option(name)
        self.has_marks = MARKS.search(self.text) is not None
        tokens = {of.content for of in tokenizer.added_tokens_decoder.values() if of.content in self.text}
        # The tokens of the tokenizer that may end a turn.
        self.special = tuple(of for of in sorted(tokens | set(tokenizer.all_special_tokens)) if of.strip())
        self._seen: set[str] = set()  # roles, tool_calls and tools that have been checked
        self._takes_parts: bool | None = None  # whether it accepts content that is a list

    def render(
        self, conversations: list[list[Message]], tools: Any, place: str, prompt: bool = False
    ) -> list[str]:
        """Return the text of each conversation, with `prompt` up to where the assistant would begin to write.

        Raises UserError, with the template's reason, if it refuses one.
        """
        try:
            return self.tokenizer.apply_chat_template(
                conversations,
                tools=tools,
                chat_template=self.given,
                add_generation_prompt=prompt,
                tokenize=False,
                **self.options,
            )
        except Exception as error:  # a template may do anything
            if all(message.get("content") is not None for of in conversations for message in of):
                raise _refused(place, error) from None
        # Newer versions of transformers leave out a content of None. Templates that then fail either test whether it
        # is None (DeepSeek V3's) or accept only text (Qwen3's). So None is tried first, then an empty text.
        try:
            return self._render_silent(conversations, None, tools, place, prompt)
        except UserError:
            return self._render_silent(conversations, "", tools, place, prompt)

    def _render_silent(
        self, conversations: list[list[Message]], said: str | None, tools: Any, place: str, prompt: bool
    ) -> list[str]:
        """Return the text of each conversation, with `said` as the content of turns without one."""
        kept = [
            [{**message, "content": said} if message.get("content") is None else message for message in of]
            for of in conversations
        ]
        return self._render_plainly(kept, tools, place, add_generation_prompt=prompt)[0]

    def render_marked(self, messages: list[Message], tools: Any, place: str) -> tuple[str, list[Range]]:
        """Return the text of a conversation and the ranges of characters that the template marks."""
        # apply_chat_template leaves these keys out, too, and gives the marks only as tokens.
        kept = [{key: value for key, value in of.items() if value is not None} for of in messages]
        texts, marks = self._render_plainly([kept], tools, place, return_assistant_tokens_mask=True)
        return texts[0], [(first, last) for first, last in marks[0]]

    def _render_plainly(
        self, conversations: list[list[Message]], tools: Any, place: str, **how: Any
    ) -> tuple[list[str], list[list[Range]]]:
        """Return texts and marks of conversations, which the template gets unchanged."""
        try:
            rendered: Any = render_jinja_template(
                conversations,
                tools=tools,
                chat_template=self.tokenizer.get_chat_template(self.given, tools),
                **{**self.tokenizer.special_tokens_map, **self.options},
                **how,
            )
        except Exception as error:
            raise _refused(place, error) from None
        return rendered

    def known_content(self, messages: list[Message]) -> list[Message]:
        """Return the messages; if the template takes only texts, lists of parts become texts."""
        if not any(isinstance(message.get("content"), list) for message in messages):
            return messages
        if self._takes_parts is None:
            parts, plain = (
                [{"role": "user", "content": content}]
                for content in ([{"type": "text", "text": PROBE}], PROBE)
            )
            try:
                of_parts, of_plain = self.render([parts, plain], None, "")
                self._takes_parts = of_parts == of_plain
            except UserError:
                self._takes_parts = False
        if self._takes_parts:
            return messages
        return [
            {**message, "content": "".join(part["text"] for part in content)}
            if isinstance(content := message.get("content"), list)
            else message
            for message in messages
        ]

    def check_shown(self, messages: list[Message], tools: Any, place: str) -> None:
        """Raise UserError if the template silently leaves out turns of a role, or tool calls.

        Each role is checked once, at its first turn: that turn is rendered with another content.
        """
        if tools is not None and "tools" not in self._seen:
            self._seen.add("tools")
            if not self._names("tools"):
                log.warning("%s: the chat template does not read the tools", place)
        for index, message in enumerate(messages):
            for what, probe in self._probes(message):
                probed = [*messages[:index], {**message, **probe}, *messages[index + 1 :]]
                try:
                    (text,) = self.render([probed], tools, place)
                except UserError:  # a refused turn is not left out silently
                    text = PROBE
                if PROBE not in text:
                    raise UserError(
                        f"{place}, message {index + 1}",
                        f"{what}, which the chat template leaves out",
                        "messages that the template shows, or another template (data.chat_template)",
                    )
                self._seen.add(what)

    def _probes(self, message: Message) -> Iterator[tuple[str, Message]]:
        """Yield the name of each check that was not made yet, and the values that it puts into the message."""
        role, content, calls = f"role {message['role']!r}", message.get("content"), message.get("tool_calls")
        if role not in self._seen and isinstance(content, str) and content.strip():
            yield role, {"content": PROBE}
        if calls and "tool_calls" not in self._seen:
            yield "tool_calls", {"tool_calls": _probe_calls(calls)}

    def _checked_text(self) -> str:
        """Return the template's text, or all texts if a tokenizer has several; raise UserError if one is broken."""
        source = self.given if self.given is not None else self.tokenizer.chat_template
        if not source:
            raise UserError(
                "data.chat_template",
                "null, and a tokenizer without a chat template"
                if self.given is None
                else "an empty template",
                "a file with a chat template, or a tokenizer that has one",
            )
        texts = list(source.values()) if isinstance(source, dict) else [source]
        for text in texts:
            try:
                render_jinja_template([[{"role": "user", "content": PROBE}]], chat_template=text)
            except TemplateSyntaxError as error:
                raise UserError(
                    "data.tokenizer" if self.given is None else "data.chat_template",
                    f"a chat template with an error in line {error.lineno} ({error.message})",
                    "a valid Jinja template",
                ) from None
            except Exception:  # it may refuse this conversation
                continue
        return "\n".join(texts)

    def _check_option(self, name: str) -> None:
        place = f"data.template_options.{name}"
        own = inspect.signature(self.tokenizer.apply_chat_template).parameters.keys()
        if name in own - {"kwargs", "tools", "documents"}:
            raise UserError(place, "an argument of apply_chat_template", "a variable that the template reads")
        if not self._names(name):
            raise UserError(place, "an option that the chat template does not read", "one that it reads")

    def _names(self, name: str) -> bool:
        return re.search(rf"\b{re.escape(name)}\b", self.text) is not None


def _probe_calls(calls: Any) -> Any:
    """Return tool calls, the first of them with another function name."""
    if not isinstance(calls, list) or not isinstance(calls[0], dict):
        return calls
    function = calls[0].get("function")
    named = {"function": {**function, "name": PROBE}} if isinstance(function, dict) else {"name": PROBE}
    return [{**calls[0], **named}, *calls[1:]]


def _refused(place: str, error: Exception) -> UserError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return UserError(
        place,
        f"a conversation that the chat template refuses ({reason})",
        "a conversation in the form that it accepts",
    )
