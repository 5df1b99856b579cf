"""Run part "operators" of launch/gpu_check.sh: time tiles, single kernels, and every operator against its rivals.

Each step writes its rows as they come. If its budget ends, only the remaining rows are lost; if a row raises, only that
row is lost.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dsdistill.bench import operators
from dsdistill.bench.check_report import save
from dsdistill.bench.contenders import PLANS, contender, pairs_of, present
from dsdistill.bench.works import WORKS, Work, attention_work, device
from dsdistill.ops import clock
from dsdistill.ops.attention import triton_schedule, tuning
from dsdistill.ops.attention.triton_tiles import trying, width_of
from dsdistill.ops.gpu import Tile


@dataclass(frozen=True)
class Bench:
    """A Bench is one measured call.

    variant: its name for `auto`. goals: names of the goals that its row counts for (check_report.py).
    """

    operator: str
    variant: str
    options: dict = field(default_factory=dict)
    backends: tuple[str, ...] | None = None
    goals: tuple[str, ...] = ()
    dtype: str = "bfloat16"


OURS = ("chunked", "triton")
LONG = {"batch": 8, "heads": 16, "tokens": 4096}  # two billion pairs of a query and a key
SHORT = {"batch": 8, "heads": 16, "tokens": 128}
WIDE = {"batch": 8, "heads": 8, "tokens": 4096, "width": 128}
EAGER = ("eager", "eager-half")
ATTENTION = [
    Bench("attention", "kl", LONG, (*EAGER, "compile", "sdpa", "flex", *OURS, *PLANS), ("floor", "compile")),
    Bench("attention", "kl", SHORT, (*EAGER, "sdpa", *OURS, *PLANS), ("short",)),
    Bench("attention", "kl", LONG | {"tokens": 512}, (*EAGER, "sdpa", *OURS, *PLANS)),
    # Whole matrices of eight sequences would not fit.
    Bench("attention", "kl", LONG | {"batch": 2}, ("eager", "compile", *OURS), ("compile",)),
    Bench("attention", "kl", WIDE, ("eager-half", "sdpa", *OURS, *PLANS[1:])),
    Bench("attention", "kl", LONG | {"causal": True}, ("sdpa", *OURS)),
    Bench("attention", "kl", LONG | {"masked": True}, ("sdpa", *OURS)),
    Bench("attention", "kl", LONG | {"packed": True, "causal": True}, ("sdpa", "flex", *OURS)),
    Bench("attention", "kl", LONG | {"group": 4}, ("sdpa", *OURS)),
    Bench("attention", "mse", LONG | {"divergence": "mse"}, OURS),
    Bench("attention", "score_mse", LONG | {"divergence": "score_mse"}, OURS),
]
LENGTHS = [512 << i for i in range(9)]  # to 131,072
ATTENTION += [
    Bench("attention", "kl", {"batch": 1, "heads": 8, "tokens": tokens, "width": width}, backends)
    for tokens in LENGTHS
    for width in (64, 128)
    for backends in [("triton", "sdpa", *(("chunked", "eager-half") if tokens <= 8192 else ()))]
]
# Each shape of liger and of torch.compile needs ten seconds or more of the budget for compilation.
HEADS = ("eager", "apart", "liger", *OURS)
SHORT_HEADS = ("eager", *OURS)
VOCABULARY = [
    Bench(
        "vocabulary",
        "forward_kl",
        {"tokens": 4096, "vocabulary": 151936, "width": 2048},
        HEADS,
        ("liger speed", "liger memory"),
    ),
    Bench(
        "vocabulary",
        "forward_kl",
        {"tokens": 4096, "vocabulary": 32000, "width": 2048},
        HEADS,
        ("liger speed", "liger memory"),
    ),
    Bench(
        "vocabulary", "jsd", {"tokens": 4096, "vocabulary": 32000, "width": 2048, "divergence": "jsd"}, OURS
    ),
    Bench(
        "vocabulary",
        "forward_kl",
        {"tokens": 128, "vocabulary": 32000, "width": 2048},
        SHORT_HEADS,
        ("short",),
    ),
    Bench("soft-label", "forward_kl", {"tokens": 4096, "vocabulary": 32000, "width": 2048}, HEADS),
    Bench(
        "soft-label",
        "forward_kl",
        {"tokens": 128, "vocabulary": 32000, "width": 2048},
        SHORT_HEADS,
        ("short",),
    ),
]
HIDDEN = ("eager", "chunked", "cuda", "triton")
PAIRWISE = ("eager", *OURS)
OTHERS = [
    Bench("hidden", "mse", {"tokens": 262144, "projected": False}, (*HIDDEN, "compile"), ("copy",)),
    Bench("hidden", "mse projected", {"tokens": 16384}, HIDDEN),
    Bench("hidden", "mse projected", {"tokens": 1024}, HIDDEN),
    Bench("hidden", "mse projected", {"tokens": 128}, HIDDEN, ("short",)),
    Bench("hidden", "cosine", {"tokens": 16384, "projected": False, "divergence": "cosine"}, HIDDEN),
    Bench("pairwise", "cosine", {"batch": 8, "tokens": 512}, (*PAIRWISE, "compile")),
    Bench("pairwise", "distance", {"batch": 8, "tokens": 512, "relation": "distance"}, PAIRWISE),
    Bench("pairwise", "cosine", {"batch": 8, "tokens": 128}, PAIRWISE, ("short",)),
    Bench("pairwise", "cosine", {"batch": 1, "tokens": 4096}, PAIRWISE),
]
BENCHES = {"attention": ATTENTION, "vocabulary": VOCABULARY, "others": OTHERS}
PUBLIC = {
    "attention": "attention_alignment",
    "pairwise": "pairwise_alignment",
    "hidden": "hidden_alignment",
    "soft-label": "soft_label_alignment",
    "vocabulary": "vocabulary_losses",
}
RECORDED = ("triton", "cuda")  # backends that `auto` uses only if a record allows it
# Single kernels: (operator, contender, options of the work).
KERNELS = [
    ("attention", "triton-merged", LONG),
    ("attention", "triton-sweeps", LONG),
    ("attention", "triton-merged", LONG | {"divergence": "mse"}),
    ("attention", "triton-merged", LONG | {"packed": True, "causal": True}),
    ("attention", "triton-merged", WIDE),
    ("attention", "triton-row", LONG | {"tokens": 512}),
    ("attention", "triton-row", SHORT),
    ("attention", "chunked", SHORT),
    ("hidden", "cuda", {"tokens": 262144, "projected": False}),
    ("hidden", "triton", {"tokens": 262144, "projected": False}),
    ("hidden", "triton", {"tokens": 128}),
    ("pairwise", "triton", {"batch": 8, "tokens": 512}),
    ("pairwise", "triton", {"batch": 8, "tokens": 512, "relation": "distance"}),
    ("vocabulary", "triton", {"tokens": 4096, "vocabulary": 151936, "width": 2048}),
    ("vocabulary", "triton", {"tokens": 128, "vocabulary": 32000, "width": 2048}),
]
PLAN_KERNELS = {"merged": ("statistics", "merged"), "sweeps": ("statistics", "rows", "columns")}
TILE_SHAPES = [(LONG, "merged"), (LONG, "sweeps"), (WIDE, "merged"), (WIDE, "sweeps")]
SMALL = {"batch": 1, "heads": 2, "tokens": 32, "width": 16, "teacher_width": 16, "vocabulary": 64}


def small(options: dict, operator: str) -> dict:
    """Return options of a call that takes almost no time on a CPU."""
    sizes = {key: value for key, value in SMALL.items() if key in options}
    sizes |= {"width": 16} | ({"teacher_width": 16} if operator == "hidden" else {})
    return options | sizes | ({"group": 2} if "group" in options else {})


def in_small(benches: Sequence[Bench]) -> list[Bench]:
    """Return the same calls in tiny form, each once."""
    found: dict[str, Bench] = {}
    for bench in benches:
        shrunk = dataclasses.replace(bench, options=small(bench.options, bench.operator))
        key = json.dumps([shrunk.operator, shrunk.options, shrunk.goals], sort_keys=True)
        found.setdefault(key, shrunk)
    return list(found.values())


def measure_benches(out: Path, benches: Sequence[Bench], dry: bool) -> list[dict]:
    """Measure each call and write its row, or the exception that it ended with."""
    if dry:  # graphs are captured as on a GPU, but without seconds of compilation to machine code
        torch.compile = functools.partial(torch.compile, backend="eager")
    rows = []
    for bench in in_small(benches) if dry else benches:
        path = out.with_suffix(".one")
        row = dataclasses.asdict(bench)
        try:
            able = present(bench.operator, bench.options, bench.dtype)
            operators.run_bench(
                bench.operator,
                options=bench.options,
                dtype=bench.dtype,
                backends=[name for name in bench.backends or () if name in able] or None,
                repeats=3 if dry else 10,
                seconds=2,
                memory=not dry,
                json_path=path,
            )
            row |= json.loads(path.read_text(encoding="utf-8"))
        except Exception as error:  # also from a compiler or driver
            traceback.print_exc(file=sys.stdout)
            row["error"] = operators.first_line(error)
        rows.append(row)
        save(out, rows)
    return rows


def benches_step(name: str, out: Path, dry: bool) -> int:
    """Run one step of benches. Return 1 if a row raised or a contender of ours failed its check."""
    rows = measure_benches(out, BENCHES[name], dry)
    return int(any("error" in row or row["failures"] for row in rows))


def kernels(out: Path, dry: bool) -> int:
    """Time each Triton kernel of a call by itself, the whole call, and the call's time on the host."""
    rows = []
    calls = {json.dumps([o, n, small(options, o)]): (o, n, small(options, o)) for o, n, options in KERNELS}
    for operator, name, options in calls.values() if dry else KERNELS:
        if name.partition("-")[0] not in present(operator, options, "bfloat16"):
            continue
        row = {"operator": operator, "backend": name, "options": options}
        try:
            row |= measure_kernels(WORKS[operator](**options, dtype=torch.bfloat16), name, 2 if dry else 10)
        except Exception as error:  # also from a compiler or driver
            traceback.print_exc(file=sys.stdout)
            row["error"] = operators.first_line(error)
        rows.append(row)
        save(out, rows)
    return int(any("error" in row for row in rows))


