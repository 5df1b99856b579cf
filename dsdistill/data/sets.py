"""Make tokenised examples from the `data` section of a config."""

import copy
import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dsdistill.config.data_section import Data as Section
from dsdistill.config.errors import UserError
from dsdistill.config.schema import EMBEDDING, LANGUAGE
from dsdistill.data import chunkers, store
from dsdistill.data.blocks import packed as packed_in_blocks
from dsdistill.data.chat import Chat
from dsdistill.data.chat_template import read_template
from dsdistill.data.documents import (
    PairReader,
    PlainReader,
    Reader,
    RenderedReader,
    SeparatedReader,
    SpecialReader,
)
from dsdistill.data.encode import edges
from dsdistill.data.examples import Examples, Packed, Rows, Splits, TextPairs, cut, end_to_end, whole
from dsdistill.data.holdout import HOLDOUT, held_out
from dsdistill.data.hub import revision
from dsdistill.data.layout import Raw, default_layout, render_template
from dsdistill.data.masking import HIDDEN, PREDICTED, masking
from dsdistill.data.mixture import Mixture
from dsdistill.data.rendered import Rendered
from dsdistill.data.sample import chosen, with_noise
from dsdistill.data.sources import dev_sets, of_dev, of_rows, parts, read, read_scored, remote, streams
from dsdistill.data.store import Documents
from dsdistill.data.store_writer import Limit, stored
from dsdistill.data.streamed import Streamed, pinned
from dsdistill.data.table import Bad, Stream

log = logging.getLogger("dsdistill")

LOOKED = 1000  # rows of a streamed set that `dsdistill preview` reads

Set = Examples | Packed | TextPairs | Mixture | Streamed


@dataclass(frozen=True)
class Words:
    """Hold a tokenizer and its fingerprint."""

    tokenizer: Any  # of transformers
    entries: int  # one more than its largest id
    fingerprint: str


def load_data(
    section: Section,
    task: str,
    words: Words,
    *,
    seed: int = 0,
    with_spans: bool = False,
    packed: bool = False,
    bad: Bad | None = None,
    run: str = "",
) -> Splits[Set]:
    """Return all sets, read, checked and tokenised; stores that are in the cache already are mapped.

    Args:
        section: `config.data`.
        task: as in the config.
        words: the tokenizer.
        seed: for drawing train examples and replacing labels, if the section asks for this.
        with_spans: find words and phrases too.
        packed: fill blocks with whole documents (see data/packing.py), which the models keep apart.
        bad: gets the error of each row that cannot be used, which is then left out; without it the first is raised.
        run: folder of the run; the parts of a streamed set are kept separately for each run.

    Raises:
        UserError: the data cannot be used; its message names file, row and column.
    """
    if with_spans and not words.tokenizer.is_fast:
        raise UserError(
            "data.tokenizer", "a tokenizer without token offsets", "a fast tokenizer (tokenizer.json)"
        )
    asked = section
    if section.holdout is not None:  # it is drawn from the whole set; max_train limits the rest
        section = section.model_copy(update={"max_train": None})
    loading = _Loading(section, task, words, with_spans, bad)
    classes: tuple[str, ...] = ()
    if task in LANGUAGE:
        if section.streaming and bad is not None:  # a caller that counts bad rows only looks at the data
            trains = [loading.of([_beginning(section)], section, None, packed)]
        elif section.streaming:
            trains = [streamed(section, task, words, seed, with_spans, packed, run)]
        else:
            trains = [
                loading.language(part, part.train, part.max_train, packed) for *_, part in parts(section)
            ]
        devs = {
            name: loading.language(section, split, section.max_dev, False)
            for name, split in dev_sets(section).items()
        }
    elif task == EMBEDDING:
        trains = [loading.texts(part, part.train, part.max_train) for *_, part in parts(section)]
        devs = {
            name: loading.texts(own, split, own.max_dev)
            if own.label is None
            else loading.scored(read_scored(own, split, bad), own)
            for name, split in dev_sets(section).items()
            for own in (of_dev(section, name),)
        }
    else:
        rows, dev_rows, classes = read(section, task, bad)
        trains = [loading.labelled(of, part) for of, (*_, part) in zip(rows, parts(section), strict=True)]
        devs = {name: loading.labelled(of, section) for name, of in dev_rows.items()}
    if asked.holdout is not None:
        labelled = task not in (*LANGUAGE, EMBEDDING)
        special = {*words.tokenizer.all_special_ids} - {words.tokenizer.unk_token_id} if labelled else None
        rest, devs[HOLDOUT] = held_out(trains[0], asked.holdout, special)
        blocks = packed and asked.messages is None and len(asked.text) == 1  # the limit is in blocks
        trains = [
            rest if asked.max_train is None or blocks else rest.take(range(min(asked.max_train, len(rest))))
        ]
    if task == "masked_lm":
        hide = masking(words.tokenizer, PREDICTED, 0.0, seed)
        devs = {name: replace(dev, masking=hide) for name, dev in devs.items()}
    if not isinstance(trains[0], Streamed):  # parts of a streamed set are finished one by one
        trains = [_drawn(train, section, seed, len(classes)) for train in trains]
        trains = [
            loading.finished(train, part, seed, packed)
            for train, (*_, part) in zip(trains, parts(asked), strict=True)
        ]
    weighed = [(name, weight) for name, weight, _ in parts(section)]
    train = trains[0] if len(trains) == 1 else Mixture(tuple(trains), *zip(*weighed, strict=True))
    return Splits(train, devs, classes)


