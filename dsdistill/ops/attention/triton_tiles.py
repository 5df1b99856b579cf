"""Choose the tile sizes of the attention kernels, by architecture, type and head width, each with its reason.

The table follows what the compiler reports. It holds, of all tiles whose loops over whole tiles do not spill to the
stack, the one with the least predicted time (`python -m dsdistill.bench.preflight --match "columns bf16 D64"`).
`dsdistill verify --aot` compiles them all. float32 may spill: its products unroll on plain cores, and `auto` leaves it
to `chunked`. Which tile is the fastest is not known yet, since nothing here has run on a GPU. If a record of the GPU
(tuning.py makes one) names a tile, that tile is taken. Tiles are (queries, keys, warps, stages). The reasons:

- The side that a program owns (queries in rows and statistics, keys in columns and merged) is the longer one: it is
  loaded once, and the left operand of sm_90's matrix instructions needs 64 rows for each four warps.
- columns and merged in bfloat16 on sm_90 walk 64 queries at a time up to width 64, so that dQ too is a product of 64
  rows by sm_90's matrix instructions. Wider heads leave registers for only 32 queries (64 spill in the main loop, up to
  512 bytes under Triton 3.6.0 and 272 under 3.7.1). On an A100 they walk 32 queries with four warps, so that three
  programs share a multiprocessor.
- Loops over tiles with conditions take more registers than those over whole tiles: they load one tile at a time.
- float16 multiplies dS in TF32 (triton_tile.gradient_product): operands are twice as large, the walking side is half.
- float32 at full precision has no matrix instructions; its products unroll in registers, so tiles are small.
- Widths of 256 are bound by shared memory: 227 KiB on sm_90, 163 on sm_80, 99 on GPUs of 8.6, 8.9 and 12.0 (SMALL).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dsdistill.ops.gpu import SHARED_LIMIT, Tile, architecture, block_width, shared_limit
from dsdistill.ops.records import capability_of, recorded_tile, records

ROW_TOKENS = 512
INTERPRETER = Tile(32, 64, 4, 1)

# kernel → type → architecture → (tile up to width 64, up to 128, up to 256)
TILES = {
    "statistics": {
        "bfloat16": {
            "sm_80": (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 1)),
            "sm_90": (Tile(64, 64, 4, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
        },
        "float32": {
            "sm_80": (Tile(32, 32, 4, 2), Tile(32, 32, 8, 2), Tile(16, 32, 8, 2)),
            "sm_90": (Tile(32, 32, 4, 2), Tile(32, 32, 8, 2), Tile(16, 32, 8, 2)),
        },
    },
    "rows": {
        "bfloat16": {
            "sm_80": (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 8, 2)),
            "sm_90": (Tile(64, 64, 4, 2), Tile(128, 64, 8, 2), Tile(32, 32, 8, 2)),
        },
        "float16": {
            "sm_80": (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 8, 2)),
            "sm_90": (Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 32, 8, 2)),
        },
        "float32": {
            "sm_80": (Tile(16, 32, 8, 2), Tile(16, 32, 8, 2), Tile(16, 16, 8, 2)),
            "sm_90": (Tile(16, 32, 8, 2), Tile(16, 32, 8, 2), Tile(16, 16, 8, 2)),
        },
    },
    "columns": {
        "bfloat16": {
            "sm_80": (Tile(32, 64, 4, 2), Tile(64, 64, 8, 2), Tile(32, 32, 8, 2)),
            "sm_90": (Tile(64, 128, 8, 2), Tile(32, 128, 8, 2), Tile(32, 32, 8, 2)),
        },
        "float16": {
            "sm_80": (Tile(32, 64, 4, 2), Tile(32, 64, 8, 2), Tile(16, 64, 8, 2)),
            "sm_90": (Tile(32, 128, 8, 2), Tile(16, 64, 8, 2), Tile(32, 32, 8, 2)),
        },
        "float32": {
            "sm_80": (Tile(32, 32, 8, 2), Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
            "sm_90": (Tile(32, 32, 8, 2), Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
        },
    },
    "merged": {
        "bfloat16": {
            "sm_80": (Tile(32, 64, 4, 2), Tile(64, 64, 8, 2), Tile(32, 32, 8, 2)),
            "sm_90": (Tile(64, 128, 8, 2), Tile(32, 128, 8, 2), Tile(32, 32, 8, 2)),
        },
        "float16": {
            "sm_80": (Tile(32, 64, 8, 2), Tile(32, 64, 8, 2), Tile(16, 32, 4, 2)),
            "sm_90": (Tile(32, 128, 8, 2), Tile(16, 64, 8, 2), Tile(32, 32, 8, 2)),
        },
        "float32": {
            "sm_80": (Tile(32, 32, 8, 2), Tile(16, 32, 8, 2), Tile(16, 16, 8, 2)),
            "sm_90": (Tile(32, 32, 8, 2), Tile(16, 32, 8, 2), Tile(16, 16, 8, 2)),
        },
    },
    # Not tuned: a tile takes one head at a time and loads both operands for each head.
    "mean_heads": {
        "bfloat16": {
            "sm_80": (Tile(32, 64, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
            "sm_90": (Tile(32, 64, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        },
        "float16": {
            "sm_80": (Tile(16, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
            "sm_90": (Tile(32, 64, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        },
        "float32": {
            "sm_80": (Tile(16, 32, 4, 1), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1)),
            "sm_90": (Tile(16, 32, 4, 1), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1)),
        },
    },
}

# Tiles at width 256 in half precision for GPUs with less shared memory a block than an A100: the table's do not fit.
SMALL = {"rows": Tile(32, 32, 4, 2)}
# The tile of row sweeps at width 256 in half precision that find a loss and no gradient: the table's tile would spill.
WIDE_LOSS = Tile(32, 64, 4, 1)

# Warps of a program that holds 16 queries with rows of up to 128, 256 and 512 keys, by width; None: sweeps run instead.
# On sm_90 both models' scores and the gradient spill in some variants, with 8 warps and with 16: for 512 keys at width
# 64, and for 256 keys at width 128.
ROWS: dict[str, dict[int, tuple[int | None, ...]]] = {
    "sm_80": {64: (8, 8, 8), 128: (8, 8, None), 256: (None, None, None)},
    "sm_90": {64: (4, 8, None), 128: (8, None, None), 256: (None, None, None)},
}
# Warps of a program that owns a head of up to 64 and up to 128 tokens, by width; None: the tiles of ROWS, or sweeps.
# With twice the warps each has half the registers, and the scores spill. On sm_80 a program of 128 tokens spills up to
# 136 bytes a thread, once; its predicted time is still two thirds of what the row kernel takes without dK. Wider heads
# and float16 would spill 700 to 1,200 bytes.
ALONE: dict[str, dict[str, dict[int, tuple[int | None, int | None]]]] = {
    "bfloat16": {
        "sm_80": {64: (4, 8), 128: (4, None), 256: (8, None)},
        "sm_90": {64: (4, 8), 128: (4, 8), 256: (8, None)},
    },
    "float16": {
        "sm_80": {64: (4, None), 128: (4, None), 256: (8, None)},
        "sm_90": {64: (4, 8), 128: (4, 8), 256: (8, None)},
    },
}
# On sm_80 dSᵀ as a left operand of 128 rows or more spills, so that a sweep over the keys finds dK there.
ROW_MERGES = ("sm_90", "interpreter")


def type_of(tensors: Sequence[Tensor]) -> str:
    """Return the type by which the table is read: float32 if any tensor has it, else float16 if any has it."""
    types = {x.dtype for x in tensors}
    return "float32" if torch.float32 in types else "float16" if torch.float16 in types else "bfloat16"


def width_of(tensors: Sequence[Tensor]) -> int:
    """Return the width of the table's column: 64, 128 or 256; more if the heads are wider than the table allows."""
    return max(64, *(block_width(x.shape[3]) for x in tensors))


