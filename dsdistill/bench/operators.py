"""Benchmark the operators that pass their check: time, memory, arithmetic and ratios.

The contenders of a row run in turn within one process, so that noise of the machine affects all alike. Eager and
torch.compile run the operator's definition (`reference`). A contender that fails its check is not timed.
"""

from __future__ import annotations

import functools
import gc
import inspect
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dsdistill import disk
from dsdistill.bench import verify
from dsdistill.bench.arguments import check_common
from dsdistill.bench.contenders import CONTENDERS, HEADS, RIVALS, contender, present, unasked
from dsdistill.bench.works import WORKS, Work, device, randn
from dsdistill.config import UserError
from dsdistill.engine.machine import processor
from dsdistill.ops import clock
from dsdistill.ops.backends import extension

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@functools.cache
def checked(operator: str, backend: str, dtype: torch.dtype) -> str | None:
    """Return the first failing parity case of a backend; None if every case passes.

    Each GPU kernel must be compiled first, so these run only a selection of cases; `verify` runs all."""
    for case in verify.all_cases():
        if backend in ("triton", "cuda") and case.name not in verify.INTERPRETED:
            continue
        if case.operator == operator and verify.runnable(case, backend, dtype):
            try:
                verify.check_parity(case, backend, dtype)
            except Exception as error:  # a mismatch, or an error of a compiler or driver
                return f"{case.name}: {first_line(error)}"
    return None


@functools.cache
def roofline() -> tuple[float, float]:
    """Return this process's rates of matrix products, FLOP/s in float32 (bfloat16 on a GPU), and of copies, byte/s."""
    size = 8192 if device() == "cuda" else 1024
    a, b = randn(size, size), randn(size, size)
    big = randn(1 << (28 if device() == "cuda" else 24))
    if device() == "cuda":
        a, b = a.bfloat16(), b.bfloat16()
    out = torch.empty_like(big)
    products = min(seconds_of(lambda: a @ b) for _ in range(10))
    copies = min(seconds_of(lambda: out.copy_(big)) for _ in range(10))
    return 2 * size**3 / products, 2 * big.numel() * 4 / copies


def seconds_of(call: Callable[[], object]) -> float:
    """Return the seconds of one call; on a GPU by its own clock."""
    return clock.seconds_of(call, device())


def first_line(error: Exception) -> str:
    """Return an exception's type and the first line of its message."""
    said = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {said[0][:200]}"


def step(work: Work, loss: Callable[[], Tensor]) -> None:
    torch.autograd.grad(loss(), work.student)