def streamed(
    section: Section, task: str, words: Words, seed: int, with_spans: bool, packed: bool, run: str
) -> Streamed:
    """Return the train set of a section that is read over the network, a few parts at a time."""
    # One tokenizer is for the thread that makes parts, the other for mapping them: no two threads share a tokenizer.
    own = [replace(words, tokenizer=copy.deepcopy(words.tokenizer)) for _ in range(2)]

    def load(stream: Stream, folder: Path, making: bool) -> Examples | Packed:
        within = section.model_copy(update={"cache": str(folder)})
        loading = _Loading(within, task, own[making], with_spans, None)
        return loading.finished(loading.of([stream], within, None, packed), within, seed, packed)

    loading = _Loading(section, task, own[0], with_spans, None)
    reader, _ = loading._reader(section)
    settings = {
        "reader": reader.settings,
        "tokenizer": words.fingerprint,
        "spans": loading.chunker,
        "max_length": section.max_length,
        "overlong": section.overlong,
        "packing": [packed, section.packing is False],
    }
    name = store.key({"run": os.path.abspath(run), "split": [section.source, section.subset, section.train]})
    home = loading.cache / f"stream-{store.key({'name': name, 'settings': settings})}"
    source = remote(section, section.train, pinned(home, lambda: revision(section.source)))
    return Streamed(home, source, load, settings)


def _beginning(section: Section) -> Stream:
    """Return the first rows of a train set that is read over the network."""
    whole = remote(section, section.train, revision(section.source)).stream()
    return replace(
        whole, read=lambda: islice(whole.read(), LOOKED), identity=whole.identity | {"rows": LOOKED}
    )


def load_texts(section: Section, files: tuple[str, ...], words: Words) -> Examples:
    """Return the texts of further files as examples, each with the tokenizer's special tokens."""
    return _Loading(section, "masked_lm", words, False, None).language(section, files, None, False)


def _drawn(train: Examples, section: Section, seed: int, classes: int) -> Examples:
    """Return the fraction of the examples that the section asks for, with its label noise."""
    if section.fraction < 1:
        train = train.take(chosen(len(train), section.fraction, seed))
    if section.label_noise:
        train = with_noise(train, section.label_noise, classes, seed)
    return train


