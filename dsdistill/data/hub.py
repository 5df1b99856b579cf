"""Data sets of the Hugging Face hub, through `datasets`."""

from collections.abc import Iterable

from dsdistill.config.errors import UserError
from dsdistill.data.arrow import from_arrow
from dsdistill.data.table import Table


def table(name: str, subset: str | None, split: str, cache: str, wanted: Iterable[str]) -> Table:
    """Return the wanted columns of one split of a hub data set, downloaded once into the cache folder."""
    import datasets

    called = f"load_dataset({name!r}, {subset!r}, split={split!r})"
    try:
        dataset = datasets.load_dataset(name, subset, split=split, cache_dir=f"{cache}/hub")
    except Exception as error:  # no network, no such set, subset or split: each has several types of its own
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        expected = f"docstrings, files, or a data set that the hub or {cache}/hub has ({called} was tried)"
        raise UserError("data.source", f"{name}: {reason}", expected) from error
    features = dataset.features.items()
    classes = {key: list(f.names) for key, f in features if isinstance(f, datasets.ClassLabel)}
    # As Arrow holds them: the library's own decoding would open the images that other columns name.
    return from_arrow(f"{name} {split}", dataset.with_format("arrow")[:], wanted, classes)
