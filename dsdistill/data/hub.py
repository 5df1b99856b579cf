"""Data sets of the Hugging Face hub, through `datasets`."""

from collections.abc import Iterable, Iterator
from typing import Any

from dsdistill.config.errors import UserError
from dsdistill.data.arrow import ROWS, arrow_rows, readable
from dsdistill.data.table import Row, Stream


def stream(name: str, subset: str | None, split: str, cache: str, wanted: Iterable[str]) -> Stream:
    """Return one split of a hub data set, downloaded once into the cache folder, as rows of the wanted columns."""
    import datasets

    called = f"load_dataset({name!r}, {subset!r}, split={split!r})"
    try:
        dataset = datasets.load_dataset(name, subset, split=split, cache_dir=f"{cache}/hub")
    except Exception as error:  # no network, no such set, subset or split: each has several types of its own
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        expected = f"docstrings, files, or a data set that the hub or {cache}/hub has ({called} was tried)"
        raise UserError("data.source", f"{name}: {reason}", expected) from error
    place, features = f"{name} {split}", dataset.features.items()
    names = readable(place, dataset.features.arrow_schema, wanted)
    classes = {
        key: list(f.names) for key, f in features if isinstance(f, datasets.ClassLabel) and key in names
    }

    def rows() -> Iterator[Row]:
        # As Arrow holds them: the library's own decoding would open the images that other columns name.
        if not names:
            return iter([(row, {}) for row in range(1, len(dataset) + 1)])
        chosen: Any = dataset.select_columns(names).with_format("arrow").iter(ROWS)
        return arrow_rows(place, (batch for table in chosen for batch in table.to_batches()), None)

    identity = {"set": name, "subset": subset, "split": split, "fingerprint": dataset._fingerprint}
    return Stream(place, rows, identity, "row", classes, columns=tuple(dataset.column_names))