def warm_up(work: Work, names: Sequence[str]) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Return the contenders after one step each, and why others cannot run, such as out of memory."""
    # Compilations for earlier work count towards the recompile limit, after which calls run eagerly.
    torch._dynamo.reset()
    calls, failures = {}, {}
    for name in names:
        try:
            call = contender(work, name)
            step(work, call)
            calls[name] = call
        except Exception as error:  # also from foreign code
            failures[name] = first_line(error)
            if device() == "cuda":
                torch.cuda.empty_cache()
    return calls, failures


def measure(
    work: Work, calls: dict[str, Callable[[], Tensor]], repeats: int, seconds: float
) -> dict[str, dict[str, float]]:
    """Return median seconds of forward without gradients and of forward with backward, contenders in turn."""
    names = list(calls)
    times = {name: {"forward": [], "both": []} for name in names}
    limit = time.perf_counter() + seconds
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() > limit:
            break
        for name in names:
            with torch.no_grad():
                times[name]["forward"].append(seconds_of(calls[name]))
            times[name]["both"].append(seconds_of(lambda name=name: step(work, calls[name])))
    return {
        name: {kind: statistics.median(values) for kind, values in kinds.items()}
        for name, kinds in times.items()
    }


MEMORY_SCRIPT = """
import sys, json
from dsdistill.bench import operators
print(operators.peak_of(*json.loads(sys.argv[1])))
"""


def resident(field: str) -> float:
    """Return MiB of this process: "VmRSS" now or "VmHWM" at its peak. (getrusage would include the parent's peak.)"""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def peak_of(operator: str, options: dict, dtype: str, name: str) -> float:
    """Return the peak MiB above the inputs and the returned gradients during one step, in a process of its own."""
    # A small call comes first, so that libraries and thread pools do not count for the operator.
    few = {"tokens": 16, "vocabulary": 64, "width": 16}
    small = few if operator in HEADS else {"tokens": 16}
    warm = WORKS[operator](**small, dtype=DTYPES[dtype])
    step(warm, contender(warm, name))
    work = WORKS[operator](**options, dtype=DTYPES[dtype])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    step(work, contender(work, name))
    returned = sum(x.numel() * x.element_size() for x in work.student) / 2**20
    return resident("VmHWM") - before - returned


def peak_on_gpu(operator: str, options: dict, dtype: str, name: str) -> float:
    work = WORKS[operator](**options, dtype=DTYPES[dtype])
    call = contender(work, name)
    step(work, call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(work, call)
    returned = sum(x.numel() * x.element_size() for x in work.student)
    return (torch.cuda.max_memory_allocated() - before - returned) / 2**20


def peak_memory(operator: str, options: dict, dtype: str, name: str) -> float | None:
    """Return `peak_of` from a fresh process, where no earlier peak hides it; on a GPU, the allocator's peak here.

    Return None for contenders that would have to be compiled again, and if /proc is missing."""
    if name in ("compile", "flex"):
        return None
    if device() == "cuda":
        return peak_on_gpu(operator, options, dtype, name)
    if not Path("/proc/self/clear_refs").exists():
        return None
    argument = json.dumps([operator, options, dtype, name])
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, argument], capture_output=True, text=True, check=True
    )
    return float(run.stdout.split()[-1])


def machine() -> dict:
    native = extension()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if device() == "cuda" else None,
        "threads": torch.get_num_threads(),
        "instruction_set": native.instruction_set() if native else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "allocator": {
            name: os.environ.get(name, "default")
            for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
        },
    }


