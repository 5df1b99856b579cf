"""Data sets of the Hugging Face hub, through `datasets`."""

from typing import TYPE_CHECKING

from dsdistill.config.errors import UserError
from dsdistill.data.table import Table

if TYPE_CHECKING:
    import pyarrow


def table(name: str, subset: str | None, split: str, cache: str) -> Table:
    """One split of a hub data set, downloaded once into the cache folder."""
    import datasets

    called = f"load_dataset({name!r}, {subset!r}, split={split!r})"
    try:
        dataset = datasets.load_dataset(name, subset, split=split, cache_dir=f"{cache}/hub")
    except Exception as error:  # no network, no such set, subset or split: each has several types of its own
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        expected = f"docstrings, files, or a data set that the hub or {cache}/hub has ({called} was tried)"
        raise UserError("data.source", f"{name}: {reason}", expected) from error
    return _from_dataset(f"{name} {split}", dataset)


def from_arrow(place: str, arrow: "pyarrow.Table") -> Table:
    """A parquet file's table; `datasets` leaves class names in its metadata."""
    import datasets

    return _from_dataset(place, datasets.Dataset(datasets.table.InMemoryTable(arrow)))


def _from_dataset(place: str, dataset) -> Table:
    from datasets import ClassLabel

    classes = {name: list(f.names) for name, f in dataset.features.items() if isinstance(f, ClassLabel)}
    return Table(place, dataset[:], range(1, len(dataset) + 1), "row", classes)