def measure_kernels(work: Work, name: str, repeats: int) -> dict:
    """Return seconds of the call's kernels by name, of the whole call, and of the host until the call returns."""
    call = functools.partial(operators.step, work, contender(work, name))
    call()
    seconds = statistics.median(operators.seconds_of(call) for _ in range(repeats))
    host = statistics.median(clock.host_seconds_of(call, device()) for _ in range(repeats))
    found: dict[str, dict] = {}
    for _ in range(3):
        with clock.kernel_laps(device()) as laps:
            call()
        for kernel, tile, lap in laps():
            row = found.setdefault(kernel, {"tile": "x".join(map(str, tile)), "laps": []})
            row["laps"].append(lap)
    for row in found.values():
        each = row.pop("laps")
        row |= {"launches": len(each) // 3, "seconds": sum(each) / 3}
    return {"work": work.label, "seconds": seconds, "host_seconds": host, "kernels": found}


def tile_calls(
    options: dict, plan: str
) -> tuple[list[Callable[[], Sequence[torch.Tensor]]], Sequence[torch.Tensor]]:
    """Return attention's kernels on one shape, without conditions and with all of them, and the tensors."""
    calls = []
    for conditions in ({}, {"causal": True, "masked": True}):
        work = attention_work(**options | conditions, dtype=torch.bfloat16)
        tensors = [x.detach() for x in list(work.tensors.values())[:4]]
        scale, one = tensors[0].shape[3] ** -0.5, torch.ones((), device=device())
        given = triton_schedule.arguments(tensors, pairs_of(work), None, "kl", scale, scale, "match", one)
        calls.append(functools.partial(triton_schedule.run, *given[:-1], plan, True, True))
        if not conditions:
            plain = tensors
    return calls, plain


def tiles(out: Path, dry: bool) -> int:
    """Time the tiles of attention's kernels; the fastest go into the record."""
    if "triton" not in present("attention", {}, "bfloat16"):
        save(out, [])
        return 0
    shapes = [(small(LONG, "attention"), "merged")] if dry else TILE_SHAPES
    compile_ahead(shapes, 0 if dry else min(12, os.cpu_count() or 1))
    rows: list[dict] = []
    for options, plan in shapes:
        calls, tensors = tile_calls(options, plan)
        seen = [row["kernel"] for row in rows if row["width"] == width_of(tensors)]
        for row in tuning.try_tiles(calls, tensors, seen):
            rows.append(row)
            save(out, rows)
    return int(not rows)


def compile_ahead(shapes: Sequence[tuple[dict, str]], workers: int) -> None:
    """Compile all tiles in parallel, on short sequences, into Triton's cache on disk: one by one takes minutes."""
    tasks = list(ahead(shapes))
    if workers <= 1:
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for said in pool.map(compile_tile, tasks):
            if said:
                print(said)


def ahead(shapes: Sequence[tuple[dict, str]]) -> Iterator[tuple[dict, str, str, Tile]]:
    """Yield the arguments of `compile_tile`, each kernel once for a head width."""
    seen = set()
    for options, plan in shapes:
        short = options | {"batch": 1, "tokens": min(256, options["tokens"])}
        tensors = tile_calls(short, plan)[1]
        for kernel in PLAN_KERNELS[plan]:
            if (kernel, width_of(tensors)) not in seen:
                seen.add((kernel, width_of(tensors)))
                for tile in tuning.candidates(kernel, tensors):
                    yield short, plan, kernel, tile


def compile_tile(task: tuple[dict, str, str, Tile]) -> str | None:
    """Run one tile once, in a process of its own; return the error, if any."""
    options, plan, kernel, tile = task
    try:
        with trying({kernel: tile}):
            for call in tile_calls(options, plan)[0]:
                call()
    except Exception as error:  # it occurs again in the step itself
        return f"{kernel} {tile}: {operators.first_line(error)}"
    return None


def record_rows(rows: Sequence[dict] | None) -> list[dict]:
    """Return the rows that `auto` reads: each backend of ours against `chunked`."""
    found = []
    for measured in rows or ():
        if "error" in measured:
            continue
        times = {row["backend"]: row["both"] for row in measured["rows"]}
        for backend in RECORDED:
            if backend in times and "chunked" in times and measured["operator"] in PUBLIC:
                found.append(
                    {
                        "operator": PUBLIC[measured["operator"]],
                        "variant": measured["variant"],
                        "dtype": measured["dtype"],
                        "tokens": measured["options"]["tokens"],
                        "backend": backend,
                        "checked": backend not in measured["failures"],
                        "vs_chunked": times["chunked"] / times[backend],
                    }
                )
    return found


def recordable() -> set[tuple[str, str, str]]:
    """Return (operator, variant, dtype) of every call for which a record can allow a kernel to `auto`."""
    return {(bench.operator, bench.variant, bench.dtype) for benches in BENCHES.values() for bench in benches}


STEPS = {
    "tiles": tiles,
    "kernels": kernels,
    **{name: functools.partial(benches_step, name) for name in BENCHES},
}
