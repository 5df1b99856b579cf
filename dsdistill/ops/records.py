"""Read what `backend="auto"` knows about GPUs: records. These are files of measurements, one for each GPU and day.

dsdistill/bench/results/README.md says where they are and how they are made. Without a record `auto` takes `chunked`.
"""

from __future__ import annotations

import datetime
import functools
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "bench" / "results"

logger = logging.getLogger("dsdistill")


@functools.cache
def records() -> tuple[dict, ...]:
    """Return the installed records and those in the folder DSDISTILL_RECORDS, which a running GPU check fills."""
    folders = [FOLDER, *(Path(name) for name in [os.environ.get("DSDISTILL_RECORDS")] if name)]
    paths = [path for folder in folders for path in sorted(folder.glob("*.json"))]
    return tuple(json.loads(path.read_text(encoding="utf-8")) for path in paths)


def this_machine() -> dict:
    """Return what identifies a record: GPU and capability ("no GPU", [0, 0] on a CPU), date, versions."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if gpu else "no GPU",
        "capability": list(capability_of(torch.device("cuda" if gpu else "cpu"))),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton,
    }


def capability_of(device: torch.device) -> tuple[int, int]:
    """Return a GPU's compute capability; (0, 0) for a CPU, where the interpreter runs the kernels."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def recorded_tile(
    kernel: str, dtype: str, width: int, tokens: int, capability: tuple[int, int]
) -> tuple[int, ...] | None:
    """Return (rows, columns, warps, stages) of the tile that was the fastest on GPUs of this capability, or None.

    The row with the nearest token count is used. width: 64, 128 or 256, as in the table of tiles.
    """
    rows = [
        row
        for record in records()
        if tuple(record["capability"]) == capability
        for row in record.get("tiles", ())
        if (row["kernel"], row["dtype"], row["width"]) == (kernel, dtype, width)
    ]
    nearest = min(rows, key=lambda row: abs(math.log(row["tokens"] / max(tokens, 1))), default=None)
    return None if nearest is None else tuple(nearest["tile"])


def read_again() -> None:
    """Clear the caches after a record has been written."""
    records.cache_clear()
    recorded_tile.cache_clear()


def fastest(
    known: Sequence[dict],
    capability: tuple[int, int],
    *,
    operator: str,
    variant: str,
    dtype: str,
    tokens: int,
    candidates: Sequence[str],
    check: Callable[[str], bool],
) -> str | None:
    """Return the candidate that was measured correct and is faster than `chunked` by the largest factor, or None.

    known: records. A row is matched by operator, variant (divergence or relation), dtype and backend; the nearest token
        count is used. If this GPU's capability has records, all others are ignored.
    check: is called with a backend for which only other architectures have a record; False refuses the backend.
    """
    # A record may hold tiles and no rows.
    own = [record for record in known if record["rows"] and tuple(record["capability"]) == tuple(capability)]
    ratios = {}
    for backend in candidates:
        rows = [
            row
            for record in own or known
            for row in record["rows"]
            if (row["operator"], row["variant"], row["dtype"], row["backend"])
            == (operator, variant, dtype, backend)
        ]
        if rows:
            nearest = min(rows, key=lambda row: abs(math.log(row["tokens"] / tokens)))
            if nearest["checked"] and nearest["vs_chunked"] > 1:
                ratios[backend] = nearest["vs_chunked"]
    for backend in sorted(ratios, key=lambda backend: ratios[backend], reverse=True):
        if own or check(backend):
            return backend
    return None


def gpu_choice(
    operator: str,
    variant: str,
    like: Tensor,
    tokens: int,
    lacks: dict[str, str | None],
    function: Callable[..., Tensor],
    small: dict[str, tuple[int, ...]],
) -> str | None:
    """Return the backend that "auto" takes on a GPU instead of `chunked`; None means `chunked`.

    lacks: what each GPU backend lacks; None if it can run. function, small: the public operator, and the shapes of a
    small call. If this architecture has no record, this call compares a backend with `chunked`.
    """
    if like.device.type != "cuda" or not records():
        return None
    capability = torch.cuda.get_device_capability(like.device)
    return fastest(
        records(),
        capability,
        operator=operator,
        variant=variant,
        dtype=str(like.dtype).removeprefix("torch."),
        tokens=max(tokens, 1),
        candidates=[name for name, lack in lacks.items() if lack is None],
        check=lambda backend: (
            not torch.compiler.is_compiling()
            and _agrees(operator, variant, like.dtype, like.device, backend, function, tuple(small.items()))
        ),
    )


@functools.cache
def _agrees(operator, variant, dtype, device, backend, function, shapes) -> bool:
    """Return whether a backend agrees with `chunked` on one small call, and log the result."""
    agrees = agreement(dtype, device, backend, function, dict(shapes), variant)
    verdict = "agrees with" if agrees else "differs from"
    logger.info(
        "%s: no record of this GPU's architecture; on a small call %r %s 'chunked'",
        operator,
        backend,
        verdict,
    )
    return agrees


def agreement(dtype, device, backend, function, shapes, variant) -> bool:
    name = "relation" if "pairwise" in function.__name__ else "divergence"
    variant, _, form = variant.partition(" ")
    options = {name: variant, **({"heads": "mean"} if form == "mean" else {})}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: torch.randn(shape, generator=generator)
        .to(device, dtype)
        .requires_grad_(key.startswith("student"))
        for key, shape in shapes.items()
    }
    wanted = [x for x in tensors.values() if x.requires_grad]
    results = []
    for each in ("chunked", backend):
        try:
            with torch.enable_grad():
                loss = function(**tensors, **options, backend=each)
                results.append([loss.detach(), *torch.autograd.grad(loss, wanted)])
        except Exception as error:  # an untried compiler or driver may raise anything
            logger.warning("%r failed on a small call: %s", each, error)
            return False
    allowed = 1e-3 if dtype == torch.float32 else 5e-2
    return all(
        bool((a.float() - b.float()).abs().max() <= allowed * a.float().abs().max())
        for a, b in zip(*results, strict=True)
    )
