"""Read data sets of the Hugging Face hub with `datasets`: download them once, or read them during the run."""

import copy
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dsdistill.config.errors import RunError, UserError
from dsdistill.data.arrow import ROWS, arrow_rows, readable
from dsdistill.data.table import Row, Stream, no_column

Mark = dict[str, Any]  # the position of a row in a set that is read over the network, as JSON


def stream(name: str, subset: str | None, split: str, cache: str, wanted: Iterable[str]) -> Stream:
    """Return one split of a hub data set, downloaded once into the cache folder, as rows of the wanted columns."""
    import datasets

    dataset = _loaded(
        name, subset, split, f"data set that the hub or {cache}/hub has", cache_dir=f"{cache}/hub"
    )
    place, features = f"{name} {split}", dataset.features.items()
    names = readable(place, dataset.features.arrow_schema, wanted)
    classes = {
        key: list(f.names) for key, f in features if isinstance(f, datasets.ClassLabel) and key in names
    }

    def rows() -> Iterator[Row]:
        # Rows are taken as Arrow: the library's own decoding would open the images that other columns name.
        if not names:
            return iter([(row, {}) for row in range(1, len(dataset) + 1)])
        chosen: Any = dataset.select_columns(names).with_format("arrow").iter(ROWS)
        return arrow_rows(place, (batch for table in chosen for batch in table.to_batches()), None)

    identity = {"set": name, "subset": subset, "split": split, "fingerprint": dataset._fingerprint}
    return Stream(place, rows, identity, "row", classes, columns=tuple(dataset.column_names))


def _loaded(name: str, subset: str | None, split: str, wanted: str, **options: Any) -> Any:
    import datasets

    called = f"load_dataset({name!r}, {subset!r}, split={split!r})"
    try:
        return datasets.load_dataset(name, subset, split=split, **options)
    except Exception as error:  # no network, no such set, subset or split: each raises several types
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        expected = f"docstrings, files, or a {wanted} ({called} was tried)"
        raise UserError("data.source", f"{name}: {reason}", expected) from error


@functools.cache
def revision(name: str) -> str | None:
    """Return the commit of a hub data set; None if the hub does not tell it."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, timeout=10).sha
    except Exception:  # without network, or for a set that is elsewhere: each raises several types
        return None


@dataclass(frozen=True)
class Remote:
    """Read one split of a hub data set over the network, from any row on."""

    name: str
    subset: str | None
    split: str
    wanted: tuple[str, ...]
    revision: str | None

    @property
    def place(self) -> str:
        """Return its name in messages."""
        return f"{self.name} {self.split}"

    @property
    def identity(self) -> dict[str, Any]:
        """Return values that change when the contents do."""
        return {"set": self.name, "subset": self.subset, "split": self.split, "revision": self.revision}

    def rows(self, mark: Mark | None = None) -> Iterator[tuple[Row, Mark]]:
        """Yield the rows from a mark on, numbered from 1 in the whole set, each with its own mark.

        Raises:
            UserError: the set cannot be found, or it has a column that cannot be read.
            RunError: the network fails; a run can go on later.
        """
        dataset = self._dataset()
        if dataset.features is not None:  # otherwise only the rows show the columns
            names = readable(self.place, dataset.features.arrow_schema, self.wanted)
            if not names:
                raise no_column(self.place, self.wanted[0], dataset.column_names)
            dataset = dataset.select_columns(names)
        dataset = dataset.with_format("arrow")
        mark = mark or {"row": 0, "before": 0, "state": None}
        if mark["state"] is not None:
            dataset.load_state_dict(copy.deepcopy(mark["state"]))
        before, tables = mark["before"], dataset.iter(ROWS)
        while True:
            state = copy.deepcopy(dataset.state_dict())
            if (table := self._next(tables)) is None:
                return
            found = table.select(readable(self.place, table.schema, self.wanted))
            for number, values in arrow_rows(self.place, found.to_batches(), None):
                row = before + number - 1
                if row >= mark["row"]:
                    yield (row + 1, values), {"row": row, "before": before, "state": state}
            before += len(table)

    def stream(self) -> Stream:
        """Return all rows as a stream, as other sources do."""
        return Stream(
            self.place, lambda: (row for row, _ in self.rows()), self.identity, "row", columns=self.columns
        )

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """Return the names of all columns; () if they are unknown before the rows are read."""
        return tuple(self._dataset().column_names or ())

    def _dataset(self) -> Any:
        options = {} if self.revision is None else {"revision": self.revision}
        return _loaded(self.name, self.subset, self.split, "data set of the hub", streaming=True, **options)

    def _next(self, tables: Iterator[Any]) -> Any:
        try:
            return next(tables, None)
        except Exception as error:  # each network library raises its own types
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise RunError(f"reading {self.place} failed: {reason}") from error
