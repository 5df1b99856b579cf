"""Measure what the student of a run costs in use, beside its teacher: time, memory and size of files.

Each contender runs in a process of its own. The teacher has random weights, because time and memory do not depend on
them. So the teacher need not be read or trained.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from dsdistill import disk
from dsdistill.bench import operators
from dsdistill.bench.arguments import check_unused
from dsdistill.config import UserError
from dsdistill.config.bounded import MIB, parse_size
from dsdistill.data import Set, evaluation_batches
from dsdistill.engine import onnx_graph
from dsdistill.engine.export import find_checkpoint, load_student, read_config
from dsdistill.engine.prepare import prepare
from dsdistill.engine.run_folder import INIT
from dsdistill.models.adapters import merge
from dsdistill.models.build import build_model
from dsdistill.models.sentence import read_sentence

CONTENDERS = ("pytorch", "compile", "onnx", "int8")
OPTIONS = {"threads": None, "batch": 16, "examples": 32}
THREADS = (1, 2, 4)
LEAST = 32 * MIB  # a limit below this does not even hold Python
LIMITS = (
    "These are figures and limits of this processor. They are not the devices of the paper (multi-level TinyBERT, "
    "figure 4: edge TPU, RK3399, Raspberry Pi 4, Jetson Nano)."
)
MEANING = (
    "The limit is RLIMIT_DATA: private memory that a process may write (weights, activations, heap, stacks). Code of "
    "libraries and pages of files are not counted, as the system can drop them."
)


def run_deploy(
    run: str | None = None,
    *,
    options: dict[str, Any] | None = None,
    dtype: str = "float32",
    backends: Sequence[str] | None = None,
    memory: str | None = None,
    json_path: str | Path | None = None,
    plot_path: str | Path | None = None,
) -> int:
    """Measure student and teacher of a run on PyTorch, torch.compile and ONNX Runtime, print a table, and return 0.

    Args:
        run: folder of a run with a checkpoint.
        options: `--shapes NAME=VALUE,...` on the command line:
            threads   number of threads; default: 1, 2 and 4, as far as there are cores
            batch     number of texts in a batch, with which texts per second are measured
            examples  texts that are timed one by one, evenly spaced in the first dev set
        backends: some of CONTENDERS; default: all.
        memory: a size such as 512MiB that each process may take; the table says which contenders do not fit.

    Raises:
        UserError: no such run, an option that does not exist or cannot be used here, or lacking packages.
    """
    chosen, contenders, limit = _checked(run, options, dtype, backends, memory)
    assert run is not None
    cores = len(os.sched_getaffinity(0))
    counts = [chosen["threads"]] if chosen["threads"] else [n for n in THREADS if n <= cores]
    config = read_config(run)
    tag = find_checkpoint(run)
    prepared = prepare(config, 1)
    config = prepared.config
    student, fusion = load_student(run, config, tag)
    if fusion:
        raise UserError(run, "a student with domain fusion", "a plain student, which can be deployed alone")
    models = {"student": merge(student) if config.student.lora is not None else student}
    if prepared.teacher is not None:
        models["teacher"] = build_model(prepared.teacher, None, config.task, "teacher", needs_head=False)
    texts = _texts(prepared.data.dev, chosen["examples"])
    sentence = read_sentence(os.path.join(run, INIT), INIT)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
        for name, model in models.items():
            print(f"writing the {name} …", file=sys.stderr, flush=True)
            job: dict[str, Any] = {"task": config.task, "pooling": sentence.pooling if sentence else None}
            job |= {"texts": str(place / "texts.json"), "folder": str(place / name)}
            job |= {"batch": chosen["batch"], "memory": limit, "names": onnx_graph.input_names(model)}
            _write(model.eval(), job, contenders, config.data.max_length)
            for backend in contenders:
                for threads in counts:
                    print(f"{name}, {backend}, {threads} threads …", file=sys.stderr, flush=True)
                    rows.append({"model": name, **_measured(job, backend, threads)})
            del model
    lengths = [len(text["input_ids"]) for text in texts]
    report = {
        "machine": operators.machine() | {name: version(name) for name in ("transformers", "onnxruntime")},
        "tokens": {"median": float(np.median(lengths)), "longest": max(lengths)},
        "batch": chosen["batch"],
        "threads_left_out": [n for n in THREADS if n > cores and not chosen["threads"]],
        "memory": limit,
        "rows": rows,
    }
    _print(report)
    if json_path is not None:
        disk.save_json(json_path, report)
    if plot_path is not None:
        _plot(report, plot_path)
    return 0


def _checked(
    run: str | None,
    options: dict[str, Any] | None,
    dtype: str,
    backends: Sequence[str] | None,
    memory: str | None,
) -> tuple[dict[str, Any], list[str], int | None]:
    """Return the options, the contenders and the limit in bytes; raise UserError for what cannot be measured."""
    if run is None:
        raise UserError("bench deploy", "no run", "the folder of a run after it")
    for name, value in (options or {}).items():
        if name not in OPTIONS:
            raise UserError("bench option", repr(name), f"one of {', '.join(map(repr, OPTIONS))}")
        if type(value) is not int or value < 1:
            raise UserError(f"bench {name}", repr(value), "a number from 1")
    check_unused("deploy", dtype, None, None)
    if unknown := set(backends or ()) - set(CONTENDERS):
        raise UserError("bench backends", sorted(unknown), f"some of {', '.join(CONTENDERS)}")
    limit = None if memory is None else parse_size(memory)
    if memory is not None and (limit is None or limit < LEAST):
        raise UserError("--memory", repr(memory), f"a size such as 512MiB, {LEAST // MIB}MiB or more")
    contenders = [name for name in CONTENDERS if name in (backends or CONTENDERS)]
    return OPTIONS | (options or {}), contenders, limit


def _texts(examples: Set, count: int) -> list[dict[str, list[int]]]:
    """Return texts of a dev set, evenly spaced, without padding: their tokens and token types."""
    chosen = np.linspace(0, len(examples) - 1, min(count, len(examples)), dtype=int).tolist()
    found = []
    for batch in evaluation_batches(examples.take(chosen), 1, 1, 0, 0):
        for row in range(len(batch.mask)):
            valid = batch.mask[row]
            types = batch.token_types[row] if batch.token_types is not None else valid.long() * 0
            tokens = {"input_ids": batch.input_ids[row], "token_type_ids": types}
            if bool(valid.any()):
                found.append({name: values[valid].tolist() for name, values in tokens.items()})
    return found


def _write(model: PreTrainedModel, job: dict[str, Any], contenders: list[str], longest: int) -> None:
    """Write a model's folder and the graphs that its contenders run."""
    model.save_pretrained(job["folder"])
    if {"onnx", "int8"} & set(contenders):
        deployed = onnx_graph.Deployed(model, job["task"], job["pooling"])
        onnx_graph.write_all(deployed, job["folder"], longest, int8="int8" in contenders)


