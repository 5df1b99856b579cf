"""Keep in the cache which documents share a block, because finding this for many documents (best fit) takes long.

CACHE/blocks-KEY/
  order.npy     (n,) the documents, block by block
  bounds.npy    (blocks + 1,) int64, where in `order` each block begins
  sizes.npy     (blocks,) int64, tokens of each block
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from dsdistill import disk
from dsdistill.data import store
from dsdistill.data.examples import Examples, Packed
from dsdistill.data.packing import best_fit
from dsdistill.data.store_writer import alone

log = logging.getLogger("dsdistill")

NAMES = ("order", "bounds", "sizes")
VERSION = 1  # of best fit; raise it when the same lengths give other blocks than before


def packed(examples: Examples, length: int, cache: Path, drawn: Any) -> Packed:
    """Return blocks of at most `length` tokens, filled with the examples; they are kept in the cache.

    One process makes them, and others wait for it; damaged blocks are made again. If the cache cannot be written,
    each process makes its own.

    Args:
        examples: the documents, or parts of them.
        length: most tokens of a block.
        cache: folder of the stores.
        drawn: the settings that decide which of the stored documents the examples are.
    """
    lengths = examples.lengths.numpy()
    what = [VERSION, examples.documents.digest, length, len(lengths), int(lengths.sum()), drawn]
    path = cache / f"blocks-{store.key({'blocks': what})}"
    found = _read(path, len(lengths))
    if found is None:
        try:
            with disk.explained(path), alone(path):
                found = _read(path, len(lengths))
                if found is None:
                    _write(path, _made(lengths, length))
                    found = _read(path, len(lengths))
        except disk.Unwritable as error:
            log.warning("blocks cannot be kept in the cache and are made again at every start: %s", error)
    return Packed(examples, *(found or _made(lengths, length)))


def _made(lengths: np.ndarray, length: int) -> tuple[np.ndarray, ...]:
    order, bounds = best_fit(lengths, length)
    sizes = np.add.reduceat(lengths[order], bounds[:-1])
    return order.astype(np.int32) if len(order) < 2**31 else order, bounds, sizes


def _read(path: Path, documents: int) -> tuple[np.ndarray, ...] | None:
    """Return the blocks in the cache, mapped; None if there are none, or if they are damaged."""
    if not path.is_dir():
        return None
    try:
        found = tuple(np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in NAMES)
        order, bounds, sizes = found
        if not len(order) == bounds[-1] == documents or len(sizes) != len(bounds) - 1:
            raise ValueError("made of other documents")
    except (OSError, ValueError, IndexError, TypeError) as error:
        log.warning("%s is damaged (%s) and is made again", path, next(iter(str(error).splitlines()), ""))
        return None
    return found


def _write(path: Path, made: tuple[np.ndarray, ...]) -> None:
    if path.is_dir():
        disk.remove(str(path), [f"{name}.npy" for name in NAMES])
    with disk.replacing(path) as name:
        folder = Path(name)
        folder.mkdir()
        for title, values in zip(NAMES, made, strict=True):
            np.save(folder / f"{title}.npy", values)
