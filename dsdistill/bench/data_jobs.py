"""Measure one thing for the benchmark of the data in a process of its own: python -m dsdistill.bench.data_jobs JOB.

A job loads everything that a run holds anyway, prints `ready`, waits for a line, does its work, and prints its results.
The process that started it watches its memory from outside.
"""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from dsdistill.config.data_section import Data as Section
from dsdistill.data import Loader, Set, Words, load_data, store
from dsdistill.data.store_writer import SHARD

BLOCK = 1024  # tokens of an example
BATCH = 32  # examples of a step
MEAN = 500  # tokens of an artificial document, on average


def main() -> None:
    """Run the job that the command line names."""
    job = json.loads(sys.argv[1])
    tokenizer = _tokenizer(job["tokenizer"])
    work = JOBS[job["kind"]](tokenizer, job)
    before = memory("self")
    print("ready", flush=True)
    sys.stdin.readline()
    processor = _processor()
    found = work()
    found["processor_seconds"] = _processor() - processor
    after = memory("self")
    found["own_mib"] = None if before is None or after is None else after[1] - before[1]
    print(json.dumps(found), flush=True)


def memory(process: int | str) -> tuple[float, float] | None:
    """Return (PSS, anonymous PSS) of a process in MiB; None if the system does not report it."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:  # it has ended, or there is no /proc
        return None
    found = dict(re.findall(r"^(Pss|Pss_Anon): +(\d+) kB", text, re.MULTILINE))
    return (int(found["Pss"]) / 1024, int(found["Pss_Anon"]) / 1024) if len(found) == 2 else None


def _processor() -> float:
    """Return the processor seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _load(tokenizer: Any, job: dict[str, Any]) -> Set:
    """Return the train set of a job, as a run would load it."""
    section = Section(
        source="files",
        train=job["file"],
        dev=job["dev"],
        cache=job["cache"],
        max_length=BLOCK,
        text=("text",),
    )
    return load_data(section, "causal_lm", Words(tokenizer, len(tokenizer), "measured"), packed=True).train


def tokenise(tokenizer: Any, job: dict[str, Any]):
    """Return a function that makes the store of a file."""

    def work() -> dict[str, Any]:
        started = time.perf_counter()
        documents = _load(tokenizer, job).parts.documents
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "documents": len(documents), "tokens": len(documents.tokens)}

    return work


def start(tokenizer: Any, job: dict[str, Any]):
    """Return a function that opens an existing store, makes one batch, and then reads up to job["steps"] steps."""

    def work() -> dict[str, Any]:
        began = time.perf_counter()
        loader = Loader(_load(tokenizer, job), BATCH, BATCH, 1, 0, 0, tokenizer.pad_token_id)
        loader.step(0, 0)
        seconds = time.perf_counter() - began
        for step in range(1, min(job["steps"], loader.steps_per_epoch)):
            loader.step(0, step)
        return {"seconds": seconds}

    return work


def peer(tokenizer: Any, job: dict[str, Any]):
    """Return a function that tokenises the rows of a file with `datasets.Dataset.map`."""
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=job["file"], split="train", cache_dir=job["cache"])

    def work() -> dict[str, Any]:
        started = time.perf_counter()
        made = rows.map(
            lambda batch: {"input_ids": tokenizer(batch["text"])["input_ids"]},
            batched=True,
            num_proc=job["cores"],
            remove_columns=rows.column_names,
        )
        seconds = time.perf_counter() - started
        lengths = made.with_format("arrow")[:]["input_ids"].combine_chunks().offsets.to_numpy()
        return {"seconds": seconds, "documents": len(made), "tokens": int(lengths[-1] - lengths[0])}

    return work


JOBS = {"tokenise": tokenise, "start": start, "peer": peer}


def stretch(folder: Path, documents: int) -> int:
    """Make a store look as if it held `documents` documents of MEAN tokens on average; return its number of tokens.

    Its tokens are holes in sparse files, which take no disk space.
    """
    note = json.loads((folder / store.STORE).read_text())
    lengths = np.random.default_rng(0).geometric(1 / (MEAN - 1), documents) + 1
    begins = np.cumsum(lengths) - lengths
    tokens = int(lengths.sum())
    size = np.dtype(note["dtype"]).itemsize
    names = []
    for first in range(0, tokens, SHARD):
        names.append(f"{len(names):05}")
        shard = folder / names[-1]
        shard.mkdir(exist_ok=True)
        held = begins[(begins >= first) & (begins < first + SHARD)] - first
        (held.astype("int32")).tofile(shard / "begins.bin")
        np.arange(len(held), dtype="uint32").tofile(shard / "lines.bin")
        with open(shard / "ids.bin", "wb") as file:
            os.truncate(file.fileno(), min(SHARD, tokens - first) * size)
    note |= {"documents": documents, "tokens": tokens, "shards": names, "hash": "stretched"}
    (folder / store.STORE).write_text(json.dumps(note))
    return tokens


if __name__ == "__main__":
    main()
