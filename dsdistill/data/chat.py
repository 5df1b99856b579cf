"""Render conversations with a chat template, and find the turns in the text that have labels."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from dsdistill.config.errors import UserError
from dsdistill.data.chat_template import PROBE, ChatTemplate
from dsdistill.data.conversation import Conversation, read_conversation
from dsdistill.data.rendered import Range, Rendered, encode_rendered

log = logging.getLogger("dsdistill")


class Chat:
    """Render conversations with a tokenizer's chat template, and say which characters have labels.

    Text and ids are those of `tokenizer.apply_chat_template`: the template alone decides whether a text begins with
    the begin token.

    Turns of the assistant have labels. If the template has marks ({% generation %}), the marked text has labels.
    Otherwise a turn begins after the prompt for the assistant, where the model would begin to write. It ends with its
    last special token (the end of the turn), which has a label. Blank characters after that token have none, because
    the model has stopped there. If the template has no such token, the turn ends where its text ends.

    A template may change earlier turns once later ones follow: Qwen3's drops their thinking. A model then never
    writes these turns as they are in the whole conversation. So each turn of the assistant becomes a
    separate example, which ends with that turn, or the conversation is refused, as `turns` says. A template with marks
    is not checked for this.

    Args:
        tokenizer: a fast transformers tokenizer.
        template: text of a template that replaces the tokenizer's.
        options: variables of the template in addition to the messages (`data.template_options`).
        train_on: as `data.train_on`.
        turns: as `data.turns`.

    Raises:
        UserError: there is no template, it is broken, or it does not read an option.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        options: Mapping[str, Any] | None = None,
        train_on: Literal["assistant", "last", "all"] = "assistant",
        turns: Literal["split", "refuse"] = "split",
    ):
        if not tokenizer.is_fast:
            raise UserError(
                "data.tokenizer", "a tokenizer without token offsets", "a fast tokenizer (tokenizer.json)"
            )
        self.tokenizer, self.train_on, self.turns = tokenizer, train_on, turns
        self.template = ChatTemplate(tokenizer, template, options)
        self._warned = False

    def render(self, conversation: Any, place: str) -> list[Rendered]:
        """Return the examples of a conversation: one, or one for each turn if it is split.

        Args:
            conversation: as `read_conversation` takes it.
            place: for messages, such as a file and line.

        Raises:
            UserError: this is not a conversation, the template refuses it or leaves something out, or nothing has a
                label.
        """
        read = read_conversation(conversation, place)
        read = replace(
            read, messages=self.template.known_content(read.messages), tools=read.tools or self.template.tools
        )
        self.template.check_shown(read.messages, read.tools, place)
        if self.train_on == "all":
            return [Rendered(self._text(read, len(read.messages), place), None)]
        turns = [i for i in range(read.prompt, len(read.messages)) if read.messages[i]["role"] == "assistant"]
        if not turns:
            roles = ", ".join(dict.fromkeys(of["role"] for of in read.messages[read.prompt :]))
            raise UserError(place, f"only turns of {roles}", "a turn of the assistant, or data.train_on: all")
        if self.train_on == "last":
            turns = turns[-1:]
        by = self._by_marks if self.template.has_marks else self._by_prefixes
        found = by(read, turns, place)
        if any(first >= last for rendered in found for first, last in rendered.spans or ()):
            raise UserError(place, "an empty turn of the assistant", "a turn with text")
        return found

    def encode(self, conversation: Any, place: str = "conversation") -> list[tuple[list[int], list[Range]]]:
        """Return the ids and the ranges of labelled tokens of each example of a conversation."""
        return [encode_rendered(self.tokenizer, of, place) for of in self.render(conversation, place)]

    def _by_marks(self, conversation: Conversation, turns: Sequence[int], place: str) -> list[Rendered]:
        messages, tools = conversation.messages, conversation.tools
        text, marks = self.template.render_marked(messages, tools, place)
        others = turns[0] if self.train_on == "last" else conversation.prompt
        if others:
            marks = marks[len(self.template.render_marked(messages[:others], tools, place)[1]) :]
        if not marks:
            raise UserError(
                place, "no text that the chat template marks as generated", "a turn that it marks"
            )
        return [Rendered(text, tuple(marks))]

    def _by_prefixes(self, conversation: Conversation, turns: Sequence[int], place: str) -> list[Rendered]:
        messages, tools = conversation.messages, conversation.tools
        lengths = [turn + 1 for turn in turns]
        if lengths[-1] < len(messages):
            lengths.append(len(messages))
        texts = self.template.render([messages[:length] for length in lengths], tools, place)
        openings = self._openings(conversation, turns, texts[0], place)
        spans = [self._span(texts[-1], *of) for of in zip(openings, texts, strict=False)]
        fitting = tuple(span for span in spans if span is not None)
        if len(fitting) == len(spans):
            return [Rendered(texts[-1], fitting)]
        if self.turns == "refuse":
            raise UserError(
                f"{place}, message {turns[spans.index(None)] + 1}",
                "a turn whose text the chat template changes when other turns follow",
                "data.turns: split, or a template that does not change earlier turns",
            )
        return [
            Rendered(text, (self._last_span(conversation, turn, opening, text, place),))
            for turn, opening, text in zip(turns, openings, texts, strict=False)
        ]

    def _openings(
        self, conversation: Conversation, turns: Sequence[int], first: str, place: str
    ) -> list[str]:
        """Return the text after which the model would write each turn. first: the text up to the first turn's end."""
        before = [conversation.messages[:turn] for turn in turns if turn]
        openings = self.template.render(before, conversation.tools, place, prompt=True) if before else []
        if turns[0]:
            return openings
        # Nothing comes before the first turn: it begins after the same prompt as others.
        user = [[{"role": "user", "content": PROBE}]]
        without, prompted = (
            self.template.render(user, None, place, prompt=asked)[0] for asked in (False, True)
        )
        prompt = prompted.removeprefix(without)
        before_it, found, _ = first.partition(prompt) if prompt else ("", "", "")
        if not found:
            raise UserError(
                place, "a conversation that begins with the assistant", "one that begins with the user"
            )
        return [before_it + prompt, *openings]

    def _span(self, text: str, opening: str, until: str) -> Range | None:
        """Return the characters of a turn in a conversation's text, or None if the text has the turn in another form.

        Args:
            text: the whole conversation's text.
            opening: the text after which the model would write the turn.
            until: the text of the conversation up to the end of the turn.
        """
        if not text.startswith(opening):
            return None
        if text.startswith(until):
            return len(opening), self._end(until, len(opening))
        # Some templates write a special token only where a conversation ends. The whole text then lacks it after this
        # turn; it may lack nothing else.
        common = _common(text, until)
        last = self._after_special(text, len(opening), common)
        rest = until[last:]
        for token in self.template.special:
            rest = rest.replace(token, "")
        return (len(opening), last) if last and not rest.strip() else None

    def _end(self, text: str, first: int) -> int:
        """Return where the last turn of a text ends, given that it begins at `first`."""
        kept = first + len(text[first:].rstrip())
        return kept if text.endswith(self.template.special, first, kept) else len(text)

    def _after_special(self, text: str, first: int, last: int) -> int:
        """Return where the last special token between two characters ends, or 0."""
        found = ((text.rfind(token, first, last), len(token)) for token in self.template.special)
        return max((at + length for at, length in found if at >= 0), default=0)

    def _last_span(self, conversation: Conversation, turn: int, opening: str, text: str, place: str) -> Range:
        """Return the characters of the last turn of a text.

        The turn need not begin after the opening. A template may change the text before the turn once the turn follows
        (Hermes 3: a line break after a tool's answer), and its prompt for the assistant may contain more than the turn
        written later (DeepSeek R1's opens the thinking, which the turn leaves out). The turn then begins
        after the prompt, if the text contains the prompt once more than the text before the turn does. Otherwise it
        begins at the start of the line, or after the last special token, before the character where text and opening
        first differ; this is logged once.

        Raises UserError if that place lies before the end of the earlier turns.
        """
        if text.startswith(opening):
            return len(opening), self._end(text, len(opening))
        before = self._text(conversation, turn, place)
        prompt = opening.removeprefix(before) if opening.startswith(before) else ""
        if prompt and text.count(prompt) == before.count(prompt) + 1:
            first = text.rindex(prompt) + len(prompt)
            return first, self._end(text, first)
        first = _common(text, opening)
        first = max(text.rfind("\n", 0, first) + 1, self._after_special(text, 0, first))
        if first < len(before):
            raise UserError(
                place,
                "a chat template whose assistant turns do not begin with its prompt for the assistant",
                "a template that marks these turns ({% generation %})",
            )
        if not self._warned:
            self._warned = True
            log.warning(
                "%s: the chat template's prompt for the assistant is %r, but its turn begins with %r; labels begin "
                "where the two first differ",
                place,
                opening[len(before) :],
                text[len(before) : len(opening)],
            )
        return first, self._end(text, first)

    def _text(self, conversation: Conversation, length: int, place: str) -> str:
        """Return the text of the first messages of a conversation."""
        messages = conversation.messages[:length]
        return self.template.render([messages], conversation.tools, place)[0] if messages else ""


def _common(text: str, other: str) -> int:
    """Return the length of the common beginning of two texts."""
    pairs = zip(text, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))


def turn_end(tokenizer: Any, options: Mapping[str, Any] | None = None) -> int | None:
    """Return the special token that ends a turn of the assistant and has a label; None if there is none.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        options: as `data.template_options`.
    """
    asked = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}]
    try:
        ids, spans = Chat(tokenizer, options=options).encode(asked)[-1]
    except UserError as error:  # such as a template that asks for tools
        log.warning("the token that ends a turn is unknown: %s", error)
        return None
    last = ids[spans[-1][1] - 1]
    known = tokenizer.added_tokens_decoder.get(last)
    return last if known is not None and known.special else None
