"""Turn the rows of a source into documents of tokens, with a reader for each task and layout.

A reader goes through the rows one by one and yields items; many items are tokenised together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np

from dsdistill.config.errors import UserError
from dsdistill.data.chunkers import Chunker
from dsdistill.data.encode import PlainEncoder, edges, encode
from dsdistill.data.pieces import Cutter
from dsdistill.data.prompted import separated, special_tokens
from dsdistill.data.rendered import Rendered, lay_out
from dsdistill.data.spans import found_chunks, token_spans
from dsdistill.data.table import Row, Stream, no_column


@dataclass(frozen=True)
class Item:
    """Hold one or two texts that become a document, or a piece of a long one."""

    texts: tuple[str, ...]
    row: int  # of the stream, from 0: reading continues here after a stop
    line: int  # its line or row number in the stream, for messages
    piece: int = 0  # its number within its row; a row may also give several documents
    begins: bool = True  # whether it begins a document; otherwise it continues the piece before
    ends: bool = True  # whether it ends a document
    rendered: Rendered | None = None  # for a conversation: which parts of its text have labels


@dataclass(frozen=True)
class Document:
    """Hold the tokens of an item."""

    item: Item
    ids: np.ndarray  # (n,) int32
    ranges: np.ndarray | None = None  # (k, 2) int32, runs of tokens that have labels; None: all tokens
    types: np.ndarray | None = None  # (n,) uint8
    spans: np.ndarray | None = None  # (s, 3) int32: first token, one past the last, kind
    truncated: bool = False


class Reader(Protocol):
    """Turn rows into items, and items into documents."""

    settings: dict[str, Any]  # all settings that change its documents
    columns: tuple[str, ...]  # the columns that it reads

    def items(self, stream: Stream, rows: Iterator[tuple[int, Row]]) -> Iterator[Item]:
        """Yield the items of numbered rows; raise UserError for a row that cannot be used."""

    def documents(self, items: Sequence[Item], place: str) -> list[Document]:
        """Return a document for each item."""


class PlainReader:
    """Read plain text for causal language models, with begin and end tokens as `edges` says."""

    def __init__(self, tokenizer: Any, column: str, chunk: Chunker | None = None):
        self._encode, self._cutter = PlainEncoder(tokenizer), Cutter(tokenizer)
        self._edges, self._chunk = edges(tokenizer), chunk
        self.columns = (column, "text_a")
        self.settings = {"layout": "plain", "edges": self._edges, "column": column}

    def items(self, stream: Stream, rows: Iterator[tuple[int, Row]]) -> Iterator[Item]:
        """Yield the pieces of each row's text; the lines of a text file are one text."""
        if stream.plain:
            yield from self._pieces((row["text"] for _, (_, row) in rows), 0, 1)
            return
        for number, (line, row) in rows:
            text = _text(stream, line, row, _present(self.columns, row, stream))
            if text.strip():
                yield from self._pieces([text], number, line)

    def _pieces(self, parts, row: int, line: int) -> Iterator[Item]:
        before = None
        for piece, text in enumerate(self._cutter.pieces(parts)):
            if before is not None:
                yield before
            before = Item((text,), row, line, piece, begins=piece == 0, ends=False)
        if before is not None and (before.piece or before.texts[0].strip()):
            yield Item(before.texts, row, line, before.piece, before.begins, ends=True)

    def documents(self, items: Sequence[Item], place: str) -> list[Document]:
        """Return the tokens of each piece, with the begin and end tokens of its document."""
        begin, end = self._edges
        found = self._encode([item.texts[0] for item in items], place, offsets=self._chunk is not None)
        documents = []
        for item, (ids, offsets) in zip(items, found, strict=True):
            before = begin if item.begins and ids[:1].tolist() != begin else []
            after = end if item.ends and ids[-1:].tolist() != end else []
            whole = np.concatenate([before, ids, after]).astype(np.int32)
            spans = None
            if self._chunk is not None:
                chunks = next(found_chunks(item.texts, self._chunk))
                spans = token_spans(np.array(offsets).reshape(-1, 2), chunks) + np.array(
                    [len(before), len(before), 0]
                )
            documents.append(Document(item, whole, spans=spans))
        return documents