def _measured(job: dict[str, Any], backend: str, threads: int) -> dict[str, Any]:
    """Return a contender's row; with a memory limit, a process that fails counts as one that does not fit."""
    folder = Path(job["folder"])
    graph = folder / (onnx_graph.INT8 if backend == "int8" else onnx_graph.GRAPH)
    patterns = f"{graph.name}*" if backend in ("onnx", "int8") else "*.safetensors"
    size = sum(path.stat().st_size for path in folder.glob(patterns))
    row = {"backend": backend, "threads": threads, "file_mib": size / MIB, "fits": True}
    given = job | {"backend": backend, "threads": threads, "graph": str(graph)}
    done = subprocess.run(
        [sys.executable, "-m", "dsdistill.bench.deploy_jobs", json.dumps(given)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
    )
    if done.returncode == 0:
        return row | json.loads(done.stdout.splitlines()[-1])
    said = (done.stderr.strip().splitlines() or [f"signal {-done.returncode}"])[-1][:200]
    if job["memory"] is None:
        raise RuntimeError(f"{backend} ended with {done.returncode}: {said}")
    return row | {"fits": False, "reason": said}


def _print(report: dict[str, Any]) -> None:
    for key, value in report["machine"].items():
        print(f"{key}: {value}")
    tokens = report["tokens"]
    print(
        f"texts of the dev set: {tokens['median']:.0f} tokens (median), {tokens['longest']} at most; float32"
    )
    if report["threads_left_out"]:
        print(f"fewer cores than {', '.join(map(str, report['threads_left_out']))} threads: not measured")
    titles = ("p50 ms", "p95 ms", f"texts/s at {report['batch']}", "peak MiB", "file MiB")
    print(f"{'':8} {'':8} {'threads':>7}", *(f"{title:>13}" for title in titles))
    for row in report["rows"]:
        print(f"{row['model']:8} {row['backend']:8} {row['threads']:>7}", end=" ")
        if row["fits"]:
            keys = ("p50_ms", "p95_ms", "texts_per_second", "peak_mib", "file_mib")
            print(*(f"{row[key]:13,.{2 if key.endswith('ms') else 1}f}" for key in keys))
        else:
            print(f"does not fit into {report['memory'] / MIB:,.0f} MiB: {row['reason'][:80]}")
    print("peak MiB: the most that the process had in memory, its libraries included")
    if any(row["model"] == "teacher" for row in report["rows"]):
        print("the teacher has random weights, on which time and memory do not depend")
    if report["memory"] is not None:
        print(MEANING)
    print(LIMITS)


def _plot(report: dict[str, Any], path: str | Path) -> None:
    """Draw each contender's time of a text against the memory of its process."""
    from matplotlib.figure import Figure  # not pyplot, which would choose a window system

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in (row for row in report["rows"] if row["fits"]):
        colour, marker = {"student": "tab:blue", "teacher": "tab:orange"}[row["model"]], "o"
        axes.scatter(row["peak_mib"], row["p50_ms"], color=colour, marker=marker)
        name = f"{row['model']} {row['backend']} ×{row['threads']}"
        axes.annotate(
            name, (row["peak_mib"], row["p50_ms"]), fontsize=7, xytext=(4, 3), textcoords="offset points"
        )
    axes.set(xlabel="peak memory of the process, MiB", ylabel="ms of a text (median)", yscale="log")
    axes.set_title(report["machine"]["processor"], fontsize=9)
    with disk.writing(path, binary=True) as file:
        figure.savefig(file, format="png", dpi=120)
