"""Benchmark the data: speed, memory and disk space of making a store from texts, and how fast a run starts on it.

Each figure comes from a fresh process that is watched from outside: memory is the proportional set size (PSS) of the
process and its children, minus what it was once the tokenizer was loaded. `datasets.Dataset.map` does the same work in
the same run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from dsdistill import disk
from dsdistill.bench import operators
from dsdistill.bench.arguments import check_unused
from dsdistill.bench.data_jobs import BLOCK, memory, stretch
from dsdistill.config import UserError
from dsdistill.config.bounded import parse_size
from dsdistill.data import docstrings, files
from dsdistill.data.bytes_bpe import train_bytes_tokenizer

EVERY = 0.05  # seconds between two readings of the memory
ENTRIES = 16_384  # vocabulary of a tokenizer that is trained here
LEARNT = 5_000_000  # characters that it is trained on
FORMS = ("rows of whole texts", "rows of paragraphs", "one .txt")
OPTIONS = {"text": None, "size": "50MB", "tokenizer": None, "documents": 2_000_000}


def run_data(
    *,
    options: dict[str, Any] | None = None,
    dtype: str = "float32",
    backends: Sequence[str] | None = None,
    json_path: str | Path | None = None,
    plot_path: str | Path | None = None,
) -> int:
    """Measure the data and print a table. Return 0.

    Args:
        options: `--shapes NAME=VALUE,...` on the command line:
            text        file whose column `text` is used (any format that data.train takes); default: docstrings
            size        size of the texts, which are repeated or cut to it, such as 50MB
            tokenizer   folder; default: a byte-level BPE, trained on the texts
            documents   number in an artificial store, to measure a start on a large one

    Raises:
        UserError: an option that does not exist or cannot be used here.
    """
    chosen = _checked(options or {})
    check_unused("data", dtype, backends, plot_path)
    with tempfile.TemporaryDirectory() as folder:
        report = _measured(Path(folder), chosen)
    _print(report)
    if json_path is not None:
        disk.save_json(json_path, report)
    return 0


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    for name in options:
        if name not in OPTIONS:
            raise UserError("bench option", repr(name), f"one of {', '.join(map(repr, OPTIONS))}")
    chosen = OPTIONS | options
    size = chosen["size"] if isinstance(chosen["size"], int) else parse_size(str(chosen["size"]))
    if not size or size < 0:
        raise UserError("bench size", repr(chosen["size"]), "a size such as 50MB")
    if type(chosen["documents"]) is not int or chosen["documents"] < 1:
        raise UserError("bench documents", repr(chosen["documents"]), "a number from 1")
    if chosen["tokenizer"] is not None and not os.path.isdir(str(chosen["tokenizer"])):
        raise UserError("bench tokenizer", chosen["tokenizer"], "a folder with a tokenizer")
    return chosen | {"size": size}


def _measured(folder: Path, chosen: dict[str, Any]) -> dict[str, Any]:
    texts = _texts(chosen["text"], chosen["size"], folder)
    tokenizer = chosen["tokenizer"] or train_bytes_tokenizer(_front(texts, LEARNT), ENTRIES, str(folder))
    (folder / "dev.jsonl").write_text(json.dumps({"text": "A text of a dev set."}))
    cores = len(os.sched_getaffinity(0))
    rows = []
    for form, file in zip(FORMS, _written(folder, texts), strict=True):
        print(f"{form} …", file=sys.stderr, flush=True)
        job = {"file": str(file), "dev": str(folder / "dev.jsonl"), "cores": cores}
        job |= {"tokenizer": str(tokenizer), "cache": str(folder / f"{file.name}-cache"), "steps": 0}
        row = _of(form, "dsdistill", _watched(job | {"kind": "tokenise"}))
        held = sum(path.stat().st_size for path in Path(job["cache"]).rglob("*") if path.is_file())
        begun = _watched(job | {"kind": "start", "steps": sys.maxsize})
        row |= {"bytes_per_token": held / row["tokens"], "second_start": begun["seconds"]}
        rows.append(row | {"reader_mib": begun["own_mib"]})
        if file.suffix == ".jsonl":
            found = _watched(job | {"kind": "peer", "cache": str(folder / f"{file.name}-peer")})
            rows.append(_of(form, "datasets.map", found))
    return {
        "machine": operators.machine() | _versions(),
        "text": {
            "file": Path(chosen["text"]).name if chosen["text"] else "docstrings",
            "bytes": sum(len(text.encode()) for text in texts),
            "tokenizer": Path(tokenizer).name if chosen["tokenizer"] else f"bytes of {ENTRIES}",
        },
        "rows": rows,
        "large": _large(folder, chosen["documents"], str(tokenizer)),
    }


def _texts(name: str | None, size: int, folder: Path) -> list[str]:
    """Return texts of `size` bytes in total: those of a file or the docstrings, repeated, the last one cut."""
    if name is None:
        column = docstrings.table("train", str(folder)).columns["text"]
    else:
        stream = files.stream(str(name), None, ("text",), sys.maxsize)
        column = stream.table().column("text")
    column = [text for text in column if isinstance(text, str) and text.strip()]
    if not column:
        raise UserError("bench text", f"{name} without a text", "a file with a column `text`")
    found, left = [], size
    for text in cycle(column):
        if len(data := text.encode()) >= left:
            return [*found, data[:left].decode(errors="ignore")]
        found.append(text)
        left -= len(data)
    raise AssertionError


def _front(texts: list[str], characters: int) -> Iterator[str]:
    """Yield the first texts up to `characters` characters in total."""
    for text in texts:
        if characters <= 0:
            return
        yield text[:characters]
        characters -= len(text)


def _written(folder: Path, texts: list[str]) -> tuple[Path, ...]:
    """Write the texts in each of FORMS; return the files."""
    places = folder / "texts.jsonl", folder / "paragraphs.jsonl", folder / "texts.txt"
    for place, units in ((places[0], texts), (places[1], _paragraphs(texts))):
        with open(place, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": unit}) + "\n" for unit in units)
    places[2].write_text("\n\n".join(texts), encoding="utf-8")
    return places


def _paragraphs(texts: list[str]) -> Iterator[str]:
    return (part for text in texts for part in re.split(r"\n\s*\n", text) if part.strip())


def _of(form: str, name: str, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "form": form,
        "name": name,
        "documents": found["documents"],
        "tokens": found["tokens"],
        "tokens_per_second": found["tokens"] / found["seconds"],
        "cores": found["processor_seconds"] / found["seconds"],
        "peak_mib": found["peak_mib"],
    }


def _large(folder: Path, documents: int, tokenizer: str) -> dict[str, Any]:
    """Return how a run starts on a store of `documents` documents, the first time and later."""
    print(f"a store of {documents:,} documents …", file=sys.stderr, flush=True)
    job = {"file": str(folder / "dev.jsonl"), "dev": str(folder / "dev.jsonl"), "cores": 1, "steps": 0}
    job |= {"tokenizer": tokenizer, "cache": str(folder / "large")}
    _watched(job | {"kind": "tokenise"})
    (made,) = Path(job["cache"]).glob("tokens-*/")
    tokens = stretch(made, documents)
    first, second = (_watched(job | {"kind": "start"}) for _ in range(2))
    return {
        "documents": documents,
        "tokens": tokens,
        "first_start": first["seconds"],
        "first_mib": first["peak_mib"],
        "second_start": second["seconds"],
        "reader_mib": second["own_mib"],
    }


def _watched(job: dict[str, Any]) -> dict[str, Any]:
    """Return a job's results and its memory in MiB, minus the memory with only the tokenizer loaded.

    peak_mib: highest PSS of the process and its children; own_mib: what the process itself holds in addition at its
    end, without pages of files, which all readers share. Both are None if the system does not report them.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "dsdistill.bench.data_jobs", json.dumps(job)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "true"},
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise UserError("bench tokenizer", job["tokenizer"], "a folder whose tokenizer can be loaded")
        before = peak = _memory(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        while process.poll() is None:
            time.sleep(EVERY)
            peak = max(peak, _memory(process.pid))
        found = process.stdout.read().splitlines()
    if process.returncode:
        raise RuntimeError(f"the measured process ended with {process.returncode}")
    return json.loads(found[-1]) | {"peak_mib": peak - before if before else None}


def _memory(process: int) -> float:
    """Return the PSS of a process and its children in MiB; 0 where it cannot be read."""
    return sum(found[0] for of in (process, *_children(process)) if (found := memory(of)) is not None)


def _children(process: int) -> Iterator[int]:
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            own = [int(number) for number in path.read_text().split()]
        except OSError:
            continue
        for number in own:
            yield number
            yield from _children(number)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("transformers", "tokenizers", "datasets")}


