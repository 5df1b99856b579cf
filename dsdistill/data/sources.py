"""Reads and checks the rows of a run: built-in docstrings, local files, or Hugging Face hub data sets."""

from dsdistill.config.errors import UserError
from dsdistill.config.schema import LANGUAGE
from dsdistill.config.schema import Data as Section
from dsdistill.data import docstrings, files, hub
from dsdistill.data.examples import Rows, Splits
from dsdistill.data.labels import class_indices, class_names, scores, spelled
from dsdistill.data.table import Table

CLASSES = "classification"


def read(section: Section, task: str) -> Splits[Rows]:
    """Both splits with every check that needs no tokenizer; labels as class indices or scores.

    Args:
        section: `config.data`.
        task: that of the config; those that predict tokens read no labels.

    Raises:
        UserError: the data cannot be used; its message names file, row and column.
    """
    if task not in LANGUAGE and section.label is None:
        raise UserError("data.label", "null", f"the column of the label: task {task} needs one")
    splits = [[_table(section, name, task) for name in _names(of)] for of in (section.train, section.dev)]
    names = class_names(_labels(splits[0], section), section.label, section.labels) if task == CLASSES else ()
    train, dev = (
        _rows(tables, section, task, names, limit)
        for tables, limit in zip(splits, (section.max_train, section.max_dev), strict=True)
    )
    return Splits(train, dev, names)


def read_texts(section: Section, files: tuple[str, ...]) -> Rows:
    """The texts of further files, read as those of the train set are; without labels."""
    return _rows([_table(section, name, "masked_lm") for name in files], section, "masked_lm", (), None)


def _names(split: str | tuple[str, ...]) -> tuple[str, ...]:
    return (split,) if isinstance(split, str) else split


def _labels(tables: list[Table], section: Section) -> Table:
    """One table of all labels, with the classes that tables declare where all that do declare the same."""
    if len(tables) == 1:
        return tables[0]
    column = section.label
    declared = {tuple(table.classes[column]) for table in tables if column in (table.classes or {})}
    if len(declared) == 1:
        labels, classes = [label for table in tables for label in table.column(column)], list(*declared)
    else:  # an index is a class of its own table alone
        labels, classes = [name for table in tables for name in spelled(table, column)], None
    return Table(
        _places(tables), {column: labels}, range(1, len(labels) + 1), "row", classes and {column: classes}
    )


def _rows(
    tables: list[Table], section: Section, task: str, names: tuple[str, ...], limit: int | None
) -> Rows:
    """The rows of all tables, one after the other.

    Single texts of language models may be blank, as lines of raw corpora are; those rows are left out.
    """
    blank = task in LANGUAGE and len(section.text) == 1
    texts = [text for table in tables for text in _texts(table, section, blank)]
    if len({len(text) for text in texts}) > 1:
        raise UserError(_places(tables), "one text here and pairs there", "files of one form")
    ids = [name for table in tables for name in _ids(table)]
    if len(tables) > 1 and len(set(ids)) < len(ids):
        ids = [f"{table.place}:{name}" for table in tables for name in _ids(table)]
    if blank:
        kept = [row for row, text in enumerate(texts) if any(map(str.strip, text))]
        texts, ids = [texts[row] for row in kept], [ids[row] for row in kept]
    if task == "causal_lm" and len(section.text) == 1:  # one text is cut into blocks
        return Rows(_places(tables), texts, None, ids, limit)
    for table in tables:
        if task == "causal_lm" and table.plain:
            wanted = " and ".join(section.text)
            raise UserError(table.place, "plain text", f"a file with the columns {wanted} (data.text)")
    labels = None
    if task == CLASSES:
        labels = [label for table in tables for label in class_indices(table, section.label, names)][:limit]
    elif task == "regression":
        labels = [label for table in tables for label in scores(table, section.label)][:limit]
    return Rows(_places(tables), texts[:limit], labels, ids[:limit])


def _places(tables: list[Table]) -> str:
    return ", ".join(table.place for table in tables)


def _table(section: Section, split: str, task: str) -> Table:
    if section.source == "docstrings":
        if task == "regression":
            raise UserError(
                "data.source", "docstrings for task regression", "a source whose labels are numbers"
            )
        return docstrings.table(split, section.cache)
    wanted = dict.fromkeys([*section.text, "text_a", "text_b", "id"])
    if task not in LANGUAGE:
        wanted[section.label] = None
    if section.source == "files":
        table = files.table(split, section.root, wanted, section.most_bytes)
    elif section.root is not None:
        name = section.subset or section.source.rpartition("/")[2]
        table = files.local_copy(section.root, name, split, wanted, section.most_bytes)
    else:
        table = hub.table(section.source, section.subset, split, section.cache, wanted)
    return _lines(table) if table.plain and task == "masked_lm" else table


def _lines(table: Table) -> Table:
    """A text file as one row a line: where tokens are predicted from both sides, each is a text of its own."""
    lines = [(i, line) for i, line in enumerate(table.columns["text"][0].split("\n"), 1) if line.strip()]
    return Table(table.place, {"text": [line for _, line in lines]}, [i for i, _ in lines], plain=True)


def _texts(table: Table, section: Section, blank: bool) -> list[tuple[str, ...]]:
    """One of each row; blank: some of them, but not all, may be without a visible character."""
    wanted = ("text",) if table.plain else section.text  # the text of a txt file has no name of its own
    local = section.source == "files" or section.root is not None
    if local and wanted[0] not in table.columns and "text_a" in table.columns:
        wanted = ("text_a", "text_b")[: len(wanted)]  # the names that local copies of hub sets have
    columns = [table.column(name) for name in wanted]
    rows = list(zip(*columns, strict=True))
    for i, row in enumerate(rows):
        for name, text in zip(wanted, row, strict=True):
            if not isinstance(text, str):
                got = f"no {name}" if text is None else f"a {type(text).__name__} in {name}"
                raise UserError(table.at(i), got, f"a text in column {name} (data.text)")
        if not blank and not any(map(str.strip, row)):
            raise UserError(table.at(i), f"an empty {' and '.join(wanted)}", "some text")
    if not any(text.strip() for row in rows for text in row):
        raise UserError(table.place, f"blank rows alone in {' and '.join(wanted)}", "some text")
    return rows


def _ids(table: Table) -> list[str]:
    """The column `id` where it tells the rows apart, else their positions."""
    ids = [str(value) for value in table.columns.get("id", ())]
    if len(set(ids)) == len(table):
        return ids
    return [str(i) for i in range(len(table))]
