"""Text that is ready for the tokenizer, and which of its characters and tokens have labels."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsdistill.data.encode import encode

Range = tuple[int, int]  # the first, and one past the last


@dataclass(frozen=True)
class Rendered:
    """One example as text. It is tokenised without special tokens; those it needs stand in it or are named here."""

    text: str
    spans: tuple[Range, ...] | None  # characters that have labels, in order and apart; None: all of them
    start: tuple[int, ...] = ()  # ids before the text's, without a label unless all have one
    end: tuple[int, ...] = ()  # ids after the text's, with labels


def labelled(offsets: Sequence[Range], spans: Sequence[Range]) -> list[Range]:
    """Return the tokens that begin inside of the spans, as ranges.

    A token across the first border of a span began in what comes before and has no label: after the prompt alone,
    the model could not write it. A token across the last border has one.

    Args:
        offsets: of each token its characters, (first, one past the last), in the order of the text.
        spans: runs of characters, in the same form and order.

    Returns:
        Ranges of tokens that are not empty, in order.
    """
    ranges = [(_border(offsets, first), _border(offsets, last)) for first, last in spans]
    return [(first, last) for first, last in ranges if first < last]


def lay_out(
    rendered: Rendered, ids: Sequence[int], offsets: Sequence[Range]
) -> tuple[list[int], list[Range]]:
    """Return all ids of an example and its ranges of labelled tokens.

    Args:
        rendered: the example.
        ids: what the tokenizer makes of its text, without special tokens.
        offsets: of each of these ids its characters.
    """
    whole = [*rendered.start, *ids, *rendered.end]
    if rendered.spans is None:
        return whole, [(0, len(whole))] if whole else []
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
    return lay_out(rendered, encoded["input_ids"], encoded["offset_mapping"])


def _border(offsets: Sequence[Range], character: int) -> int:
    """Return the first token that begins at a character or after it."""
    token = bisect_left(offsets, (character,))
    # Byte-level tokenizers may trim spaces from the offsets: a token of spaces alone then lies, empty, where it ends.
    while (
        0 < token < len(offsets)
        and offsets[token] == (character, character)
        and offsets[token - 1][1] < character
    ):
        token += 1
    return token
