"""Read and check the rows of a run: built-in docstrings, local files, or Hugging Face hub data sets."""

import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from dsdistill.config.data_section import Data as Section
from dsdistill.config.data_section import Part
from dsdistill.config.errors import UserError
from dsdistill.config.schema import EMBEDDING, LANGUAGE
from dsdistill.data import docstring_pairs, docstrings, files, hub
from dsdistill.data.examples import Rows
from dsdistill.data.labels import NO_CLASS, Classes, class_indices, classes_of, labelled, scores, spelled
from dsdistill.data.table import Bad, Row, Stream, Table

log = logging.getLogger("dsdistill")

CLASSES = "classification"


def parts(section: Section) -> list[tuple[str, float, Section]]:
    """Return name, weight and section of each source of the train set; a single source has the name ''."""
    if isinstance(section.label, dict):  # labels of dev sets
        section = section.model_copy(update={"label": None})
    if not _is_mixture(section):
        return [("", 1.0, section)]
    made = []
    for part in section.train:
        own = {key: value for key in part.model_fields_set if (value := getattr(part, key)) is not None}
        weight, name = own.pop("weight", 1.0), own.pop("name", None)
        if "text" in own and "messages" not in own:
            own["messages"] = None
        if "text" in own and section.prompts is not None and len(own["text"]) < len(section.text):
            own["prompts"] = _prompts(section, own["text"])
        own.setdefault("train", "train")
        changed = section.model_copy(update=own)
        name = (
            name or changed.subset or (changed.source if changed.source != "files" else _first(changed.train))
        )
        made.append((name, weight, changed))
    names = [name for name, *_ in made]
    if len(set(names)) < len(names):
        made = [(f"{name}-{index}", *rest) for index, (name, *rest) in enumerate(made)]
    return made


def _prompts(section: Section, single: tuple[str, ...]) -> tuple[str, ...]:
    """Return the prompt of a part's single texts, if the dev sets have pairs: the prompt of the same column."""
    if not any(section.prompts or ()):
        return ("",)
    if single[0] not in section.text:
        got = f"text: [{single[0]}], for which data.prompts has no prompt (it has those of {', '.join(section.text)})"
        raise UserError("data.train", got, f"text: [{section.text[0]}] or data.prompts: ['', '']")
    return (section.prompts[section.text.index(single[0])],)


def _is_mixture(section: Section) -> bool:
    return not isinstance(section.train, str) and isinstance(section.train[0], Part)


def _first(train: str | tuple[str, ...]) -> str:
    return train if isinstance(train, str) else train[0]