class _Loading:
    """Load the sets of one section."""

    def __init__(self, section: Section, task: str, words: Words, with_spans: bool, bad: Bad | None):
        self.task, self.words, self.bad = task, words, bad
        self.cache = Path(section.cache).expanduser()
        self.chunker = section.chunker if with_spans else None

    def labelled(self, rows: Rows, section: Section) -> Examples:
        """Return rows with labels as examples."""
        columns = ("a", "b")[: len(rows.texts[0])]
        reader = SpecialReader(
            self.words.tokenizer, columns, section.max_length, self._chunk(), labelled=True
        )
        found = whole(self._stored(of_rows(rows), reader, Limit()))
        kind = torch.int64 if self.task == "classification" else torch.float32
        return replace(found, labels=torch.tensor(rows.labels, dtype=kind), given_ids=rows.ids)

    def texts(
        self, section: Section, split: str | tuple[str, ...], limit: int | None
    ) -> Examples | TextPairs:
        """Return texts without labels, single or in pairs, at most `limit` examples."""
        section = section.model_copy(update={"label": None})
        found, left, each = [], limit, len(section.text)
        for stream in streams(section, split, self.task):
            most = Limit(None if left is None else each * left)
            found.append(self._stored(stream, self._texts_reader(section, section.text), most))
            left = None if limit is None else limit - sum(map(len, found)) // each
            if left == 0:
                break
        made = whole(store.joined(found))
        made = replace(made, labels=torch.full((len(made),), torch.nan))
        return TextPairs(made) if each == 2 else made

    def scored(self, rows: Rows, section: Section) -> TextPairs:
        """Return pairs with a human similarity score each."""
        made = whole(self._stored(of_rows(rows), self._texts_reader(section, ("a", "b")), Limit()))
        labels = torch.tensor(rows.labels, dtype=torch.float32).repeat_interleave(2)
        return TextPairs(
            replace(made, labels=labels, given_ids=[name for name in rows.ids for _ in range(2)])
        )

    def _texts_reader(self, section: Section, columns: tuple[str, ...]) -> Reader:
        """Return the reader of texts that become vectors, with their prompts."""
        prompts = section.prompts or ("",) * len(columns)
        tokenizer, chunk = self.words.tokenizer, self._chunk()
        if len(columns) == 2:
            return PairReader(tokenizer, columns, section.max_length, chunk, prompts)
        return SpecialReader(tokenizer, columns, section.max_length, chunk, prompt=prompts[0])

    def language(
        self, section: Section, split: str | tuple[str, ...], limit: int | None, packed: bool
    ) -> Examples:
        """Return texts whose tokens are to be predicted as examples, at most `limit` of them."""
        return self.of(streams(section, split, self.task), section, limit, packed)

    def of(self, sources: list[Stream], section: Section, limit: int | None, packed: bool) -> Examples:
        """Return the texts of sources as examples, as `language` does."""
        reader, layout = self._reader(section)
        length = section.max_length
        plain = layout == "plain"
        running = plain and section.packing is False  # text runs on from document to document
        if layout == "separator" and section.overlong not in (None, "truncate"):
            got = f"{section.overlong} with layout separator, which always truncates"
            raise UserError("data.overlong", got, "truncate, or layout template or raw")
        found, left = [], limit
        for stream in sources:
            most = Limit(left)
            if limit is not None and plain:
                most = Limit(None, limit * length + 1 - sum(len(of.tokens) for of in found))
            found.append(self._stored(stream, reader, most))
            left = None if limit is None else limit - sum(map(len, found))
            if most.reached(len(found[-1]), len(found[-1].tokens)):
                break
        documents = store.joined(found)
        if running:
            return end_to_end(documents, length, limit, ended=bool(edges(self.words.tokenizer)[1]))
        if layout in ("special", "separator"):  # these are truncated when they are tokenised
            examples = whole(documents)
        else:
            examples = cut(documents, length, section.overlong or ("split" if plain else "truncate"))
            if not len(examples):
                raise UserError(documents.places[0][0], "no token to predict", "texts of two tokens or more")
        return examples if limit is None or packed else examples.take(range(min(limit, len(examples))))

    def finished(self, train: Examples, section: Section, seed: int, packed: bool) -> Examples | Packed:
        """Return the train examples in the form that the loader draws: in blocks, or with their masking."""
        if packed:
            drawn = [section.overlong, section.fraction, seed if section.fraction < 1 else None]
            blocks = packed_in_blocks(train, section.max_length, self.cache, drawn)
            plain = section.messages is None and len(section.text) == 1  # its limit is in blocks
            limit = section.max_train if plain else None
            return blocks if limit is None or len(blocks) <= limit else blocks.take(range(limit))
        predicted, hidden = self.task == "masked_lm", section.sampler == "random_masked"
        if not (predicted or hidden):
            return train
        hide = masking(self.words.tokenizer, PREDICTED * predicted, HIDDEN * hidden, seed)
        if isinstance(train, TextPairs):
            return TextPairs(replace(train.texts, masking=hide))
        return replace(train, masking=hide)

    def _reader(self, section: Section) -> tuple[Reader, str]:
        """Return the reader of the section's rows, and the name of its layout."""
        tokenizer, length, chunk = self.words.tokenizer, section.max_length, self._chunk()
        if self.task != "causal_lm":
            return SpecialReader(tokenizer, section.text, length, chunk), "special"
        if section.messages is None and len(section.text) == 1:
            return PlainReader(tokenizer, section.text[0], chunk), "plain"
        layout = "chat" if section.messages is not None else default_layout(tokenizer, section)
        if layout == "separator":
            return SeparatedReader(tokenizer, section.text, length, chunk), layout
        columns = (section.messages,) if section.messages is not None else (*section.text, "text_a", "text_b")
        render, settings = _renderer(section, tokenizer, layout)
        return RenderedReader(tokenizer, columns, render, settings, chunk), layout

    def _chunk(self) -> chunkers.Chunker | None:
        return None if self.chunker is None else chunkers.chunker(self.chunker)

    def _stored(self, stream: Stream, reader: Reader, limit: Limit) -> Documents:
        settings = {
            "format": store.FORMAT,
            "source": stream.identity,
            "reader": reader.settings,
            "tokenizer": self.words.fingerprint,
            "spans": self.chunker and [self.chunker, _digest(chunkers)],
            "limit": [limit.documents, limit.tokens],
        }
        path = self.cache / f"tokens-{store.key(settings)}"
        return stored(path, stream, reader, self.words.entries, settings, limit, self.bad)


