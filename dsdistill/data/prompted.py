"""Prompts and responses in a layout of special tokens, for tokenizers without a chat template."""

from typing import Any

import numpy as np

from dsdistill.config.errors import UserError

Special = tuple[
    list[int], list[int], list[int]
]  # before the prompt, between prompt and response, after the response


def separated(
    prompt: np.ndarray, response: np.ndarray, special: Special, most: int
) -> tuple[np.ndarray, int, tuple[tuple[int, int], tuple[int, int]]]:
    """Return the tokens of an example: start, prompt, between, response, end.

      start    the tokenizer's class token, or the token that begins a text where that is not the one that ends it
      between  its separator; without one a line break
      end      the token that ends a text, else its separator: where greedy decoding stops

    So BERT's tokenizer gives [CLS] prompt [SEP] response [SEP], that of GPT-2 prompt ⏎ response <|endoftext|>.
    Texts longer than `most` tokens lose tokens at their ends, the prompt first: the response keeps half of the room at
    least, all that the prompt leaves, and its end token only where it is whole.

    Args:
        prompt, response: (n,) ids.
        special: of `special_tokens`.
        most: tokens of an example.

    Returns:
        (n,) int32 ids, how many of them come before the response, and where prompt and response begin and how many of
        their tokens are kept.
    """
    start, between, end = special
    room = most - len(start) - len(between)
    kept = np.concatenate([response, end])[: max(room - len(prompt), (room + 1) // 2)]
    asked = prompt[: room - len(kept)]
    before = len(start) + len(asked) + len(between)
    ids = np.concatenate([start, asked, between, kept]).astype(np.int32)
    return ids, before, ((len(start), len(asked)), (before, min(len(response), len(kept))))


def special_tokens(tokenizer: Any) -> Special:
    """Return the tokens before the prompt, between prompt and response, and after the response.

    Raises UserError for a tokenizer without a token that ends a text.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise UserError(
            "data.tokenizer", "one without a token that ends a text", "one with an eos or sep token"
        )
    first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    start = [] if first in (None, end) else [first]
    separator = tokenizer.sep_token_id
    between = tokenizer("\n", add_special_tokens=False)["input_ids"] if separator is None else [separator]
    return start, between, [end]
