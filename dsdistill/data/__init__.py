"""Sources, tokenising, and the order in which every rank sees the examples."""

from dsdistill.data.batch import NO_LABEL, Batch
from dsdistill.data.examples import Examples, Rows, Splits
from dsdistill.data.loader import Loader, collate, evaluation_batches, restore
from dsdistill.data.tokens import load_data, read, tokenize

__all__ = [
    "NO_LABEL",
    "Batch",
    "Examples",
    "Loader",
    "Rows",
    "Splits",
    "collate",
    "evaluation_batches",
    "load_data",
    "read",
    "restore",
    "tokenize",
]