def _print(report: dict[str, Any]) -> None:
    for key, value in report["machine"].items():
        print(f"{key}: {value}")
    text = report["text"]
    print(f"{text['bytes'] / 1e6:.1f} MB of {text['file']}, tokenizer {text['tokenizer']}, blocks of {BLOCK}")
    titles = (
        "documents",
        "tokens",
        "tokens/s",
        "cores",
        "peak MiB",
        "bytes/token",
        "2nd start s",
        "reader MiB",
    )
    print(f"{'':20} {'':13}", *(f"{title:>11}" for title in titles))
    for row in report["rows"]:
        print(f"{row['form']:20} {row['name']:13} {row['documents']:11,} {row['tokens']:11,} ", end="")
        print(f"{row['tokens_per_second']:11,.0f} {row['cores']:11.2f} ", end="")
        names = ("peak_mib", "bytes_per_token", "second_start", "reader_mib")
        print(*(_shown(row.get(name), 2) for name in names))
    large = report["large"]
    print(f"a store of {large['documents']:,} documents, {large['tokens']:,} tokens: ", end="")
    print(f"first start {large['first_start']:.2f} s, second {large['second_start']:.2f} s")


def _shown(value: float | None, digits: int) -> str:
    return f"{'–' if value is None else format(value, f'.{digits}f'):>11}"