class RenderedReader:
    """Read conversations, or prompts and responses, as texts in which some characters have labels."""

    def __init__(
        self,
        tokenizer: Any,
        columns: tuple[str, ...],
        render: Callable[[tuple[Any, ...], str], list[Rendered]],
        settings: dict[str, Any],
        chunk: Chunker | None = None,
    ):
        """Make a reader.

        render: returns the texts for the values of a row's columns; its second argument names the row in messages.
        """
        self._encode, self._render, self._chunk = PlainEncoder(tokenizer), render, chunk
        self.columns = columns
        self.settings = settings | {"columns": columns}

    def items(self, stream: Stream, rows: Iterator[tuple[int, Row]]) -> Iterator[Item]:
        """Yield the rendered text of each row; a conversation may be split into several."""
        if stream.plain:
            raise UserError(stream.place, "plain text", f"a file with a column {self.columns[0]}")
        for number, (line, row) in rows:
            names = _present(self.columns, row, stream) if len(self.columns) == 4 else self.columns
            values = tuple(_value(stream, line, row, name) for name in names)
            if len(names) == 1 and row.get("tools"):
                values = ({"messages": values[0], "tools": row["tools"]},)
            for piece, rendered in enumerate(self._render(values, stream.at(line))):
                yield Item((rendered.text,), number, line, piece, rendered=rendered)

    def documents(self, items: Sequence[Item], place: str) -> list[Document]:
        """Return the tokens of each text, with those that the layout puts before and after it."""
        documents = []
        found = self._encode([item.texts[0] for item in items], place, offsets=True)
        for item, (ids, offsets) in zip(items, found, strict=True):
            assert item.rendered is not None and offsets is not None
            whole, ranges = lay_out(item.rendered, ids, offsets)
            spans = None
            if self._chunk is not None:
                chunks = next(found_chunks(item.texts, self._chunk))
                shift = len(item.rendered.start)
                spans = token_spans(np.array(offsets).reshape(-1, 2), chunks) + np.array([shift, shift, 0])
            table = np.array(ranges, dtype=np.int32).reshape(-1, 2)
            documents.append(Document(item, whole, table, spans=spans))
        return documents


class SeparatedReader:
    """Read prompts and responses in a layout of special tokens; see data/prompted.py."""

    def __init__(
        self, tokenizer: Any, columns: tuple[str, str], max_length: int, chunk: Chunker | None = None
    ):
        self._encode, self._chunk, self._most = PlainEncoder(tokenizer), chunk, max_length
        self._special = special_tokens(tokenizer)
        added = sum(map(len, self._special[:2]))
        if max_length - added < 2:
            raise UserError("data.max_length", max_length, f"at least {added + 2} (the layout adds {added})")
        self.columns = (*columns, "text_a", "text_b")
        self.settings = {
            "layout": "separator",
            "columns": columns,
            "special": self._special,
            "max_length": max_length,
        }

    def items(self, stream: Stream, rows: Iterator[tuple[int, Row]]) -> Iterator[Item]:
        """Yield the prompt and response of each row."""
        for item in _pairs(stream, rows, self.columns):
            if not item.texts[1].strip():
                raise UserError(stream.at(item.line), "an empty response", "text with at least one token")
            yield item

    def documents(self, items: Sequence[Item], place: str) -> list[Document]:
        """Return start, prompt, between, response and end of each row."""
        texts = list(chain.from_iterable(item.texts for item in items))
        found = self._encode(texts, place, offsets=self._chunk is not None)
        documents = []
        for item, prompt, response in zip(items, found[::2], found[1::2], strict=True):
            if not len(response[0]):
                raise UserError(
                    place, f"row {item.line} with an empty response", "text with at least one token"
                )
            ids, before, kept = separated(prompt[0], response[0], self._special, self._most)
            spans = None
            if self._chunk is not None:
                parts = zip((prompt, response), found_chunks(item.texts, self._chunk), kept, strict=True)
                tables = [
                    token_spans(np.array(of[1][:count]).reshape(-1, 2), chunks) + np.array([at, at, 0])
                    for of, chunks, (at, count) in parts
                ]
                spans = np.concatenate(tables)
            ranges = np.array([[before, len(ids)]], dtype=np.int32)
            whole = sum(map(len, (*self._special, prompt[0], response[0])))
            documents.append(Document(item, ids, ranges, spans=spans, truncated=whole > len(ids)))
        return documents


