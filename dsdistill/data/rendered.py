"""Hold text that is ready for the tokenizer, and find which of its characters and tokens have labels."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsdistill.data.encode import encode

Range = tuple[int, int]  # the first, and one past the last


@dataclass(frozen=True)
class Rendered:
    """Hold one example as text. The tokenizer adds no special tokens: they are in the text, or in `start` and `end`."""

    text: str
    spans: tuple[Range, ...] | None  # characters that have labels, in order, without overlap; None: all
    start: tuple[int, ...] = ()  # ids before the text's, without a label unless all have one
    end: tuple[int, ...] = ()  # ids after the text's, with labels


def labelled(offsets: Sequence[Range], spans: Sequence[Range]) -> list[Range]:
    """Return the tokens that begin inside the spans, as ranges.

    A token that crosses the beginning of a span has no label: it begins in the prompt, so the model could not write it
    after the prompt. A token that crosses the end of a span has a label.

    Args:
        offsets: the characters of each token, (first, one past the last), in the order of the text.
        spans: runs of characters, in the same form and order.

    Returns:
        Non-empty ranges of tokens, in order.
    """
    ranges = [(_border(offsets, first), _border(offsets, last)) for first, last in spans]
    return [(first, last) for first, last in ranges if first < last]


def lay_out(
    rendered: Rendered, ids: Sequence[int] | np.ndarray, offsets: Sequence[Range]
) -> tuple[np.ndarray, list[Range]]:
    """Return (n,) int32, all ids of an example, and its ranges of labelled tokens.

    Args:
        rendered: the example.
        ids: the tokens of its text, without special tokens.
        offsets: the characters of each of these ids.
    """
    whole = np.concatenate([rendered.start, ids, rendered.end]).astype(np.int32)
    if rendered.spans is None:
        return whole, [(0, len(whole))] if len(whole) else []
    before, after = len(rendered.start), len(whole) - len(rendered.end)
    ranges = [(first + before, last + before) for first, last in labelled(offsets, rendered.spans)]
    if rendered.end:
        first = ranges.pop()[0] if ranges and ranges[-1][1] == after else after
        ranges.append((first, len(whole)))
    return whole, ranges


def encode_rendered(tokenizer: Any, rendered: Rendered, place: str) -> tuple[list[int], list[Range]]:
    """Return the ids and the labelled ranges of one example, as `lay_out` does; `place` is for messages."""
    encoded = encode(
        tokenizer,
        place,
        rendered.text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    whole, ranges = lay_out(rendered, encoded["input_ids"], encoded["offset_mapping"])
    return whole.tolist(), ranges


def _border(offsets: Sequence[Range], character: int) -> int:
    """Return the first token that begins at a character or after it."""
    token = bisect_left(offsets, (character,))
    # Byte-level tokenizers may trim spaces from the offsets: a token of only spaces then has an empty range at its end.
    while (
        0 < token < len(offsets)
        and offsets[token] == (character, character)
        and offsets[token - 1][1] < character
    ):
        token += 1
    return token
