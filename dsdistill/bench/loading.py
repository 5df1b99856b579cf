"""Measure how much memory a rank takes while models are read, compared with what it keeps.

Two ranks are watched from outside. Only anonymous memory counts, minus what each rank held before: pages of mapped
files are shared by all ranks, and the system takes them back when it needs memory.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dsdistill import disk
from dsdistill.bench import operators
from dsdistill.bench.arguments import check_unused
from dsdistill.config import UserError
from dsdistill.config.bounded import MIB

EVERY = 0.002  # seconds between two readings
RANKS = 2
OPTIONS = {"layers": 24, "width": 1024, "vocabulary": 151_936, "shards": 5}
KEPT = 6  # layers of the student


def run_load(
    *,
    options: dict[str, Any] | None = None,
    dtype: str = "float32",
    backends: Sequence[str] | None = None,
    json_path: str | Path | None = None,
    plot_path: str | Path | None = None,
) -> int:
    """Measure the loading of a Qwen2-like teacher in bfloat16 and print a table; return 1 if a limit is exceeded.

    Args:
        options: `--shapes NAME=VALUE,...` on the command line:
            layers, width, vocabulary  of the teacher; the student has 6 of its layers
            shards                     number of files that hold the teacher

    Raises:
        UserError: an option that does not exist or cannot be used here.
    """
    for name, value in (options or {}).items():
        if name not in OPTIONS:
            raise UserError("bench option", repr(name), f"one of {', '.join(map(repr, OPTIONS))}")
        if type(value) is not int or value < (KEPT if name == "layers" else 1):
            raise UserError(f"bench {name}", repr(value), f"a number from {KEPT if name == 'layers' else 1}")
    chosen = OPTIONS | (options or {})
    if chosen["width"] % 64:
        raise UserError("bench width", chosen["width"], "a multiple of 64")
    check_unused("load", dtype, backends, plot_path)
    with tempfile.TemporaryDirectory() as folder:
        report = _measured(Path(folder), chosen)
    _print(report)
    if json_path is not None:
        disk.save_json(json_path, report)
    return int(any(row["peak_mib"] > row["limit_mib"] for row in report["rows"]))


def settings(chosen: dict[str, Any]) -> dict[str, Any]:
    """Return the architecture of the teacher."""
    width = chosen["width"]
    return {
        "model_type": "qwen2",
        "num_hidden_layers": chosen["layers"],
        "hidden_size": width,
        "intermediate_size": 19 * width // 4,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "vocab_size": chosen["vocabulary"],
        "tie_word_embeddings": True,
    }


def _measured(folder: Path, chosen: dict[str, Any]) -> dict[str, Any]:
    layers = [1 + place * (chosen["layers"] - 1) // (KEPT - 1) for place in range(KEPT)]
    job = {"teacher": str(folder / "teacher"), "student": str(folder / "student"), "layers": layers}
    print("making the teacher …", file=sys.stderr, flush=True)
    made = job | {"kind": "make", "settings": settings(chosen), "shards": chosen["shards"]}
    subprocess.run([*_WORKER, json.dumps(made)], check=True, stdout=subprocess.DEVNULL)
    tensors = _sizes(folder / "teacher")
    whole, largest = sum(tensors), max(tensors)
    rows = []
    for kind, ranks in (("sharded", RANKS), ("replicated", RANKS), ("cut", 1), ("student", RANKS)):
        print(f"{kind} …", file=sys.stderr, flush=True)
        found = _watched(job | {"kind": kind, "port": _free_port()}, ranks)
        of_student = sum(_sizes(folder / "student"))  # 0 before it is cut
        keeps, limit = {
            "sharded": (whole / RANKS, 1.25 * whole / RANKS + largest),
            "replicated": (whole, 1.1 * whole + largest),
            "cut": (of_student, 1.3 * of_student),
            "student": (of_student / RANKS, 1.25 * of_student / RANKS + largest),
        }[kind]
        rows += [{"kind": kind, **row, "keeps_mib": keeps / MIB, "limit_mib": limit / MIB} for row in found]
    return {
        "machine": operators.machine() | _versions(),
        "teacher_mib": whole / MIB,
        "largest_mib": largest / MIB,
        "rows": rows,
    }


_WORKER = [sys.executable, "-m", "dsdistill.bench.loading_jobs"]


def _sizes(folder: Path) -> list[int]:
    """Return the bytes of each weight in a folder's files."""
    found = []
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        places = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        found += [end - start for start, end in places]
    return found


def _watched(job: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Return what loading takes on each rank: seconds, and MiB at the highest moment and afterwards."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ranks = [stack.enter_context(_started(job | {"found": folder}, rank, count)) for rank in range(count)]
        for rank in ranks:
            while (line := rank.stdout.readline()) != "ready\n":
                if not line:
                    raise RuntimeError(f"a measured rank ended with {rank.wait()} before it began")
        before = [anonymous(rank.pid) for rank in ranks]
        peaks = list(before)
        _tell(ranks)
        while len(found := list(Path(folder).glob("*.json"))) < count:
            if any(rank.poll() is not None for rank in ranks):
                raise RuntimeError(f"a measured rank of {job['kind']} ended before it had loaded")
            time.sleep(EVERY)
            peaks = [max(peak, anonymous(rank.pid)) for peak, rank in zip(peaks, ranks, strict=True)]
        kept = [anonymous(rank.pid) for rank in ranks]
        seconds = [json.loads(path.read_text()) for path in sorted(found)]
        _tell(ranks)
    return [
        {
            "rank": rank,
            "seconds": seconds[rank],
            "peak_mib": (peaks[rank] - before[rank]) / MIB,
            "kept_mib": (kept[rank] - before[rank]) / MIB,
        }
        for rank in range(count)
    ]


def _started(job: dict[str, Any], rank: int, count: int) -> subprocess.Popen:
    port = job["port"]
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.Popen(
        [*_WORKER, json.dumps(job)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {name: str(value) for name, value in variables.items()},
    )


def _tell(ranks: Sequence[subprocess.Popen]) -> None:
    """Let the ranks go on."""
    for rank in ranks:
        rank.stdin.write("go\n")
        rank.stdin.flush()


def anonymous(process: int) -> int:
    """Return the anonymous memory of a process in bytes; 0 if the system does not report it."""
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found is not None else 0


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("transformers", "deepspeed", "safetensors")}


def _print(report: dict[str, Any]) -> None:
    for key, value in report["machine"].items():
        print(f"{key}: {value}")
    print(f"a teacher of {report['teacher_mib']:,.0f} MiB in bfloat16, ", end="")
    print(f"its largest tensor {report['largest_mib']:,.0f} MiB; anonymous MiB a rank:")
    titles = ("must keep", "limit", "peak", "kept", "seconds")
    print(f"{'':12} {'rank':>4}", *(f"{title:>10}" for title in titles))
    for row in report["rows"]:
        sizes = (row[f"{name}_mib"] for name in ("keeps", "limit", "peak", "kept"))
        over = "  over the limit" if row["peak_mib"] > row["limit_mib"] else ""
        print(f"{row['kind']:12} {row['rank']:>4}", *(f"{size:10,.0f}" for size in sizes), end="")
        print(f" {row['seconds']:10.1f}{over}")
