"""Tile sizes of the attention kernels, by architecture, type and head width, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsdistill.ops.gpu import Tile, architecture, block_width

ROW_TOKENS = 512


def tile_of(kernel: str, tensors: Sequence[Tensor]) -> Tile:
    if architecture(tensors[0].device) == "interpreter":
        return Tile(32, 64, 4, 1)
    return Tile(32, 64, 4, 2)


def row_tile(tensors: Sequence[Tensor]) -> Tile | None:
    tokens = tensors[0].shape[2]
    if tokens > ROW_TOKENS:
        return None
    columns = block_width(tokens)
    return Tile(16, columns, 4, 1)
