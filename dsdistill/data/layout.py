"""Render prompts and responses as text: as two turns of a conversation, or one text after the other."""

import functools
import logging
from typing import Any

from dsdistill.config.data_section import Data, Layout
from dsdistill.config.errors import UserError
from dsdistill.data.chat import Chat
from dsdistill.data.prompted import special_tokens
from dsdistill.data.rendered import Rendered

log = logging.getLogger("dsdistill")


def default_layout(tokenizer: Any, data: Data) -> Layout:
    """Return the layout: as set, else `template` if there is a chat template, else `separator`."""
    if data.layout is not None:
        return data.layout
    layout: Layout = "template" if data.chat_template or tokenizer.chat_template else "separator"
    why = "there is a chat template" if layout == "template" else "the tokenizer has no chat template"
    _tell(layout, why)
    return layout


@functools.cache  # train and dev sets both ask; one message is enough
def _tell(layout: str, why: str) -> None:
    log.info("prompts and responses: data.layout is %s, because %s", layout, why)


def render_template(chat: Chat, prompt: str, response: str, place: str) -> Rendered:
    """Return a prompt as the user's turn and a response as the assistant's.

    Raises:
        UserError: an empty response, or texts that the template refuses.
    """
    _check(response, place)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    (rendered,) = chat.render(turns, place)
    return rendered


class Raw:
    """Put responses directly after their prompts; only the response has labels.

    The begin token is added if the tokenizer itself puts one before texts and the text does not begin with it. The end
    token is added unless the response ends with a special token.

    Raises:
        UserError: the tokenizer has no end token or separator.
    """

    def __init__(self, tokenizer: Any):
        start, _, self._end = special_tokens(tokenizer)
        self._start = [token for token in start if token in tokenizer("")["input_ids"]]
        self._first = tuple(tokenizer.convert_ids_to_tokens(self._start))
        self._special = tuple(tokenizer.all_special_tokens)

    def render(self, prompt: str, response: str, place: str) -> Rendered:
        """Return the example of a prompt and its response; raise UserError, with the place, for an empty response."""
        _check(response, place)
        text, said = prompt + response, response.rstrip()
        start = () if text.startswith(self._first) else self._start
        ended = said.endswith(self._special)
        last = len(prompt) + len(said if ended else response)
        return Rendered(text, ((len(prompt), last),), tuple(start), () if ended else tuple(self._end))


def _check(response: str, place: str) -> None:
    if not response:
        raise UserError(place, "an empty response", "text")
