"""Turn texts into tokens with a given tokenizer, and report its failures in one line."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dsdistill.config.errors import UserError

Encoded = tuple[
    np.ndarray, list[tuple[int, int]] | None
]  # (n,) int32 ids, and the characters of each or None


def encode(tokenizer: Any, place: str, *texts: list[str], **options: Any) -> Any:
    """Return the tokenizer's output for the texts.

    Raises UserError if it fails: its patterns may fail on some text, and its ids may be invalid.
    """
    return _guarded(tokenizer, place, *texts, **options)


def _guarded(function: Any, place: str, *arguments: Any, **options: Any) -> Any:
    try:
        return function(*arguments, **options)
    except BaseException as error:
        # A panic of the tokenizers library is not a subclass of Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            place, f"texts on which the tokenizer fails ({reason})", "a tokenizer that can encode them"
        ) from None


class PlainEncoder:
    """Tokenise texts as they are: nothing is added, cut or padded.

    A fast tokenizer's core is called directly: it encodes many texts at once on all cores, and makes none of the lists
    and objects that the library's own call makes for each token.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.fast = tokenizer._tokenizer if getattr(tokenizer, "is_fast", False) else None
        if self.fast is not None:
            self.fast.no_truncation()
            self.fast.no_padding()

    def __call__(self, texts: Sequence[str], place: str, offsets: bool = False) -> list[Encoded]:
        """Return the ids of each text and, with `offsets`, the characters of each token.

        Raises UserError for texts that the tokenizer fails on; `place` says where they come from.
        """
        if self.fast is None:
            options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
            found = encode(self.tokenizer, place, list(texts), **options)["input_ids"]
            return [(np.asarray(ids, dtype=np.int32), None) for ids in found]
        batch = self.fast.encode_batch if offsets else self.fast.encode_batch_fast
        found = _guarded(batch, place, list(texts), add_special_tokens=False)
        if not offsets:
            return [(np.array(encoding.ids, dtype=np.int32), None) for encoding in found]
        return [(np.array(encoding.ids, dtype=np.int32), encoding.offsets) for encoding in found]

    def short(self, text: str) -> np.ndarray:
        """Return (n,) int32 ids of a short text, encoded on this thread so that it does not wait for other texts."""
        if self.fast is None:
            return self([text], "data")[0][0]
        return np.array(
            _guarded(self.fast.encode, "data", text, add_special_tokens=False).ids, dtype=np.int32
        )


def edges(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens before and after every document of plain text.

    Before a document comes the begin token, if the tokenizer itself puts one before texts (Llama 3, Gemma). After it
    comes the end token or, for a tokenizer without one, the separator, if there is one.
    """
    begin = tokenizer.bos_token_id
    if begin is not None and (tokenizer("a")["input_ids"] or [None])[0] != begin:
        begin = None
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return [begin] if begin is not None else [], [end] if end is not None else []
