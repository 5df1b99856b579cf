"""Benchmark the whole training step: the teacher's forward, the student's forward and backward, the losses.

It measures tokens/s and peak memory by sequence length, number of mapped layers and level. The step is the engine's own
without its optimizer. DeepSpeed's part is left out, because one rank waits for no other. Contenders run in turn within
one process, so that noise of the machine affects all alike. Memory is measured in a separate process for each.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from dsdistill import disk
from dsdistill.bench import operators
from dsdistill.bench.arguments import check_common
from dsdistill.bench.step_arms import ARMS, LEVELS, PRECISIONS, RIVALS, Sizes, make
from dsdistill.config import UserError
from dsdistill.data.batch import Batch
from dsdistill.distributed.allocator import keep_freed_memory

FLOOR = "logits"  # what the others are compared with
SHORTEST = 8  # tokens of the shortest sequence after halving
HALVINGS = 3
# For the measured peak: freed blocks go back to the system at once and count no longer.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

MEMORY_SCRIPT = """
import sys, json
from dsdistill.bench import step
print(json.dumps(step.peaks_of(*json.loads(sys.argv[1]))))
"""


def points(sizes: Sizes) -> list[tuple[int, int]]:
    """Return (tokens, layers mapped): the longest sequence halved again and again, then with fewer layers."""
    lengths = [sizes.tokens >> i for i in reversed(range(HALVINGS + 1)) if sizes.tokens >> i >= SHORTEST]
    depth = sizes.student
    fewer = sorted({1, depth // 2} - {0, depth})
    return [(n, depth) for n in lengths or [sizes.tokens]] + [(sizes.tokens, m) for m in fewer]


def one_step(loss: Callable[[Batch], Tensor], batch: Batch) -> None:
    """Run forward and backward; gradients add up over calls, as over micro-batches."""
    loss(batch).backward()


def measure(
    sizes: Sizes, arms: Sequence[str], dtype: str, repeats: int, seconds: float
) -> tuple[dict[tuple[int, int], dict[str, list[tuple[float, float]]]], dict[str, list[str]]]:
    """Return (wall, processor) seconds of each round's step by point and arm, and the backends that the operators used.

    Arms run in turn, in alternating order. seconds: time after which no further repeat of a point begins.
    """
    device, rounds, made, built = torch.device(operators.device()), {}, {}, None
    for tokens, mapped in points(sizes):
        _progress(f"{tokens} tokens, {mapped} layers mapped: {', '.join(arms)}")
        if built != mapped:  # a contender's layers are fixed when it is made
            made.clear()
            gc.collect()
            made = {arm: make(arm, sizes, mapped, dtype, device) for arm in arms}
            built = mapped
        batch = sizes.batch(tokens, device)
        calls = {arm: functools.partial(one_step, loss, batch) for arm, (_, loss) in made.items()}
        for call in calls.values():
            call()
        times = {arm: [] for arm in arms}
        limit = time.perf_counter() + seconds
        for turn in range(repeats):
            if turn >= 3 and time.perf_counter() > limit:
                break
            for arm in arms[:: -1 if turn % 2 else 1]:
                started = time.process_time()
                wall = operators.seconds_of(calls[arm])
                times[arm].append((wall, time.process_time() - started))
        rounds[tokens, mapped] = times
    objective = next((module.objective for arm, (module, _) in made.items() if arm in LEVELS[1:]), None)
    return rounds, objective.backends if objective is not None else {}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% confidence interval of the median, as two of the values; if few, the smallest and the largest."""
    ordered = sorted(values)
    left = max(
        0, int(len(ordered) / 2 - 0.98 * len(ordered) ** 0.5)
    )  # normal approximation of the binomial distribution
    return ordered[left], ordered[-1 - left]


