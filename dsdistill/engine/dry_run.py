"""Find errors of a run that its config alone does not show, for `dsdistill train CONFIG --dry-run`.

Batch sizes are checked against the number of ranks. Data files and their columns are checked by each file's first
rows. Models, tokenizers and hub data are not looked at.
"""

import os
from collections.abc import Iterator
from itertools import islice

from dsdistill.config import Config, UserError
from dsdistill.config.checks import check_ranks
from dsdistill.config.data_section import Data
from dsdistill.config.load import recipe_of
from dsdistill.config.schema import EMBEDDING, LANGUAGE
from dsdistill.data import files
from dsdistill.data.chat_template import read_template
from dsdistill.data.sources import dev_sets, names, of_dev, parts, streams
from dsdistill.data.table import Stream, no_column

LOOKED = 20  # rows of each file


def check(config: Config, world_size: int | None = None) -> list[str]:
    """Check the batch sizes and data files of a run of `config`; return what was not looked at, one line each.

    Args:
        config: the run's config. The recipe of its teacher is checked too.
        world_size: number of ranks; None: the launcher's (WORLD_SIZE), else 1.

    Raises:
        UserError: the ranks cannot share the batches; or a data file is not there, has no rows, cannot be read, or
            lacks a column that the config names.
    """
    world_size = _ranks(world_size)
    check_ranks(config.train, config.run_stages, config.data.sampler, world_size, config.task)
    passed = dict.fromkeys(_check_data(config.data, config.task))
    if config.teacher is not None and config.teacher.path is None and config.teacher.recipe is not None:
        recipe = recipe_of(config)
        try:
            passed |= dict.fromkeys(check(recipe, world_size))
        except UserError as error:
            raise error.within(config.teacher.recipe) from None
    return list(passed)


def _ranks(world_size: int | None) -> int:
    if world_size is not None:
        if world_size < 1:
            raise UserError("--world-size", world_size, "1 or more")
        return world_size
    told = os.environ.get("WORLD_SIZE", "1")
    if not told.isdecimal() or int(told) < 1:
        raise UserError("WORLD_SIZE", repr(told), "the number of ranks, which a launcher sets")
    return int(told)


def _check_data(data: Data, task: str) -> Iterator[str]:
    """Check the first rows of every file that a section names; yield what cannot be looked at."""
    if data.chat_template is not None:
        read_template(data.chat_template)
    read = [(part, name) for *_, part in parts(data) for name in names(part.train)]
    if task == EMBEDDING:  # this task trains on texts without labels
        read = [(part.model_copy(update={"label": None}), name) for part, name in read]
    for section, split in read + [(of_dev(data, name), split) for name, split in dev_sets(data).items()]:
        if section.source == "files" or (section.root is not None and section.source != "docstrings"):
            (stream,) = streams(section, split, task)
            _check_columns(stream, section, task)
        elif section.source != "docstrings":
            yield f"{section.source}: {split}"
    for name in (*(data.domain or ()), *(data.general or ())):
        _beginning(files.stream(name, data.root, ("text",), data.most_bytes))


def _beginning(stream: Stream) -> dict[str, None]:
    """Return the columns of a file's first rows, and those that the file declares."""
    rows = [row for _, row in islice(stream.rows(), LOOKED)]
    if not rows:
        raise UserError(stream.place, "no rows", "at least one")
    return dict.fromkeys(name for row in [dict.fromkeys(stream.columns), *rows] for name in row)


def _check_columns(stream: Stream, section: Data, task: str) -> None:
    there = _beginning(stream)
    wanted = [section.messages] if section.messages is not None else list(section.text)
    if stream.plain:
        if section.messages is not None or (len(wanted) == 2 and task in (*LANGUAGE, EMBEDDING)):
            columns = " and ".join(wanted)
            raise UserError(
                stream.place,
                "plain text",
                f"a file with the columns {columns}"
                if " and " in columns
                else f"a file with a column {columns}",
            )
        wanted = ["text"]  # the text of a txt file has no column name
    elif section.messages is None and wanted[0] not in there and "text_a" in there:
        wanted = ["text_a", "text_b"][: len(wanted)]  # the names that local copies of hub sets have
    if task not in LANGUAGE and (task != EMBEDDING or section.label is not None):
        if section.label is None:
            raise UserError("data.label", "null", f"the name of the label's column, which task {task} needs")
        wanted.append(section.label)
    for name in wanted:
        if name not in there:
            raise no_column(stream.place, name, there)
