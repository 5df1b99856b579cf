"""Sources, tokenising, and the order in which every rank sees the examples."""

from dsdistill.data.batch import NO_LABEL, Batch
from dsdistill.data.examples import Data, Examples, Rows
from dsdistill.data.loader import Loader, collate, evaluation_batches, restore
from dsdistill.data.tokens import load, read, tokenize

__all__ = [
    "NO_LABEL",
    "Batch",
    "Data",
    "Examples",
    "Loader",
    "Rows",
    "collate",
    "evaluation_batches",
    "load",
    "read",
    "restore",
    "tokenize",
]
