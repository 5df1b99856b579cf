"""Cut long texts into pieces whose tokens, one after the other, are the tokens of the whole text.

A tokenizer takes far more memory and time for a whole book than for its chapters, and uses only one core for it.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from dsdistill.data.encode import PlainEncoder

PIECE = 2**15  # characters
WINDOW = 256  # characters on either side of a cut that are tokenised to check that no token changes
_TRIED = 4  # most cuts of one kind that are tried
# Where a text may be cut, the best first: at blank lines, at line ends, between words. Some tokenizers join all line
# feeds in a row, others keep the last one apart, so both sides of it are tried.
_PLACES = tuple(map(re.compile, (r"\n\s*\n(?=\S)", r"\n\s*(?=\n\S)", r"\n(?=\S)", r"\S(?=\s\S)")))


class Cutter:
    """Cut the texts that one tokenizer reads."""

    def __init__(self, tokenizer: Any):
        self._encode = PlainEncoder(tokenizer)

    def pieces(self, parts: Iterable[str]) -> Iterator[str]:
        """Yield the pieces of a text that comes in parts, such as lines; each has about PIECE characters.

        A text that cannot be cut anywhere without changing its tokens is one piece.
        """
        held, size, wanted = [], 0, 2 * PIECE
        small = (part[i : i + PIECE] for part in parts for i in range(0, max(1, len(part)), PIECE))
        for part in small:
            held.append(part)
            size += len(part)
            while size >= wanted:
                text = "".join(held)
                cut = self._cut(text)
                if cut is None:
                    held, wanted = [text], 2 * size
                    break
                yield text[:cut]
                held, size, wanted = [text[cut:]], size - cut, 2 * PIECE
        if size:
            yield "".join(held)

    def _cut(self, text: str) -> int | None:
        """Return a place near the middle of the first two pieces where a cut changes no token."""
        for pattern in _PLACES:
            found = pattern.finditer(text, PIECE // 2, max(2 * PIECE, len(text) - WINDOW))
            near = (match.end() for match, _ in zip(found, range(2**10), strict=False))
            for cut in sorted(near, key=lambda place: abs(place - PIECE))[:_TRIED]:
                if self._exact(text[max(0, cut - WINDOW) : cut], text[cut : cut + WINDOW]):
                    return cut
        return None

    def _exact(self, left: str, right: str) -> bool:
        parts = [self._encode.short(part) for part in (left, right)]
        return np.array_equal(self._encode.short(left + right), np.concatenate(parts))