def _renderer(
    section: Section, tokenizer: Any, layout: str
) -> tuple[Callable[[tuple[Any, ...], str], list[Rendered]], dict[str, Any]]:
    """Return a function that makes texts of a row's values, and the settings that it depends on."""
    if layout == "raw":
        raw = Raw(tokenizer)
        return lambda values, place: [raw.render(*_texts(values, place), place)], {"layout": layout}
    template = None if section.chat_template is None else read_template(section.chat_template)
    chat = Chat(tokenizer, template, section.template_options, section.train_on, section.turns)
    settings = {
        "layout": layout,
        "template": chat.template.text,
        "options": section.template_options,
        "train_on": section.train_on,
        "turns": section.turns,
    }
    if layout == "chat":
        return lambda values, place: chat.render(values[0], place), settings

    def render(values: tuple[Any, ...], place: str) -> list[Rendered]:
        if isinstance(values[0], list):  # both are conversations
            return chat.render({"prompt": values[0], "completion": values[1]}, place)
        return [render_template(chat, *_texts(values, place), place)]

    return render, settings


def _texts(values: tuple[Any, ...], place: str) -> tuple[str, ...]:
    for value in values:
        if not isinstance(value, str):
            got = "no text" if value is None else f"a {type(value).__name__}"
            raise UserError(place, got, "a text in each column of data.text")
    return values


def _digest(module: Any) -> str:
    return hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
