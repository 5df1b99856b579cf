"""Prompts and responses for causal language models: one example a row, the response alone to be predicted."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dsdistill.config.errors import UserError
from dsdistill.data.encode import encode
from dsdistill.data.examples import Examples, Rows
from dsdistill.data.spans import pack, token_spans

AT_ONCE = 1000  # texts handed to the tokenizer in one call


def tokenize_prompted(rows: Rows, tokenizer: Any, max_length: int, find: Callable | None = None) -> Examples:
    """Rows of (prompt, response) as tokens: start, prompt, between, response, end.

      start    the tokenizer's class token, or the token that begins a text where that is not the one that ends it
      between  its separator; without one a line break
      end      the token that ends a text, else its separator: where greedy decoding stops

    So BERT's tokenizer gives [CLS] prompt [SEP] response [SEP], that of GPT-2 prompt ⏎ response <|endoftext|>.
    Texts longer than max_length lose tokens at their ends, the prompt first: the response keeps half of the room at
    least, all that the prompt leaves, and its end token only where it is whole. `prompts` counts the tokens up to the
    response; they are context without a label. Spans lie in both texts.

    Raises:
        UserError: no end token, no room for two texts, or a row whose response is empty.
    """
    start, between, end = special_tokens(tokenizer)
    room = max_length - len(start) - len(between)
    if room < 2:
        added = len(start) + len(between)
        raise UserError("data.max_length", max_length, f"at least {added + 2} (the layout adds {added})")
    chunks = [find(texts, rows.ids) for texts in zip(*rows.texts, strict=True)] if find else []
    tokens, prompts, tables = [], [], []
    for at in range(0, len(rows), AT_ONCE):
        columns = (list(column) for column in zip(*rows.texts[at : at + AT_ONCE], strict=True))
        encoded = [
            encode(
                tokenizer,
                rows.place,
                column,
                add_special_tokens=False,
                return_attention_mask=False,
                verbose=False,
            )
            for column in columns
        ]
        for i, (prompt, response) in enumerate(zip(*(of["input_ids"] for of in encoded), strict=True)):
            if not response:
                raise UserError(
                    rows.place, f"row {rows.ids[at + i]!r} with an empty response", "text that gives tokens"
                )
            response = [*response, *end][: max(room - len(prompt), (room + 1) // 2)]
            prompt = prompt[: room - len(response)]
            before = len(start) + len(prompt) + len(between)
            tokens.append(np.array([*start, *prompt, *between, *response], dtype=np.int32))
            prompts.append(before)
            if find:
                places = (len(start), len(prompt)), (before, len(response))
                tables.append(
                    np.concatenate(
                        [
                            token_spans(
                                _offsets(of.encodings[i].offsets, *place, len(tokens[-1])), spans[at + i]
                            )
                            for of, place, spans in zip(encoded, places, chunks, strict=True)
                        ]
                    )
                )
    return Examples(
        tokens=torch.from_numpy(np.concatenate(tokens)),
        starts=torch.from_numpy(np.cumsum([0, *map(len, tokens)])),
        labels=None,
        ids=rows.ids,
        spans=pack(tables) if find else None,
        prompts=torch.tensor(prompts),
    )


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """Before the prompt, between prompt and response, after the response."""
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


def _offsets(offsets: list[tuple[int, int]], place: int, most: int, length: int) -> np.ndarray:
    """(length, 2): a text's characters of each token of an example, where `most` of its tokens begin at `place`."""
    table = np.zeros((length, 2), dtype=np.int64)
    kept = np.array(offsets[:most], dtype=np.int64).reshape(-1, 2)
    table[place : place + len(kept)] = kept
    return table
