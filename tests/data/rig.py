"""Make examples by hand, and turn texts into examples without a config."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from dsdistill.config.data_section import Data as Section
from dsdistill.data import Examples, Rows, Splits, Words, load_data
from dsdistill.data.sets import _Loading
from dsdistill.data.sources import read as read_rows
from dsdistill.data.sources import streams
from dsdistill.data.store import Documents, Mapped, Runs
from dsdistill.models.tokenizer import entries, fingerprint


def made(rows, labels=None, ids=None, types=None, ranges=None, spans=None, masking=None) -> Examples:
    """Return examples of these tokens, in memory.

    rows: lists of tokens; types: like them; ranges: lists of (first, past) that have labels, None: all tokens have;
    spans: lists of (first, past, kind).
    """
    lengths = [len(row) for row in rows]
    starts = np.cumsum([0, *lengths])

    def table(entries, width):
        if entries is None:
            return None
        moved = [
            [first + start, past + start, *kind]
            for of, start in zip(entries, starts, strict=False)
            for first, past, *kind in sorted(of)
        ]
        return Runs([np.array(moved, np.int32).reshape(-1, width)], [0])

    documents = Documents(
        Mapped([np.concatenate(rows).astype(np.int32)]),
        starts,
        table(ranges, 2),
        None if types is None else Mapped([np.concatenate(types).astype(np.uint8)]),
        table(spans, 3),
        Mapped([np.arange(1, 1 + len(rows))]),
        (("here", len(rows)),),
        "made by hand",
    )
    names = ids or [str(i) for i in range(len(rows))]
    return Examples(
        documents,
        torch.from_numpy(starts[:-1]),
        torch.tensor(lengths),
        None if labels is None else torch.as_tensor(labels),
        names,
        masking,
    )


def words(tokenizer) -> Words:
    return Words(tokenizer, entries(tokenizer), fingerprint(tokenizer))


def load(section: Section, task: str, tokenizer, **options) -> Splits:
    """Return the sets of a section; without a cache of its own nothing is kept."""
    if "cache" in section.model_fields_set:
        return load_data(section, task, words(tokenizer), **options)
    with tempfile.TemporaryDirectory() as folder:
        return load_data(section.model_copy(update={"cache": folder}), task, words(tokenizer), **options)


def read(section: Section, task: str) -> Splits:
    """Return the checked rows of a labelled task."""
    trains, devs, classes = read_rows(section, task)
    assert len(trains) == 1
    return Splits(trains[0], devs, classes)


def texts_of(section: Section, task: str, tokenizer, split: str = "train") -> list[tuple[str, ...]]:
    """Return the texts that a language model's set is read as, before they become tokens."""
    found = []
    reader, _ = _Loading(section, task, words(tokenizer), False, None)._reader(section)
    for stream in streams(section, getattr(section, split), task):
        found += [item.texts for item in reader.items(stream, enumerate(stream.rows()))]
    return found


def tokenize(texts, tokenizer, max_length, task, labels=None, limit=None, chunk=None, **settings) -> Examples:
    """Return texts, or pairs of them, as examples; a causal model's run through the blocks unless settings say more.

    limit: as max_train. chunk: finds words and phrases.
    """
    texts = [text if isinstance(text, tuple) else (text,) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        section = Section(
            **{
                "source": "files",
                "text": tuple("ab"[: len(texts[0])]),
                "packing": False,
                "layout": "separator",
            }
            | settings,
            max_length=max_length,
            cache=folder,
            train="rows.jsonl",
            root=folder,
        )
        loading = _Loading(section, task, words(tokenizer), False, None)
        if chunk is not None:
            loading._chunk = lambda: chunk
        if labels is not None:
            return _kept(
                loading.labelled(Rows("here", texts, labels, [str(i) for i in range(len(texts))]), section)
            )
        _write(Path(folder, "rows.jsonl"), texts)
        return _kept(loading.language(section, "rows.jsonl", limit, False))


def _write(path: Path, texts) -> None:
    import json

    lines = [json.dumps(dict(zip("ab", text, strict=False))) for text in texts]
    path.write_text("\n".join(lines), encoding="utf-8")


def _kept(examples: Examples) -> Examples:
    return examples  # its files stay mapped after the folder is removed


def lists(examples: Examples) -> list[list[int]]:
    return [examples.tokens(row).tolist() for row in range(len(examples))]