class SpecialReader:
    """Read one text or a pair with the tokenizer's special tokens, truncated to max_length (the longer text first)."""

    def __init__(
        self,
        tokenizer: Any,
        columns: tuple[str, ...],
        max_length: int,
        chunk: Chunker | None = None,
        labelled: bool = False,
        prompt: str = "",
    ):
        """Make a reader.

        labelled: whether rows have labels; blank rows are then kept, too. prompt: text put before a single text.
        """
        special = tokenizer.num_special_tokens_to_add(pair=len(columns) == 2)
        if max_length <= special + len(columns) - 1:
            least = special + len(columns) - 1
            raise UserError(
                "data.max_length", max_length, f"above {least} (the tokenizer adds {special} special tokens)"
            )
        self._tokenizer, self._most, self._chunk = tokenizer, max_length, chunk
        self._labelled, self._prompt = labelled, prompt
        self.columns = (*columns, "text_a", "text_b")[: 2 * len(columns)]
        self._wanted = columns
        self.settings = {"layout": "special", "columns": columns, "max_length": max_length}
        if prompt:  # earlier stores lack this key
            self.settings["prompt"] = prompt

    def items(self, stream: Stream, rows: Iterator[tuple[int, Row]]) -> Iterator[Item]:
        """Yield the texts of each row (in text files: of each line); blank single texts are left out."""
        if len(self._wanted) == 2:
            yield from _pairs(stream, rows, self.columns)
            return
        for number, (line, row) in rows:
            column = "text" if stream.plain else _present((*self._wanted, "text_a"), row, stream)[0]
            text = _text(stream, line, row, (column,))
            if stream.plain:
                text = text.removesuffix("\n")
            if text.strip() or self._labelled:
                yield Item((self._prompt + text,), number, line)

    def documents(self, items: Sequence[Item], place: str) -> list[Document]:
        """Return the tokens of each row."""
        columns = [list(column) for column in zip(*(item.texts for item in items), strict=True)]
        encoded = encode(
            self._tokenizer,
            place,
            *columns,
            truncation=True,
            max_length=self._most,
            return_attention_mask=False,
        )
        types = encoded.get("token_type_ids")
        documents = []
        for i, (item, ids) in enumerate(zip(items, encoded["input_ids"], strict=True)):
            if not ids:  # would look like filler
                raise UserError(
                    place, f"row {item.line}, which gives no token", "text with at least one token"
                )
            documents.append(
                Document(
                    item,
                    np.array(ids, dtype=np.int32),
                    types=None if types is None else np.array(types[i], dtype=np.uint8),
                    spans=None if self._chunk is None else self._spans(encoded.encodings[i], item.texts),
                    truncated=len(ids) == self._most,  # a text of exactly this length counts, too
                )
            )
        return documents

    def _spans(self, encoding: Any, texts: tuple[str, ...]) -> np.ndarray:
        offsets = np.array(encoding.offsets)
        owners = np.array([-1 if i is None else i for i in encoding.sequence_ids])
        chunks = found_chunks(texts, self._chunk)
        return np.concatenate(
            [token_spans(np.where(owners[:, None] == i, offsets, 0), of) for i, of in enumerate(chunks)]
        )


class PairReader(SpecialReader):
    """Read the two texts of a row separately, as SpecialReader reads single texts: one document after the other."""

    def __init__(
        self,
        tokenizer: Any,
        columns: tuple[str, ...],
        max_length: int,
        chunk: Chunker | None = None,
        prompts: tuple[str, ...] = ("", ""),
    ):
        """Make a reader. prompts: texts put before the first and the second text of a row."""
        super().__init__(tokenizer, columns[:1], max_length, chunk)
        self.columns, self._prompts = (*columns, "text_a", "text_b"), prompts
        self.settings = {
            "layout": "pair",
            "columns": columns,
            "max_length": max_length,
            "prompts": list(prompts),
        }

    def items(self, stream: Stream, rows: Iterator[tuple[int, Row]]) -> Iterator[Item]:
        """Yield both texts of each row; neither may be empty."""
        for item in _pairs(stream, rows, self.columns):
            for piece, (text, prompt) in enumerate(zip(item.texts, self._prompts, strict=True)):
                if not text.strip():
                    side = ("first", "second")[piece]
                    raise UserError(stream.at(item.line), f"an empty {side} text of a pair", "some text")
                yield Item((prompt + text,), item.row, item.line, piece)


def batches(items: Iterator[Item], characters: int, most: int) -> Iterator[list[Item]]:
    """Yield runs of items with about `characters` characters together, and at most `most` items."""
    held, size = [], 0
    for item in items:
        held.append(item)
        size += sum(map(len, item.texts))
        if size >= characters or len(held) >= most:
            yield held
            held, size = [], 0
    if held:
        yield held


def _present(names: tuple[str, ...], row: dict, stream: Stream) -> tuple[str, ...]:
    """Return the columns to read; a local copy of a hub set may name them text_a and text_b."""
    wanted, others = names[: len(names) // 2], names[len(names) // 2 :]
    return others if wanted[0] not in row and others and others[0] in row else wanted


def _pairs(stream: Stream, rows: Iterator[tuple[int, Row]], columns: tuple[str, ...]) -> Iterator[Item]:
    if stream.plain:
        wanted = " and ".join(columns[:2])
        raise UserError(stream.place, "plain text", f"a file with the columns {wanted} (data.text)")
    for number, (line, row) in rows:
        names = _present(columns, row, stream)
        texts = tuple(_text(stream, line, row, (name,)) for name in names)
        if not any(map(str.strip, texts)):
            raise UserError(stream.at(line), f"an empty {' and '.join(names)}", "some text")
        yield Item(texts, number, line)


def _text(stream: Stream, line: int, row: dict, names: tuple[str, ...]) -> str:
    text = _value(stream, line, row, names[0])
    if not isinstance(text, str):
        got = f"no {names[0]}" if text is None else f"a {type(text).__name__} in {names[0]}"
        raise UserError(stream.at(line), got, f"a text in column {names[0]} (data.text)")
    return text


def _value(stream: Stream, line: int, row: dict, name: str) -> Any:
    known = stream.columns or tuple(row)
    if name not in known and (stream.columns or line <= 2):  # later rows may lack a value
        raise no_column(stream.place, name, known)
    return row.get(name)
