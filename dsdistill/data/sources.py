"""Reads and checks the rows of a run: built-in docstrings, local files, or Hugging Face hub data sets."""

from dsdistill.config.errors import UserError
from dsdistill.config.schema import Data as Section
from dsdistill.data import docstrings, files, hub
from dsdistill.data.examples import Data, Rows
from dsdistill.data.labels import class_indices, class_names, scores
from dsdistill.data.table import Table


def read(section: Section, task: str) -> Data[Rows]:
    """Both splits with every check that needs no tokenizer; labels as class indices or scores.

    Args:
        section: `config.data`.
        task: classification, regression or causal_lm (which reads no labels).

    Raises:
        UserError: the data cannot be used; its message names file, row and column.
    """
    if task != "causal_lm" and section.label is None:
        raise UserError("data.label", "null", f"the column of the label: task {task} needs one")
    tables = [_table(section, split, task) for split in (section.train, section.dev)]
    limits = (section.max_train, section.max_dev)
    if task == "causal_lm":
        train, dev = (
            _language_rows(table, section, limit) for table, limit in zip(tables, limits, strict=True)
        )
        return Data(train, dev, ())
    if task == "regression":
        names, labels = (), [scores(table, section.label) for table in tables]
    else:
        names = class_names(tables[0], section.label, section.labels)
        labels = [class_indices(table, section.label, names) for table in tables]
    train, dev = (
        Rows(table.place, _texts(table, section)[:limit], values[:limit], _ids(table)[:limit])
        for table, values, limit in zip(tables, labels, limits, strict=True)
    )
    return Data(train, dev, names)


def _table(section: Section, split: str, task: str) -> Table:
    if section.source == "docstrings":
        if task == "regression":
            raise UserError(
                "data.source", "docstrings for task regression", "a source whose labels are numbers"
            )
        return docstrings.table(split, section.cache)
    if section.source == "files":
        return files.table(split, section.root)
    if section.root is not None:
        return files.local_copy(section.root, section.subset or section.source.rpartition("/")[2], split)
    return hub.table(section.source, section.subset, split, section.cache)


def _language_rows(table: Table, section: Section, limit: int | None) -> Rows:
    """Of one column text to be cut into blocks, of two a prompt and its response a row."""
    if len(section.text) == 1:
        return Rows(table.place, _texts(table, section), None, _ids(table), limit)
    if table.plain:
        wanted = " and ".join(section.text)
        raise UserError(table.place, "plain text", f"a file with the columns {wanted} (data.text)")
    return Rows(table.place, _texts(table, section)[:limit], None, _ids(table)[:limit])


def _texts(table: Table, section: Section) -> list[tuple[str, ...]]:
    wanted = ("text",) if table.plain else section.text  # the text of a txt file has no name of its own
    if section.source != "files" and section.root is not None and wanted[0] not in table.columns:
        wanted = ("text_a", "text_b")[: len(wanted)]  # as files.local_copy names them
    columns = [table.column(name) for name in wanted]
    rows = list(zip(*columns, strict=True))
    for i, row in enumerate(rows):
        for name, text in zip(wanted, row, strict=True):
            if not isinstance(text, str):
                got = f"no {name}" if text is None else f"a {type(text).__name__} in {name}"
                raise UserError(table.at(i), got, f"a text in column {name} (data.text)")
        if not any(text.strip() for text in row):
            raise UserError(table.at(i), f"an empty {' and '.join(wanted)}", "some text")
    return rows


def _ids(table: Table) -> list[str]:
    """The column `id` where it tells the rows apart, else their positions."""
    ids = [str(value) for value in table.columns.get("id", ())]
    if len(set(ids)) == len(table):
        return ids
    return [str(i) for i in range(len(table))]
