"""From the `data` section of a config to tokenised examples."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import torch

from dsdistill.config.errors import UserError
from dsdistill.config.schema import Data as Section
from dsdistill.data.examples import Data, Examples, Rows
from dsdistill.data.sample import draw, with_noise
from dsdistill.data.sources import read

AT_ONCE = 1000  # texts handed to the tokenizer in one call


def load(section: Section, task: str, tokenizer: Any, seed: int = 0) -> Data[Examples]:
    """Both splits, read, checked and tokenised.

    Args:
        section: `config.data`.
        task: classification, regression or causal_lm.
        tokenizer: a transformers tokenizer.
        seed: of the train examples drawn and the labels replaced, where the section asks for that.

    Raises:
        UserError: the data cannot be used; its message names file, row and column.
    """
    rows = read(section, task)
    train, dev = (tokenize(split, tokenizer, section.max_length, task) for split in (rows.train, rows.dev))
    train = draw(train, section.fraction, seed)
    if section.label_noise:
        train = with_noise(train, section.label_noise, len(rows.labels), seed)
    return Data(train, dev, rows.labels)


def tokenize(rows: Rows, tokenizer: Any, max_length: int, task: str) -> Examples:
    """Rows as tokens.

    classification, regression: one example a row with the tokenizer's special tokens, truncated to max_length
    tokens (of a pair, the longer text first).
    causal_lm: the rows end to end, the tokenizer's eos (else sep) token between two rows where it has one,
    cut into blocks of max_length tokens; a last block below 2 tokens is dropped (it predicts nothing).
    """
    if task == "causal_lm":
        return _pack(rows, tokenizer, max_length)
    pair = len(rows.texts[0]) == 2
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length <= special + pair:
        raise UserError(
            "data.max_length", max_length, f"above {special + pair} (of these the tokenizer adds {special})"
        )
    tokens, token_types = [], []
    for start in range(0, len(rows), AT_ONCE):
        columns = [list(column) for column in zip(*rows.texts[start : start + AT_ONCE], strict=True)]
        encoded = tokenizer(*columns, truncation=True, max_length=max_length, return_attention_mask=False)
        tokens += encoded["input_ids"]
        token_types += encoded.get("token_type_ids", ())
    for row, ids in enumerate(tokens):
        if not ids:  # would look like filler
            raise UserError(rows.place, f"row {rows.ids[row]!r} without a token", "text that gives tokens")
    label_type = torch.int64 if task == "classification" else torch.float32
    return Examples(
        tokens=_flat(tokens, np.int32),
        starts=torch.from_numpy(np.cumsum([0, *map(len, tokens)])),
        labels=torch.tensor(rows.labels, dtype=label_type),
        ids=rows.ids,
        token_types=_flat(token_types, np.uint8) if token_types else None,
    )


def _pack(rows: Rows, tokenizer: Any, max_length: int) -> Examples:
    between = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    wanted = None if rows.limit is None else rows.limit * max_length
    documents, count = [], 0
    for start in range(0, len(rows), AT_ONCE):
        texts = ["\n".join(texts) for texts in rows.texts[start : start + AT_ONCE]]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for ids in encoded["input_ids"]:
            if documents and between is not None:
                ids = [between, *ids]
            documents.append(np.asarray(ids, dtype=np.int32))
            count += len(ids)
        if wanted is not None and count >= wanted:
            break
    tokens = np.concatenate(documents)[:wanted]
    if len(tokens) % max_length == 1:
        tokens = tokens[:-1]
    if not len(tokens):
        raise UserError(rows.place, f"a text of {count} tokens", "at least 2 tokens")
    starts = [*range(0, len(tokens), max_length), len(tokens)]
    ids = [str(block) for block in range(len(starts) - 1)]
    return Examples(torch.from_numpy(tokens), torch.tensor(starts), None, ids)


def _flat(lists: list[list[int]], dtype: Callable) -> torch.Tensor:
    return torch.from_numpy(np.fromiter(chain.from_iterable(lists), dtype=dtype))
