"""Lay out prompts and responses with special tokens, for tokenizers without a chat template."""

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

      start    the tokenizer's class token, or its begin token if that is not the end token, too
      between  its separator; without one a line break
      end      its end token, else its separator: greedy decoding stops there

    So BERT's tokenizer gives [CLS] prompt [SEP] response [SEP], and GPT-2's gives prompt ⏎ response <|endoftext|>.
    In examples longer than `most` tokens, both texts lose tokens at their ends, the prompt first. The response keeps at
    least half of the room, and all that the prompt does not fill. It keeps its end token only if it is whole.

    Args:
        prompt, response: (n,) ids.
        special: as `special_tokens` returns them.
        most: most tokens of an example.

    Returns:
        (n,) int32 ids; how many of them come before the response; and for prompt and response where they begin and how
        many of their tokens are kept.
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

    Raises UserError for a tokenizer without an end token or separator.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise UserError("data.tokenizer", "a tokenizer without an end token", "one with an eos or sep token")
    first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    start = [] if first in (None, end) else [first]
    separator = tokenizer.sep_token_id
    between = tokenizer("\n", add_special_tokens=False)["input_ids"] if separator is None else [separator]
    return start, between, [end]
