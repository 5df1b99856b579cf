"""Read sources, tokenise them, and give every rank its examples in order."""

from dsdistill.data.batch import NO_LABEL, Batch
from dsdistill.data.collate import Set, collate
from dsdistill.data.examples import Examples, Packed, Rows, Splits, TextPairs, texts_of
from dsdistill.data.loader import Ahead, Loader, evaluation_batches, restore
from dsdistill.data.mixture import Mixture
from dsdistill.data.sets import Words, load_data, load_texts
from dsdistill.data.streamed import Streamed
from dsdistill.data.streamed_loader import StreamedLoader

__all__ = [
    "NO_LABEL",
    "Ahead",
    "Batch",
    "Examples",
    "Loader",
    "Mixture",
    "Packed",
    "Rows",
    "Set",
    "Splits",
    "Streamed",
    "StreamedLoader",
    "TextPairs",
    "Words",
    "collate",
    "evaluation_batches",
    "load_data",
    "load_texts",
    "restore",
    "texts_of",
]