def fits(tensors: Sequence[Tensor]) -> bool:
    """Return whether the table has tiles for these head widths."""
    return width_of(tensors) <= 256


_trials: dict[str, Tile] | None = None
_asked: list[str] = []


@contextlib.contextmanager
def trying(trials: dict[str, Tile]) -> Iterator[list[str]]:
    """Make kernels use these tiles, given by kernel name. Yield the list of the kernels whose tiles are asked for."""
    global _trials, _asked
    before = _trials, _asked
    _trials, _asked = trials, []
    try:
        yield _asked
    finally:
        _trials, _asked = before


def tile_of(kernel: str, tensors: Sequence[Tensor]) -> Tile:
    """Return a kernel's tile: the one being tried (`trying`), else that of this GPU's record, else the table's."""
    if _trials is not None:
        _asked.append(kernel)
        if kernel in _trials:
            return _trials[kernel]
    if records() and not tensors[0].is_meta:
        place = tensors[0].shape[2], capability_of(tensors[0].device)
        found = recorded_tile(kernel, type_of(tensors), width_of(tensors), *place)
        if found is not None:
            return Tile(*found)
    return table_tile(kernel, tensors)


def table_tile(kernel: str, tensors: Sequence[Tensor]) -> Tile:
    arch = architecture(tensors[0].device)
    if arch == "interpreter":
        return INTERPRETER
    types, kind, width = TILES[kernel], type_of(tensors), width_of(tensors)
    narrow = width == 256 and kind != "float32" and shared_limit(tensors[0].device) < SHARED_LIMIT["sm_80"]
    if narrow and kernel in SMALL:
        return SMALL[kernel]
    return types.get(kind, types["bfloat16"])[arch][(64, 128, 256).index(width)]


def loss_tile(tensors: Sequence[Tensor]) -> Tile:
    """Return the tile of a sweep by rows that finds no gradient."""
    wide = width_of(tensors) == 256 and type_of(tensors) != "float32"
    on_chip = architecture(tensors[0].device) != "interpreter"
    return WIDE_LOSS if wide and on_chip else tile_of("rows", tensors)


def row_merges(tensors: Sequence[Tensor]) -> bool:
    return architecture(tensors[0].device) in ROW_MERGES


def alone_tile(tensors: Sequence[Tensor]) -> Tile | None:
    """Return the full-row kernel's tile if a program owns a head; None if heads share keys or a head does not fit."""
    (query, key, *_), arch = tensors, architecture(tensors[0].device)
    tokens = max(64, block_width(query.shape[2]))
    if tokens > 128 or key.shape[1] != query.shape[1]:
        return None
    if arch == "interpreter":
        return Tile(tokens, tokens, 4, 1)
    kind = type_of(tensors)
    warps = None if kind == "float32" else ALONE[kind][arch][width_of(tensors)][tokens // 128]
    return None if warps is None else Tile(tokens, tokens, warps, 1)


def row_tile(tensors: Sequence[Tensor]) -> Tile | None:
    """Return the tile of the full-row kernel; None if a row does not fit."""
    tokens, arch = tensors[0].shape[2], architecture(tensors[0].device)
    if tokens > ROW_TOKENS:
        return None
    keys = block_width(tokens)
    if arch == "interpreter":
        return Tile(32, keys, 4, 1)
    if type_of(tensors) == "float32":
        return None
    warps = ROWS[arch][width_of(tensors)][max(0, keys.bit_length() - 8)]
    return None if warps is None else Tile(16, keys, warps, 1)