def run_bench(
    operator: str = "attention",
    *,
    options: dict | None = None,
    dtype: str = "float32",
    backends: Sequence[str] | None = None,
    repeats: int = 20,
    seconds: float = 60.0,
    memory: bool = True,
    json_path: str | Path | None = None,
    plot_path: str | Path | None = None,
) -> int:
    """Measure one operator and print a table. Return 0, or 1 if a contender failed its check.

    Args:
        operator: "attention", "pairwise", "hidden", "soft-label", "cross-entropy" or "vocabulary".
        options: sizes and choices of the measured call, all optional; `--shapes NAME=VALUE,...` on the command line:
            attention   batch, heads, tokens, width, divergence (kl, mse, score_mse), causal, masked, packed,
                        group (query heads that share a key head), rows (queries compared; default: all)
            pairwise    batch, tokens, width, relation (cosine, dot, distance), rows (default: all)
            hidden      tokens, width, teacher_width, projected (false: none), divergence (mse, cosine)
            soft-label  tokens, vocabulary, width, divergence, as terms.soft_label
            cross-entropy  tokens, vocabulary, width
            vocabulary  as soft-label: task and soft labels together
        backends: among CONTENDERS. "eager" is the definition with float32 sums; "eager-half" is the definition
            completely in the inputs' half precision; "liger" is liger-kernel's fused losses, if it is installed;
            "apart" computes task and soft labels by separate operators; "sdpa" and "flex" compute one model's
            attention of that shape.
        seconds: time after which no further repeat begins.

    Raises:
        UserError: an operator, dtype, backend, option or instruction set that does not exist.
    """
    if operator not in WORKS:
        raise UserError(
            "bench operator",
            repr(operator),
            f"one of {', '.join(map(repr, WORKS))}, 'auto', 'step', 'data', 'load'",
        )
    check_common(dtype, DTYPES, backends, CONTENDERS)
    options = options or {}
    known = {p.name: p.default for p in inspect.signature(WORKS[operator]).parameters.values()}
    del known["dtype"]
    for name in options:
        if name not in known:
            raise UserError("bench option", repr(name), f"one of {', '.join(map(repr, known))}")
        if type(options[name]) is not type(known[name]):
            raise UserError(f"bench {name}", repr(options[name]), f"a value like {known[name]}")
        if type(options[name]) is int and options[name] < 1:
            raise UserError(f"bench {name}", options[name], "1 or more")
    able = present(operator, options, dtype)
    able = able if backends else unasked(able)
    names = [name for name in backends or CONTENDERS if name in able]
    failures = {}
    for name in names:
        backend = name.partition("-")[0]
        own = backend not in RIVALS
        if own and (failure := checked(operator, backend, DTYPES[dtype])):
            failures[name] = failure
    work = WORKS[operator](**options, dtype=DTYPES[dtype])
    flops, bandwidth = roofline()
    calls, stopped = warm_up(work, [name for name in names if name not in failures])
    names = list(calls)
    times = measure(work, calls, repeats, seconds)
    floor = max(work.flops / flops, work.bytes / bandwidth)
    rows = []
    for name in names:
        row = {"backend": name, **times[name], "roofline": floor / times[name]["both"]}
        row["memory_mib"] = peak_memory(operator, options, dtype, name) if memory else None
        for rival in RIVALS:
            row[f"vs_{rival}"] = times[rival]["both"] / times[name]["both"] if rival in times else None
        rows.append(row)
    report = {"machine": machine(), "operator": operator, "work": work.label, "dtype": dtype}
    report |= {
        "flops": work.flops,
        "bytes": work.bytes,
        "measured_flops": flops,
        "measured_bandwidth": bandwidth,
    }
    report |= {"rows": rows, "failures": failures, "stopped": stopped}
    _print(report)
    if json_path is not None:
        disk.save_json(json_path, report)
    if plot_path is not None:
        _plot(report, plot_path)
    return int(bool(failures))


def _print(report: dict) -> None:
    for key, value in report["machine"].items():
        print(f"{key}: {value}")
    print(
        f"{report['operator']} {report['work']} {report['dtype']}: {report['flops'] / 1e9:.2f} GFLOP, ",
        end="",
    )
    print(f"{report['bytes'] / 2**20:.1f} MiB; roofline ", end="")
    print(f"{report['measured_flops'] / 1e9:.0f} GFLOP/s, {report['measured_bandwidth'] / 1e9:.1f} GB/s")
    rivals = [name for name in RIVALS if any(row[f"vs_{name}"] is not None for row in report["rows"])]
    print(f"{'backend':10} {'forward ms':>11} {'fwd+bwd ms':>11} ", end="")
    print(*(f"{'vs ' + name:>14}" for name in rivals), f"{'roofline':>9} {'extra MiB':>10}")
    for row in report["rows"]:
        ratios = [f"{row[f'vs_{name}']:13.2f}×" for name in rivals]
        memory = "–" if row["memory_mib"] is None else f"{row['memory_mib']:.1f}"
        print(f"{row['backend']:10} {row['forward'] * 1e3:11.2f} {row['both'] * 1e3:11.2f} ", end="")
        print(*ratios, f"{row['roofline']:9.0%} {memory:>10}")
    for name, failure in report["failures"].items():
        print(f"{name}: not timed, its check failed: {failure}")
    for name, reason in report["stopped"].items():
        print(f"{name}: not timed: {reason}")


def _plot(report: dict, path: str | Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    bars = axes.bar(*zip(*((row["backend"], row["both"] * 1e3) for row in report["rows"]), strict=True))
    axes.bar_label(bars, fmt="%.1f")
    axes.set_ylabel("forward + backward, ms")
    axes.set_title(f"{report['operator']} {report['work']} {report['dtype']}", fontsize=10)
    with disk.explained(path):
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
