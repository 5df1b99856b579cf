"""From the `data` section of a config to tokenised examples."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch

from dsdistill.config.errors import UserError
from dsdistill.config.schema import Data as Section
from dsdistill.data.encode import encode
from dsdistill.data.examples import Examples, Rows, Splits
from dsdistill.data.masking import HIDDEN, PREDICTED, masking
from dsdistill.data.prompted import tokenize_prompted
from dsdistill.data.sample import draw, with_noise
from dsdistill.data.sources import read
from dsdistill.data.spans import Chunks, Spans, chunks, in_blocks, pack, token_spans

Find = Callable[[Sequence[str], Sequence[str]], list[Chunks]]

AT_ONCE = 1000  # texts handed to the tokenizer in one call


def load_data(
    section: Section, task: str, tokenizer: Any, seed: int = 0, with_spans: bool = False
) -> Splits[Examples]:
    """Both splits, read, checked and tokenised.

    Args:
        section: `config.data`.
        task: that of the config.
        tokenizer: a transformers tokenizer.
        seed: of the train examples drawn and the labels replaced, where the section asks for that.
        with_spans: find words and phrases too.

    Raises:
        UserError: the data cannot be used; its message names file, row and column.
    """
    rows = read(section, task)
    find = partial(chunks, name=section.chunker, cache=section.cache) if with_spans else None
    train, dev = (
        tokenize(split, tokenizer, section.max_length, task, find) for split in (rows.train, rows.dev)
    )
    train = draw(train, section.fraction, seed)
    if section.label_noise:
        train = with_noise(train, section.label_noise, len(rows.labels), seed)
    if task == "masked_lm":
        dev = replace(dev, masking=masking(tokenizer, PREDICTED, 0.0, seed))
    predicted, hidden = dev.masking is not None, section.sampler == "random_masked"
    if predicted or hidden:
        hide = masking(tokenizer, PREDICTED * predicted, HIDDEN * hidden, seed)
        train = replace(train, masking=hide)
    return Splits(train, dev, rows.labels)


def tokenize(rows: Rows, tokenizer: Any, max_length: int, task: str, find: Find | None = None) -> Examples:
    """Rows as tokens.

    classification, regression, masked_lm: one example a row with the tokenizer's special tokens, truncated to
    max_length tokens (of a pair, the longer text first).
    causal_lm: the rows end to end, the tokenizer's eos (else sep) token between two rows where it has one,
    cut into blocks of max_length tokens; a last block below 2 tokens is dropped (it predicts nothing). Of two texts
    the first is a prompt and the second its response, one example a row (`tokenize_prompted`).

    find: words and phrases of texts, given their ids; without it the examples have no spans.
    """
    if find is not None and not tokenizer.is_fast:
        raise UserError(
            "data.tokenizer", "one that does not tell where its tokens lie", "a fast one (tokenizer.json)"
        )
    if task == "causal_lm" and len(rows.texts[0]) == 2:
        return tokenize_prompted(rows, tokenizer, max_length, find)
    if task == "causal_lm":
        return _pack(rows, tokenizer, max_length, find)
    pair = len(rows.texts[0]) == 2
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length <= special + pair:
        raise UserError(
            "data.max_length", max_length, f"above {special + pair} (of these the tokenizer adds {special})"
        )
    tokens, token_types, tables = [], [], []
    chunks = [find(texts, rows.ids) for texts in zip(*rows.texts, strict=True)] if find else []
    for start in range(0, len(rows), AT_ONCE):
        columns = [list(column) for column in zip(*rows.texts[start : start + AT_ONCE], strict=True)]
        encoded = encode(
            tokenizer,
            rows.place,
            *columns,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
        )
        tokens += encoded["input_ids"]
        token_types += encoded.get("token_type_ids", ())
        if find:
            tables += [
                _spans_of(encoding, [of[start + i] for of in chunks])
                for i, encoding in enumerate(encoded.encodings)
            ]
    for row, ids in enumerate(tokens):
        if not ids:  # would look like filler
            raise UserError(rows.place, f"row {rows.ids[row]!r} without a token", "text that gives tokens")
    label_type = torch.int64 if task == "classification" else torch.float32
    return Examples(
        tokens=_flat(tokens, np.int32),
        starts=torch.from_numpy(np.cumsum([0, *map(len, tokens)])),
        labels=None if rows.labels is None else torch.tensor(rows.labels, dtype=label_type),
        ids=rows.ids,
        token_types=_flat(token_types, np.uint8) if token_types else None,
        spans=pack(tables) if find else None,
    )


def _spans_of(encoding: Any, chunks: list[Chunks]) -> np.ndarray:
    """(spans, 3) of one example, from the words and phrases of each of its texts."""
    offsets, texts = (
        np.array(encoding.offsets),
        np.array([-1 if i is None else i for i in encoding.sequence_ids]),
    )
    return np.concatenate(
        [token_spans(np.where(texts[:, None] == i, offsets, 0), of) for i, of in enumerate(chunks)]
    )


def _pack(rows: Rows, tokenizer: Any, max_length: int, find: Find | None) -> Examples:
    between = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    wanted = None if rows.limit is None else rows.limit * max_length
    documents, offsets, count = [], [], 0
    for start in range(0, len(rows), AT_ONCE):
        texts = ["\n".join(texts) for texts in rows.texts[start : start + AT_ONCE]]
        encoded = encode(
            tokenizer, rows.place, texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        for i, ids in enumerate(encoded["input_ids"]):
            separated = bool(documents) and between is not None
            if separated:
                ids = [between, *ids]
            documents.append(np.asarray(ids, dtype=np.int32))
            count += len(ids)
            if find:
                offsets.append(np.array([(0, 0)] * separated + encoded.encodings[i].offsets).reshape(-1, 2))
        if wanted is not None and count >= wanted:
            break
    tokens = np.concatenate(documents)[:wanted]
    if len(tokens) % max_length == 1:
        tokens = tokens[:-1]
    if not len(tokens):
        raise UserError(rows.place, f"a text of {count} tokens", "at least 2 tokens")
    starts = [*range(0, len(tokens), max_length), len(tokens)]
    ids = [str(block) for block in range(len(starts) - 1)]
    spans = _packed_spans(rows, offsets, starts, find) if find else None
    return Examples(torch.from_numpy(tokens), torch.tensor(starts), None, ids, spans=spans)


def _packed_spans(rows: Rows, offsets: list[np.ndarray], starts: list[int], find: Find) -> Spans:
    """offsets: of the tokens of each document, as they were laid end to end; starts: of the blocks."""
    at = np.cumsum([0, *map(len, offsets)])
    used = int(np.searchsorted(at, starts[-1]))
    texts = ["\n".join(texts) for texts in rows.texts[:used]]
    kept = offsets[used - 1][: starts[-1] - at[used - 1]]
    texts[-1] = texts[-1][: kept[:, 1].max(initial=0)]  # perhaps all of it is one long text
    chunks = find(texts, rows.ids[:used])
    tables = [
        token_spans(own, of) + np.array([start, start, 0])
        for own, of, start in zip(offsets, chunks, at, strict=False)
    ]
    return pack(in_blocks(np.concatenate(tables), starts))


def _flat(lists: list[list[int]], dtype: Callable) -> torch.Tensor:
    return torch.from_numpy(np.fromiter(chain.from_iterable(lists), dtype=dtype))