def names(split: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the files or splits that a set is read from."""
    return (split,) if isinstance(split, str) else split


def dev_sets(section: Section) -> dict[str, str]:
    """Return the dev sets by name; a single set without a name in the config is called ''."""
    return {"": section.dev} if isinstance(section.dev, str) else section.dev


def of_dev(section: Section, name: str) -> Section:
    """Return the section with the label column of one dev set, None if it has none."""
    if not isinstance(section.label, dict):
        return section
    return section.model_copy(update={"label": section.label.get(name)})


def with_dev_files(section: Section, files: Sequence[str]) -> Section:
    """Return the section with these whole files as its dev sets, by their names; the train set stays the same."""
    train = []
    for name, weight, part in parts(section):
        same = {key: getattr(part, key) for key in Part.model_fields if key not in ("name", "weight")}
        train.append(Part(name=name or None, weight=weight, **same))
    changes: dict[str, Any] = {
        "source": "files",
        "subset": None,
        "root": None,
        "max_dev": None,
        "holdout": None,
    }
    return section.model_copy(
        update={**changes, "train": tuple(train), "dev": {name: name for name in files}}
    )


def read(
    section: Section, task: str, bad: Bad | None = None
) -> tuple[list[Rows], dict[str, Rows], tuple[str, ...]]:
    """Return the rows of labelled sets after every check that needs no tokenizer.

    Args:
        section: `config.data`.
        task: classification or regression.
        bad: gets the error of each row that cannot be used, which is then left out; without it the first is raised.

    Returns:
        The rows of each part of the train set, those of each dev set by name, and the names of the classes; labels are
        class indices or scores.

    Raises:
        UserError: the data cannot be used; its message names file, row and column.
    """
    if section.label is None:
        raise UserError("data.label", "null", f"the name of the label's column, which task {task} needs")
    trains = [
        (part, [_labelled(part, name, task, bad) for name in names(part.train)])
        for *_, part in parts(section)
    ]
    devs = {name: [_labelled(section, split, task, bad)] for name, split in dev_sets(section).items()}
    known = None
    if task == CLASSES:
        known = classes_of([(part.label, table) for part, of in trains for table in of], section.labels)
    if bad is not None:
        use = functools.partial(_rows, known=known, limit=None)
        trains = [
            (part, [_usable(table, lambda row, part=part: use([row], part), bad) for table in of])
            for part, of in trains
        ]
        devs = {
            name: [_usable(table, lambda row: use([row], section), bad) for table in of]
            for name, of in devs.items()
        }
    return (
        [_rows(of, part, known, part.max_train) for part, of in trains],
        {name: _rows(of, section, known, section.max_dev) for name, of in devs.items()},
        known.names if known is not None else (),
    )


def read_scored(section: Section, split: str, bad: Bad | None = None) -> Rows:
    """Return pairs of texts with a human similarity score each; section.label names its column.

    Raises UserError as `read` does.
    """
    table = _labelled(section, split, EMBEDDING, bad)
    if bad is not None:
        table = _usable(table, lambda row: _rows([row], section, None, None), bad)
    return _rows([table], section, None, section.max_dev)


def streams(section: Section, split: str | tuple[str, ...], task: str) -> list[Stream]:
    """Return the files or splits of a set, to be read row by row."""
    return [_stream(section, name, task) for name in names(split)]


def texts(section: Section, task: str, bad: Bad | None = None) -> Iterator[str]:
    """Yield the texts of the train set, without their labels; a conversation gives the texts of its turns.

    bad: gets the error of each row that cannot be read; without it the first is raised.
    """
    for *_, part in parts(section):
        # Plain text is limited in blocks of tokens, which cannot be counted yet.
        running = task == "causal_lm" and part.messages is None and len(part.text) == 1
        for row in islice(_text_rows(part, task, bad), None if running else part.max_train):
            yield from row


def _text_rows(section: Section, task: str, bad: Bad | None) -> Iterator[list[str]]:
    """Yield the texts of each row; blank single texts are left out for language models and embedding."""
    columns = (section.messages,) if section.messages else section.text
    for stream in streams(section, section.train, task):
        if stream.plain and task == "causal_lm":
            yield ["".join(row["text"] for _, row in stream.rows(bad))]
            continue
        for _, row in stream.rows(bad):
            own = columns if stream.plain or columns[0] in row else ("text_a", "text_b")[: len(columns)]
            values = [row["text"].removesuffix("\n")] if stream.plain else [row.get(name) for name in own]
            found = list(_spoken(values))
            if len(columns) == 2 or task not in (*LANGUAGE, EMBEDDING) or any(map(str.strip, found)):
                yield found


def _spoken(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _spoken(value.get("content", value.get("value")))
    elif isinstance(value, list):
        for inner in value:
            yield from _spoken(inner)


def _rows(tables: list[Table], section: Section, known: Classes | None, limit: int | None) -> Rows:
    """Return the rows of all tables, one after the other. known: their classes; None for scores."""
    found = [text for table in tables for text in _texts(table, section)]
    if len({len(text) for text in found}) > 1:
        raise UserError(
            _places(tables), "single texts in one file and pairs in another", "files of the same form"
        )
    ids = [name for table in tables for name in _ids(table)]
    if len(tables) > 1 and len(set(ids)) < len(ids):
        ids = [f"{table.place}:{name}" for table in tables for name in _ids(table)]
    labels: list = []
    for table in tables:
        labels += (
            scores(table, section.label) if known is None else class_indices(table, section.label, known)
        )
    return Rows(_places(tables), found[:limit], labels[:limit], ids[:limit])


def _places(tables: list[Table]) -> str:
    return ", ".join(table.place for table in tables)


def _usable(table: Table, use: Callable[[Table], Any], bad: Bad) -> Table:
    """Return the rows that can be used, each tried separately; `bad` gets the errors of the others."""
    kept = []
    for row in range(len(table)):
        try:
            use(table.take([row]))
        except UserError as error:
            bad(error)
        else:
            kept.append(row)
    return table if len(kept) == len(table) else table.take(kept)


def _labelled(section: Section, split: str, task: str, bad: Bad | None) -> Table:
    """Return the rows of a file or split; rows without a label are dropped if the section asks for this."""
    table = _table(section, split, task, bad)
    # Only rows with labels decide the classes.
    if bad is not None and task == CLASSES and section.labels is None and not section.drop_unlabelled:
        table = _usable(table, lambda row: spelled(row, section.label), bad)
    if not section.drop_unlabelled:
        return table
    kept = labelled(table, section.label, (section.labels or ()) if task == CLASSES else (NO_CLASS,))
    if len(kept) < len(table):
        log.info(
            "%s: %d of %d rows have no label and are left out",
            table.place,
            len(table) - len(kept),
            len(table),
        )
    return kept


def _table(section: Section, split: str, task: str, bad: Bad | None) -> Table:
    if section.source == "docstrings":
        if task == "regression":
            raise UserError(
                "data.source", "docstrings with task regression", "a source with numbers as labels"
            )
        return docstrings.table(split, section.cache)
    return _stream(section, split, task).table(bad)


def _stream(section: Section, split: str, task: str) -> Stream:
    if section.source == "docstrings":
        pairs = task == EMBEDDING and bool({*section.text} & {*docstring_pairs.COLUMNS})
        return of_table((docstring_pairs.table if pairs else docstrings.table)(split, section.cache))
    if section.streaming:
        return remote(section, split, hub.revision(section.source)).stream()
    wanted = _wanted(section, task)
    if section.source == "files":
        return files.stream(split, section.root, wanted, section.most_bytes)
    if section.root is not None:
        name = section.subset or section.source.rpartition("/")[2]
        return files.local_copy(section.root, name, split, wanted, section.most_bytes)
    return hub.stream(section.source, section.subset, split, section.cache, wanted)


def remote(section: Section, split: str, revision: str | None) -> hub.Remote:
    """Return a split of a hub data set that is read over the network; its texts are for a language model."""
    return hub.Remote(section.source, section.subset, split, tuple(_wanted(section, LANGUAGE[0])), revision)


def _wanted(section: Section, task: str) -> dict[str, None]:
    """Return the names of the columns that a task reads."""
    wanted = dict.fromkeys([*section.text, "text_a", "text_b", "id"])
    if section.messages is not None:
        wanted = dict.fromkeys([section.messages, "tools"])
    if task not in LANGUAGE and section.label is not None:
        wanted[section.label] = None
    return wanted


def of_table(table: Table) -> Stream:
    """Return rows that are in memory as a stream."""
    columns = list(table.columns.items())

    def rows() -> Iterator[Row]:
        for i, line in enumerate(table.lines):
            yield line, {name: values[i] for name, values in columns}

    return _held(table.place, rows, table.unit, [str(values) for _, values in columns])


def of_rows(rows: Rows) -> Stream:
    """Return the texts of labelled rows as a stream with the columns a and b."""

    def numbered() -> Iterator[Row]:
        return ((i, dict(zip("ab", text, strict=False))) for i, text in enumerate(rows.texts, 1))

    return _held(rows.place, numbered, "row", [str(rows.texts)])


def _held(place: str, rows: Any, unit: str, contents: list[str]) -> Stream:
    digest = hashlib.sha256("\0".join(contents).encode(errors="backslashreplace")).hexdigest()
    return Stream(place, rows, {"contents": digest}, unit)


def _texts(table: Table, section: Section) -> list[tuple[str, ...]]:
    """Return the texts of each row of a labelled set."""
    wanted = ("text",) if table.plain else section.text  # the text of a txt file has no column name
    local = section.source == "files" or section.root is not None
    if local and wanted[0] not in table.columns and "text_a" in table.columns:
        wanted = ("text_a", "text_b")[: len(wanted)]  # the names that local copies of hub sets have
    rows = list(zip(*(table.column(name) for name in wanted), strict=True))
    for i, row in enumerate(rows):
        for name, text in zip(wanted, row, strict=True):
            if not isinstance(text, str):
                got = f"no {name}" if text is None else f"a {type(text).__name__} in {name}"
                raise UserError(table.at(i), got, f"a text in column {name} (data.text)")
        if not any(map(str.strip, row)):
            raise UserError(table.at(i), f"an empty {' and '.join(wanted)}", "some text")
    return rows


def _ids(table: Table) -> list[str]:
    """Return the column `id` if its values are distinct, else the positions of the rows."""
    ids = [str(value) for value in table.columns.get("id", ())]
    if len(set(ids)) == len(table):
        return ids
    return [str(i) for i in range(len(table))]
