"""Run one deployed model in a process of its own, for `bench deploy`; the argument is a job as JSON.

A contender on ONNX Runtime never imports torch, so that the memory of its process is what a deployment would take.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM = 3  # passes over the first texts
ROUNDS = 3  # timed passes over all texts, and fewest timed calls of a batch
SECONDS = 1.0  # time for calls of a batch


def batch_of(texts: list[dict[str, list[int]]], names: list[str]) -> dict[str, Any]:
    """Return texts as int64 arrays (B, N) by the names of inputs, padded on the right with 0."""
    import numpy as np

    longest = max(len(text["input_ids"]) for text in texts)
    found = {name: np.zeros((len(texts), longest), dtype=np.int64) for name in names}
    for row, text in enumerate(texts):
        length = len(text["input_ids"])
        for name in names:
            found[name][row, :length] = 1 if name == "attention_mask" else text[name]
    return found


def on_onnx(job: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
    """Return a call of the job's graph on ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(job["graph"], options, providers=["CPUExecutionProvider"])
    return lambda given: session.run(None, given)


def on_torch(job: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
    """Return a call of the job's model in PyTorch, compiled if the job says so."""
    import torch

    from dsdistill.engine.onnx_graph import Deployed
    from dsdistill.models.build import auto_class

    torch.set_num_threads(job["threads"])
    model = auto_class(job["task"]).from_pretrained(job["folder"], dtype=torch.float32).eval()
    deployed: Any = Deployed(model, job["task"], job["pooling"])
    if job["backend"] == "compile":
        deployed = torch.compile(deployed, dynamic=True)

    def call(given: dict[str, Any]) -> object:
        with torch.inference_mode():
            return deployed(**{name: torch.from_numpy(values) for name, values in given.items()})

    return call


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Return milliseconds of one text (median, 95th percentile), texts a second in a batch, and peak memory in MiB."""
    import numpy as np

    texts, names = json.loads(Path(job["texts"]).read_text(encoding="utf-8")), job["names"]
    call = (on_torch if job["backend"] in ("pytorch", "compile") else on_onnx)(job)
    single = [batch_of([text], names) for text in texts]
    together = batch_of([texts[i % len(texts)] for i in range(job["batch"])], names)
    for _ in range(WARM):
        for given in single[:5]:
            call(given)
        call(together)
    seconds = [_seconds(call, given) for _ in range(ROUNDS) for given in single]
    batches, until = [], time.perf_counter() + SECONDS
    while len(batches) < ROUNDS or time.perf_counter() < until:
        batches.append(_seconds(call, together))
    return {
        "p50_ms": 1000 * float(np.median(seconds)),
        "p95_ms": 1000 * float(np.quantile(seconds, 0.95)),
        "texts_per_second": job["batch"] / float(np.median(batches)),
        "peak_mib": peak() / 2**20,
    }


def peak() -> int:
    """Return the most bytes that this process has had in memory, its libraries included; 0 if Linux does not say."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found is not None else 0


def _seconds(call: Callable[[dict[str, Any]], object], given: dict[str, Any]) -> float:
    started = time.perf_counter()
    call(given)
    return time.perf_counter() - started


def main() -> None:
    """Measure the job under its limit of memory, and write the figures as the last line of the output."""
    job = json.loads(sys.argv[1])
    if job["memory"] is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (job["memory"], job["memory"]))
    print(json.dumps(measure(job)), flush=True)


if __name__ == "__main__":
    main()
