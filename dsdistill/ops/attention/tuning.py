"""Find the fastest tile on this GPU: with DSDISTILL_TUNE=1 the kernels of a call are timed with every candidate.

A tile must run both with all conditions on pairs and without any, because the record does not distinguish such calls.
The fastest tile of each kernel is written to a record in the folder DSDISTILL_RECORDS. `triton_tiles.tile_of` reads it
there, in this process and in later ones. Each process with DSDISTILL_TUNE=1 tunes again, once for all lengths from one
power of two to the next. launch/gpu_check.sh does the same for the shapes that it measures. No GPU has run this yet.
"""

from __future__ import annotations

import json
import logging
import os
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from dsdistill.ops.attention.triton_tiles import INTERPRETER, table_tile, trying, type_of, width_of
from dsdistill.ops.clock import kernel_laps
from dsdistill.ops.gpu import Tile, architecture
from dsdistill.ops.records import read_again, this_machine

# (queries, keys, warps, stages) in half precision, in addition to the table's own tile.
OWN_QUERIES = (
    Tile(64, 64, 4, 2),
    Tile(128, 64, 8, 2),
    Tile(64, 32, 4, 2),
    Tile(64, 64, 8, 2),
    Tile(128, 128, 8, 2),
)
OWN_KEYS = (
    Tile(64, 128, 8, 2),
    Tile(32, 64, 4, 2),
    Tile(64, 64, 4, 2),
    Tile(64, 64, 8, 2),
    Tile(32, 128, 8, 2),
)
CANDIDATES = {
    "statistics": OWN_QUERIES,
    "rows": OWN_QUERIES,
    "columns": OWN_KEYS,
    "merged": OWN_KEYS,
    "mean_heads": (Tile(32, 64, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 4, 1)),
}
# The names under which kernels are launched, if these differ from the names in the table of tiles.
LAUNCHED = {"merged": ("columns",), "mean_heads": ("lse", "mean_heads")}
REPEATS = 5
# Largest difference that the order of summation may make in half precision, relative to the largest entry.
TOLERANCE = 2e-2

logger = logging.getLogger("dsdistill")
_done: set[tuple] = set()


def due(tensors: Sequence[Tensor], options: tuple) -> bool:
    """Return whether to tune a call like this one before it runs. options: what else distinguishes calls.

    Raises ValueError if DSDISTILL_TUNE is 1 and DSDISTILL_RECORDS is not set.
    """
    if os.environ.get("DSDISTILL_TUNE") != "1" or tensors[0].is_meta or not tensors[0].numel():
        return False
    if not os.environ.get("DSDISTILL_RECORDS"):
        raise ValueError(
            "DSDISTILL_TUNE: got 1 without DSDISTILL_RECORDS, expected a folder there for the tiles"
        )
    key = (tensors[0].device, type_of(tensors), width_of(tensors), tensors[0].shape[2].bit_length(), *options)
    if key in _done:
        return False
    _done.add(key)
    return True


def candidates(kernel: str, tensors: Sequence[Tensor]) -> list[Tile]:
    """Return the tiles to try, the table's first."""
    if architecture(tensors[0].device) == "interpreter":
        return [INTERPRETER, Tile(16, 32, 4, 1)]
    more = CANDIDATES[kernel] if type_of(tensors) != "float32" else ()
    return list(dict.fromkeys((table_tile(kernel, tensors), *more)))


def try_tiles(
    calls: Sequence[Callable[[], Sequence[Tensor]]], tensors: Sequence[Tensor], skip: Sequence[str] = ()
) -> Iterator[dict]:
    """Time each kernel of a call with each candidate. Yield one row for each kernel, in the format of records.

    Args:
        calls: each runs the kernels and returns loss and gradients. The first is timed. A tile is refused if any call
            fails with it or returns other values.
        tensors: the queries and keys of the first call, (B, H, N, D).
        skip: kernels that are not tuned.
    """
    with trying({}) as asked:
        expected = [[x.detach().clone() for x in call()] for call in calls]
    for kernel in dict.fromkeys(name for name in asked if name not in skip):
        seconds, failures = {}, {}
        for tile in candidates(kernel, tensors):
            try:
                seconds[tile] = _time(kernel, tile, calls, expected)
            except Exception as error:  # raised by a compiler or a driver: this tile is refused
                failures["x".join(map(str, tile))] = f"{type(error).__name__}: {str(error)[:200]}"
        if not seconds:
            continue
        best = min(seconds, key=seconds.__getitem__)
        table = seconds.get(table_tile(kernel, tensors))
        yield {
            "kernel": kernel,
            "dtype": type_of(tensors),
            "width": width_of(tensors),
            "tokens": tensors[0].shape[2],
            "tile": list(best),
            "ms": seconds[best] * 1e3,
            "table_ms": None if table is None else table * 1e3,
            "tried": {"x".join(map(str, tile)): value * 1e3 for tile, value in seconds.items()},
            "failed": failures,
        }


def _time(
    kernel: str,
    tile: Tile,
    calls: Sequence[Callable[[], Sequence[Tensor]]],
    expected: Sequence[Sequence[Tensor]],
) -> float:
    """Return the median seconds of a kernel with a tile in the first call. Raises AssertionError if results differ."""
    names = LAUNCHED.get(kernel, (kernel,))
    times = []
    with trying({kernel: tile}):
        for call, found in zip(calls, expected, strict=True):
            for got, wanted in zip(call(), found, strict=True):  # compiles
                if wanted.numel():
                    off = float((got.float() - wanted.float()).abs().max())
                    allowed = TOLERANCE * float(wanted.float().abs().max())
                    assert off <= allowed, f"off by {off:.2e}, allowed {allowed:.2e}"
        for _ in range(REPEATS):
            with kernel_laps(expected[0][0].device) as laps:
                calls[0]()
            times.append(sum(seconds for name, _, seconds in laps() if name in names))
    return statistics.median(times)


def tune(calls: Sequence[Callable[[], Sequence[Tensor]]], tensors: Sequence[Tensor]) -> None:
    """Try the tiles of a call, and write the fastest to this process's record. The arguments are as for `try_tiles`."""
    rows = list(try_tiles(calls, tensors))
    for row in rows:
        said = "tile of %s, %d tokens: %s, %s ms; the table's: %s ms"
        logger.info(said, *(row[key] for key in ("kernel", "tokens", "tile", "ms", "table_ms")))
    write(rows, Path(os.environ["DSDISTILL_RECORDS"]))


def write(rows: list[dict], folder: Path) -> None:
    """Add rows to this process's record of tiles, which `records()` then reads."""
    machine = this_machine()
    gpu = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower())
    path = folder / f"tiles-{gpu}-{machine['date']}-{os.getpid()}.json"
    folder.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(path.read_text(encoding="utf-8"))["tiles"] if path.exists() else []
    scratch = path.with_suffix(".part")
    scratch.write_text(
        json.dumps(machine | {"rows": [], "tiles": [*rows, *earlier]}, indent=1), encoding="utf-8"
    )
    scratch.replace(path)
    read_again()
