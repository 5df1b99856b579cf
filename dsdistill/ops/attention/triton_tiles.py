"""Tile sizes of the attention kernels, by architecture, type and head width, each with its reason.

They are chosen by what the compiler makes of them: no loop over whole tiles reaches the stack, and of those that do not
the one with the least predicted time (`python -m dsdistill.bench.preflight --match "columns bf16 D64"`). `dsdistill
verify --aot` compiles them all. float32 may spill: its products unroll on plain cores, and `auto` leaves it to
`chunked`. Which tile is the fastest is not known yet: nothing here has run on a GPU; where a record of the GPU names a
tile (tuning.py makes one), it is taken instead of the table's. (queries, keys, warps, stages):

- The side that a program owns is the longer one (queries of rows and statistics, keys of columns and merged): it is
  loaded once, and the left operand of sm_90's matrix instructions wants 64 rows for each four warps.
- columns and merged in bfloat16 on sm_90 walk 64 queries at a time to width 64, so that dQ too is a product of 64 rows
  by sm_90's matrix instructions; wider heads leave registers for 32 (64 spill in the main loop, up to 512 bytes under
  Triton 3.6.0 and 272 under 3.7.1). On an A100 32 queries with four warps, of which three programs share a
  multiprocessor.
- Loops over tiles with conditions take more registers than those over whole tiles: they load one tile at a time.
- float16 multiplies dS in TF32 (triton_tile.gradient_product): operands of twice the size, half the walking side.
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
    # Not tuned: one head of a tile at a time, both operands loaded for each.
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

# Instead of those of width 256 in half precision that need more shared memory than a block has below an A100's limit.
SMALL = {"rows": Tile(32, 32, 4, 2)}
# Of rows at width 256 in half precision that find a loss and no gradient: with those of the table they spill.
WIDE_LOSS = Tile(32, 64, 4, 1)

# Warps that hold 16 queries of a row of up to 128, 256 and 512 keys; None: sweeps. On sm_90 both models' scores
# and the gradient of 512 keys at width 64, or 256 at 128, spill in some variants with 8 warps and with 16.
ROWS: dict[str, dict[int, tuple[int | None, ...]]] = {
    "sm_80": {64: (8, 8, 8), 128: (8, 8, None), 256: (None, None, None)},
    "sm_90": {64: (4, 8, None), 128: (8, None, None), 256: (None, None, None)},
}
# Warps of a program that owns a head of up to 64 and up to 128 tokens, by width; None: the tiles of ROWS, or sweeps.
# With twice the warps each has half the registers, and the scores spill. On sm_80 128 tokens put away up to 136 bytes
# of a thread, once a program, and are still predicted at two thirds of what the row kernel takes without dK; wider
# heads and float16 would put away 700 to 1,200.
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
# dSᵀ as a left operand of 128 rows or more spills on sm_80: there dK is left to a sweep over the keys.
ROW_MERGES = ("sm_90", "interpreter")


def type_of(tensors: Sequence[Tensor]) -> str:
    """The widest need of all tensors: float32 if any is."""
    types = {x.dtype for x in tensors}
    return "float32" if torch.float32 in types else "float16" if torch.float16 in types else "bfloat16"


def width_of(tensors: Sequence[Tensor]) -> int:
    """The column of the table: 64, 128 or 256; above that, wider than the table goes."""
    return max(64, *(block_width(x.shape[3]) for x in tensors))


def fits(tensors: Sequence[Tensor]) -> bool:
    """Whether the table has tiles for these head widths."""
    return width_of(tensors) <= 256


_trials: dict[str, Tile] | None = None
_asked: list[str] = []


@contextlib.contextmanager
def trying(trials: dict[str, Tile]) -> Iterator[list[str]]:
    """Have kernels take these tiles, by their names. The value lists the kernels that were asked for within."""
    global _trials, _asked
    before = _trials, _asked
    _trials, _asked = trials, []
    try:
        yield _asked
    finally:
        _trials, _asked = before


def tile_of(kernel: str, tensors: Sequence[Tensor]) -> Tile:
    """Return the tile of a kernel: the one that is tried, else the one of this GPU's record, else the table's."""
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
    """Tile of the full-row kernel that owns a head; None where heads share keys or a head does not fit."""
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
    """Tile of the full-row kernel; None where a row does not fit."""
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
