"""Turn texts into tokens with a tokenizer that somebody else made; its failures are one line."""

from typing import Any

from dsdistill.config.errors import UserError


def encode(tokenizer: Any, place: str, *texts: list[str], **options: Any) -> Any:
    """Return what the tokenizer makes of the texts.

    Raises UserError where it fails: its patterns may give up on some text, and its ids need not be ids.
    """
    try:
        return tokenizer(*texts, **options)
    except BaseException as error:
        # A panic of the tokenizers library is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            place, f"texts that the tokenizer fails on ({reason})", "a tokenizer for such texts"
        ) from None