def peaks_of(arm: str, sizes: dict, dtype: str) -> list[float]:
    """Return the peak MiB above weights and gradients during a step, by point, in a process of its own."""
    sizes = Sizes(**sizes)
    device, peaks, built = torch.device(operators.device()), [], None
    for tokens, mapped in points(sizes):
        if built != mapped:
            loss = None
            loss = make(arm, sizes, mapped, dtype, device)[1]
            built = mapped
            # A small step comes first: it allocates gradients, libraries and thread pools, which must not count.
            small = Sizes(**asdict(sizes) | {"step": SHORTEST})
            loss(small.batch(SHORTEST, device)).backward()
        batch = sizes.batch(tokens, device)
        one_step(loss, batch)
        peaks.append(peak(functools.partial(one_step, loss, batch), device))
    return peaks


def peak(call: Callable[[], None], device: torch.device) -> float:
    """Return the peak MiB of a call above what is held before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = operators.resident("VmRSS")
    call()
    return operators.resident("VmHWM") - before


def peak_memory(arm: str, sizes: Sizes, dtype: str) -> list[float] | None:
    """Return `peaks_of` from a fresh process; None if /proc is missing."""
    if operators.device() == "cpu" and not Path("/proc/self/clear_refs").exists():
        return None
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, json.dumps([arm, asdict(sizes), dtype])],
        env=os.environ | MALLOC,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def run_step(
    *,
    options: dict | None = None,
    dtype: str = "float32",
    backends: Sequence[str] | None = None,
    repeats: int = 9,
    seconds: float = 120.0,
    memory: bool = True,
    json_path: str | Path | None = None,
    plot_path: str | Path | None = None,
) -> int:
    """Measure the step and print a table. Return 0.

    Args:
        options: fields of `Sizes`; `--shapes NAME=VALUE,...` on the command line.
        backends: the contenders, among ARMS; default: all that are installed. FLOOR is always measured, for the ratios.

    Raises:
        UserError: a dtype, arm, option or instruction set that does not exist, or sizes that do not fit together.
    """
    sizes = check_sizes(options or {})
    check_common(dtype, PRECISIONS, backends, ARMS)
    if "textbrewer" in (backends or ()) and not find_spec("textbrewer"):
        raise UserError("bench backends", "'textbrewer', which is not installed", "pip install textbrewer")
    wanted = {*(backends or ARMS), FLOOR}
    names = [arm for arm in ARMS if arm in wanted and (arm != "textbrewer" or find_spec("textbrewer"))]
    if operators.device() == "cpu":
        keep_freed_memory()  # as a run does
    times, backends = measure(sizes, names, dtype, repeats, seconds)
    peaks = dict.fromkeys(names)
    for arm in names if memory else ():
        _progress(f"memory: {arm}")
        peaks[arm] = peak_memory(arm, sizes, dtype)
    rows = []
    for index, ((tokens, mapped), rounds) in enumerate(times.items()):
        medians = {
            arm: tuple(map(statistics.median, zip(*values, strict=True))) for arm, values in rounds.items()
        }
        floor = peaks[FLOOR] and peaks[FLOOR][index]
        for arm in names:
            peak = peaks[arm] and peaks[arm][index]
            count = max(1, sizes.step // tokens) * tokens
            wall, processor = (x / y for x, y in zip(medians[FLOOR], medians[arm], strict=True))
            row = {"arm": arm, "tokens": tokens, "mapped": mapped, "seconds": medians[arm][0]}
            row |= {"tokens_per_second": count / medians[arm][0], "vs_logits": wall}
            row["vs_logits_95"] = interval(
                [x[0] / y[0] for x, y in zip(rounds[FLOOR], rounds[arm], strict=True)]
            )
            # CPU time is more stable on a shared machine; with several threads it includes their waiting.
            row["vs_logits_cpu"] = processor if operators.device() == "cpu" else None
            row |= {"memory_mib": peak, "memory_vs_logits": peak and floor and peak / floor}
            rows.append(row)
    report = {
        "machine": operators.machine() | versions(names),
        "sizes": asdict(sizes),
        "dtype": dtype,
        "backends": backends,
        "malloc_for_memory": MALLOC,
        "rows": rows,
    }
    _print(report)
    if json_path is not None:
        disk.save_json(json_path, report)
    if plot_path is not None:
        _plot(report, plot_path)
    return 0


def check_sizes(options: dict) -> Sizes:
    known = [field.name for field in fields(Sizes)]
    for name, value in options.items():
        if name not in known:
            raise UserError("bench option", repr(name), f"one of {', '.join(map(repr, known))}")
        if type(value) is not int or value < 1:
            raise UserError(f"bench {name}", repr(value), "a number from 1")
    sizes = Sizes(**options)
    if sizes.width % sizes.heads:
        raise UserError("bench width", sizes.width, f"a multiple of heads = {sizes.heads}")
    if sizes.student > sizes.teacher:
        raise UserError("bench student", f"{sizes.student} layers", f"at most the teacher's {sizes.teacher}")
    if sizes.tokens < SHORTEST:
        raise UserError("bench tokens", sizes.tokens, f"at least {SHORTEST}")
    return sizes


def _progress(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def versions(arms: Sequence[str]) -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("transformers", *(arm for arm in arms if arm == "textbrewer"))}


def _print(report: dict) -> None:
    for key, value in report["machine"].items():
        print(f"{key}: {value}")
    sizes = report["sizes"]
    print(
        f"{sizes['teacher']} → {sizes['student']} layers, width {sizes['width']}, {sizes['heads']} heads, ",
        end="",
    )
    print(f"{report['dtype']}, {sizes['step']} tokens a step; operators: {report['backends']}")
    if sizes["rows"]:
        print(f"attention and pairwise compare {sizes['rows']} rows of a sequence, all of shorter ones")
    print("hidden, attention, pairwise: each with all levels before it; eager, textbrewer: up to attention")
    titles = ("tokens", "mapped", "tokens/s", "vs logits", "95%", "CPU time", "peak MiB", "vs logits")
    print(f"{'':10}", *(f"{title:>{13 if title == '95%' else 9}}" for title in titles))
    for row in report["rows"]:
        peak, ratios = row["memory_mib"], (row["vs_logits"], row["vs_logits_cpu"], row["memory_vs_logits"])
        wall, processor, memory = ("–" if ratio is None else f"{ratio:.2f}×" for ratio in ratios)
        print(f"{row['arm']:10} {row['tokens']:9} {row['mapped']:9} {row['tokens_per_second']:9.0f} ", end="")
        low, high = row["vs_logits_95"]
        size = "–" if peak is None else f"{peak:.0f}"
        print(f"{wall:>9} {f'{low:.3f}–{high:.3f}':>13} {processor:>9} {size:>9} {memory:>9}")


def _plot(report: dict, path: str | Path) -> None:
    from matplotlib.figure import Figure  # not pyplot, which would choose a window system

    sizes, rows = report["sizes"], report["rows"]
    panels = [
        ("tokens", "vs_logits", "tokens/s, relative to logits only"),
        ("tokens", "memory_mib", "peak over models and gradients, MiB"),
        ("mapped", "vs_logits", "tokens/s, relative to logits only"),
    ]
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, (x, y, label) in zip(figure.subplots(1, 3), panels, strict=True):
        fixed, value = ("mapped", sizes["student"]) if x == "tokens" else ("tokens", sizes["tokens"])
        for arm in dict.fromkeys(row["arm"] for row in rows):
            curve = sorted(
                (row[x], row[y])
                for row in rows
                if row["arm"] == arm and row[fixed] == value and row[y] is not None
            )
            style = "--" if arm in RIVALS else "-"
            axes.plot(
                [p[0] for p in curve], [p[1] for p in curve], style, marker="o", markersize=3.5, label=arm
            )
        ticks = sorted({row[x] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, map(str, ticks))
        axes.set_xlabel("tokens of a sequence" if x == "tokens" else "layers mapped")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    figure.suptitle(
        f"{sizes['teacher']} → {sizes['student']} layers, width {sizes['width']}, {sizes['heads']} heads, "
        f"{report['dtype']}, {sizes['step']} tokens a step",
        fontsize=10,
    )
    with disk.explained(path):
        figure.savefig(path, dpi=150)
