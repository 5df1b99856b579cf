"""Report what launch/gpu_check.sh found: tables, plots, goals and results, and what to change first."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsdistill import disk
from dsdistill.bench.preflight import GPUS

HOST_BOUND = 0.8  # if the host takes this share of a call's time or more, it is the bottleneck
MISSING = math.inf  # `off` of a goal that was not measured


@dataclass(frozen=True)
class Goal:
    """A Goal is a target. off: the factor by which it is missed, at most 1 if met, MISSING if not measured."""

    name: str
    got: str
    wanted: str
    off: float
    note: str = ""


def save(path: Path, content: object) -> None:
    """Write a whole file or nothing, because a step may be ended at any time."""
    with disk.writing(path) as file:
        json.dump(content, file, indent=1)


def found(record: dict, step: str) -> list | dict | None:
    """Return what a step wrote, None if it did not run or wrote nothing."""
    return record["steps"].get(step, {}).get("found")


def rows_for(record: dict, goal: str) -> list[dict]:
    """Return the benches that a goal is judged by, without those that raised."""
    steps = ("attention", "vocabulary", "others")
    rows = [row for step in steps for row in found(record, step) or ()]
    return [row for row in rows if goal in row["goals"] and "error" not in row]


def best(bench: dict) -> dict | None:
    """Return the row of our fastest backend; None if none was timed."""
    ours = [row for row in bench["rows"] if row["backend"].partition("-")[0] in ("chunked", "triton", "cuda")]
    return min(ours, key=lambda row: row["both"], default=None)


def not_measured(name: str, wanted: str, part: str) -> Goal:
    return Goal(name, f"not measured (--part {part})", wanted, MISSING)


def plan_floor(record: dict, bench: dict) -> tuple[float, str]:
    """Return the least seconds of attention kl by statistics and one merged sweep, and what that is derived from.

    For each pair of a query and a key, statistics take 2 products of D multiply-adds and 2 exponentials, and the sweep
    takes 4 products and 2 exponentials. Products and exponentials run in parallel, at the rates of the data sheet. For
    a GPU that is not in GPUS, the time is that of the definition's products at the measured rate.
    """
    gpu = next((gpu for name, gpu in GPUS.items() if name in record["gpu"]), None)
    if gpu is None:
        return bench["flops"] / bench["measured_flops"], "the definition's products at the measured rate"
    size = bench["options"]
    pairs = size["batch"] * size["heads"] * size["tokens"] ** 2
    clocks = 0.0
    for products in (2, 4):
        tensor = 2 * products * pairs * size.get("width", 64) / max(gpu.tensor.values())
        clocks += max(tensor, 2 * pairs / 16)
    return clocks / gpu.sms / gpu.clock, "statistics and merged sweep at the data sheet's rates"


def slowest_kernel(record: dict, bench: dict, mine: dict) -> str:
    """Return what the step `kernels` measured for the same call and backend: its largest kernel, and the host."""
    same = [
        row
        for row in found(record, "kernels") or ()
        if (row["operator"], row["options"]) == (bench["operator"], bench["options"])
        and row["backend"].partition("-")[0] == mine["backend"].partition("-")[0]
        and "error" not in row
    ]
    if not same:
        return ""
    fastest = min(same, key=lambda row: row["seconds"])
    said = f"{fastest['backend']}: {fastest['seconds'] * 1e3:.3f} ms, host {fastest['host_seconds'] * 1e6:.0f} µs"
    if fastest["kernels"]:
        name, kernel = max(fastest["kernels"].items(), key=lambda item: item[1]["seconds"])
        said += f"; {name} takes most, {kernel['seconds'] * 1e3:.3f} ms, tile {kernel['tile']}"
    bound = fastest["host_seconds"] > HOST_BOUND * fastest["seconds"]
    return said + ("; the host is what it waits for" if bound else "")


def attention_goals(record: dict) -> Iterator[Goal]:
    name = "attention kl B8 H16 D64 N4096 bf16, forward and backward"
    rows = rows_for(record, "floor")
    mine = best(rows[0]) if rows else None
    if mine is None:
        yield not_measured(name, "at most 2 × the floor", "operators")
    else:
        floor, source = plan_floor(record, rows[0])
        got = f"{mine['both'] * 1e3:.2f} ms by {mine['backend']}, {mine['both'] / floor:.2f} × the floor"
        wanted = f"at most {2e3 * floor:.2f} ms, 2 × the floor ({source})"
        yield Goal(name, got, wanted, mine["both"] / (2 * floor), slowest_kernel(record, rows[0], mine))
    name = "attention kl against torch.compile"
    for bench in rows_for(record, "compile"):
        mine = best(bench)
        if mine and mine["vs_compile"]:
            got = f"{mine['vs_compile']:.2f} × ({bench['work']})"
            yield Goal(name, got, "at least 6 ×", 6 / mine["vs_compile"], slowest_kernel(record, bench, mine))
            return
    yield not_measured(name, "at least 6 ×", "operators")


def other_goals(record: dict) -> Iterator[Goal]:
    name, wanted = "hidden states", "at least 80% of copy bandwidth"
    rows = [(best(bench), bench) for bench in rows_for(record, "copy")]
    if not rows or rows[0][0] is None:
        yield not_measured(name, wanted, "operators")
    for mine, bench in rows:
        if mine is not None:
            got = f"{mine['roofline']:.0%} by {mine['backend']} ({bench['work']})"
            yield Goal(name, got, wanted, 0.8 / mine["roofline"], slowest_kernel(record, bench, mine))
    name, wanted = "losses over a vocabulary", "at least liger's speed and at most its memory"
    judged = False
    for bench in rows_for(record, "liger speed"):
        mine, liger = best(bench), next((row for row in bench["rows"] if row["backend"] == "liger"), None)
        if mine is None or liger is None:
            continue
        judged = True
        off, got = liger["both"] and mine["both"] / liger["both"], f"{mine['vs_liger']:.2f} × the speed"
        if mine["memory_mib"] is not None and liger["memory_mib"]:
            off = max(off, mine["memory_mib"] / liger["memory_mib"])
            got += f", {mine['memory_mib']:.0f} MiB of its {liger['memory_mib']:.0f}"
        got += f" by {mine['backend']} ({bench['work']})"
        yield Goal(name, got, wanted, off, slowest_kernel(record, bench, mine))
    if not judged:
        yield not_measured(name, f"{wanted}; liger-kernel must be installed (WHEELS)", "operators")
    short = rows_for(record, "short")
    if not short:
        yield not_measured("128 tokens", "no operator slower than eager", "operators")
    for bench in short:
        mine = best(bench)
        if mine and mine["vs_eager"]:
            got = f"{mine['vs_eager']:.2f} × eager's speed by {mine['backend']}"
            off = 1 / mine["vs_eager"]
            note = slowest_kernel(record, bench, mine)
            yield Goal(f"{bench['operator']} {bench['work']}", got, "not slower than eager", off, note)


def step_goals(record: dict) -> Iterator[Goal]:
    name, wanted = "all levels, sequences of 512", "at most 15% over logits only"
    rows = [row for row in found(record, "levels") or () if row["short"] and "error" not in row]
    times = {row["arm"]: row["seconds"] for row in rows}
    if not {"logits", "pairwise"} <= times.keys():
        yield not_measured(name, wanted, "step")
        return
    ratio = times["pairwise"] / times["logits"]
    shares = [
        f"{arm} {times[arm] / times['logits'] - 1:+.0%}" for arm in ("hidden", "attention") if arm in times
    ]
    profile = found(record, "profile") or []
    note = "; ".join([*shares, *(f"{row['name'][:60]} {row['seconds'] * 1e3:.2f} ms" for row in profile[:2])])
    yield Goal(name, f"{ratio - 1:+.0%}", wanted, ratio / 1.15, note)


def goals(record: dict) -> list[Goal]:
    """Return all goals, the one missed most first, and those that were not measured last."""
    every = [*attention_goals(record), *other_goals(record), *step_goals(record)]
    return sorted(every, key=lambda goal: -goal.off if goal.off < MISSING else MISSING)


def what_to_change(record: dict) -> list[str]:
    """Return lines that say what to change: first what is wrong, then missed goals, then what is unknown."""
    lines = [
        f"wrong: {failure}" for failure in (found(record, "verify") or {"failures": ()})["failures"][:10]
    ]
    lines += [
        f"broken: {name}: {step['status']}"
        for name, step in record["steps"].items()
        if step["status"] != "passed"
    ]
    every = goals(record)
    missed = [goal for goal in every if 1 < goal.off < MISSING]
    for goal in missed:
        note = f" ({goal.note})" if goal.note else ""
        lines.append(f"missed: {goal.name}: got {goal.got}, wanted {goal.wanted}{note}")
    lines += [
        f"unknown: {goal.name}: {goal.got}, wanted {goal.wanted}" for goal in every if goal.off == MISSING
    ]
    lines += [f"met: {goal.name}: got {goal.got}, wanted {goal.wanted}" for goal in every if goal.off <= 1]
    return lines


def markdown(record: dict) -> str:
    lines = [f"# {record['gpu']}, {record['date']}", ""]
    lines += [f"torch {record['torch']}, Triton {record['triton']}, Python {record['python']}", ""]
    lines += ["**A dry run: its figures mean nothing.**", ""] if record["dry_run"] else []
    lines += ["## What to change first", ""]
    lines += [f"{number}. {line}" for number, line in enumerate(what_to_change(record), 1)]
    lines += ["", "## What ran", "", "| step | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {step['status']} | {step['seconds']} |" for name, step in record["steps"].items()]
    checks = found(record, "verify")
    if checks:
        said = (
            f"verify: {checks['done']} of {checks['checks']} checks, {len(checks['failures'])} failed, worst"
        )
        lines += ["", f"{said} error {checks['worst']:.2f} of what is allowed"]
    lines += bench_table(record)
    for title, table in (("Tiles", tile_table), ("Kernels", kernel_table), ("The whole step", step_table)):
        rows = table(record)
        if rows:
            lines += ["", f"## {title}", "", *rows]
    return "\n".join(lines) + "\n"


def bench_table(record: dict) -> list[str]:
    head = ["work", "backend", "forward ms", "fwd+bwd ms", "vs eager", "vs compile", "roofline", "MiB"]
    lines = ["", "## Operators", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    before = len(lines)
    for bench in (
        bench for step in ("attention", "vocabulary", "others") for bench in found(record, step) or ()
    ):
        if "error" in bench:
            sizes = " ".join(f"{name}={value}" for name, value in bench["options"].items())
            lines.append(f"| {bench['operator']} {sizes} | | {bench['error']} |")
            continue
        for row in bench["rows"]:
            ratios = ["–" if row.get(k) is None else f"{row[k]:.2f}×" for k in ("vs_eager", "vs_compile")]
            memory = "–" if row["memory_mib"] is None else f"{row['memory_mib']:.1f}"
            cells = [f"{bench['operator']} {bench['work']}", row["backend"]]
            cells += [f"{row['forward'] * 1e3:.3f}", f"{row['both'] * 1e3:.3f}", *ratios]
            lines.append("| " + " | ".join([*cells, f"{row['roofline']:.0%}", memory]) + " |")
        for name, reason in (bench["stopped"] | bench["failures"]).items():
            lines.append(f"| {bench['operator']} {bench['work']} | {name} | not timed: {reason} |")
    return lines if len(lines) > before else []


def tile_table(record: dict) -> list[str]:
    lines = ["| kernel | D | N | fastest | ms | the table's, ms |", "|---" * 6 + "|"]
    for row in found(record, "tiles") or ():
        table = "–" if row["table_ms"] is None else f"{row['table_ms']:.3f}"
        place = f"{row['kernel']} | {row['width']} | {row['tokens']}"
        lines.append(f"| {place} | {'x'.join(map(str, row['tile']))} | {row['ms']:.3f} | {table} |")
    return lines if len(lines) > 2 else []


def kernel_table(record: dict) -> list[str]:
    lines = ["| work | backend | call ms | host µs | kernels: tile, launches, ms |", "|---" * 5 + "|"]
    for row in found(record, "kernels") or ():
        if "error" in row:
            lines.append(f"| {row['operator']} {row['options']} | {row['backend']} | {row['error']} | | |")
            continue
        parts = [
            f"{name} {kernel['tile']}, {kernel['launches']:.0f}, {kernel['seconds'] * 1e3:.3f}"
            for name, kernel in row["kernels"].items()
        ]
        figures = f"{row['seconds'] * 1e3:.3f} | {row['host_seconds'] * 1e6:.0f}"
        lines.append(
            f"| {row['operator']} {row['work']} | {row['backend']} | {figures} | {'; '.join(parts)} |"
        )
    return lines if len(lines) > 2 else []


def step_table(record: dict) -> list[str]:
    lines = ["| levels | tokens | ms | vs logits | peak MiB | backends |", "|---" * 6 + "|"]
    for row in found(record, "levels") or ():
        if "error" in row:
            lines.append(f"| {row['arm']} | {row['tokens']} | {row['error']} | | | |")
            continue
        figures = f"{row['seconds'] * 1e3:.2f} | {row['vs_logits']:.2f}× | {row['memory_mib']:.0f}"
        lines.append(f"| {row['arm']} | {row['tokens']} | {figures} | {row['backends']} |")
    kernels = found(record, "profile") or ()
    if kernels:
        lines += [
            "",
            "All levels, the largest kernels of one step:",
            "",
            "| kernel | calls | ms |",
            "|---|---|---|",
        ]
    for row in kernels:
        lines.append(
            f"| {row['name'].replace('|', '/')[:90]} | {row['calls']} | {row['seconds'] * 1e3:.3f} |"
        )
    for row in found(record, "run") or ():
        said = f"{row['tokens_per_second']:,.0f} tokens/s, peak {row['peak_gb']:.2f} GB"
        lines += ["", f"A run under DeepSpeed, {row['terms']}, {row['tokens']} tokens: {said}"]
    return lines if len(lines) > 2 else []


def plots(record: dict, out: Path) -> None:
    """Draw time and memory of attention kl, one sequence, against its length."""
    from matplotlib.figure import Figure  # not pyplot, which would choose a window system

    rows = [
        (bench["options"], row)
        for bench in found(record, "attention") or ()
        for row in bench.get("rows", ())
        if bench["variant"] == "kl" and bench["options"]["batch"] == 1
    ]
    for key, label in (("both", "forward + backward, s"), ("memory_mib", "extra memory, MiB")):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for name, width in dict.fromkeys((row["backend"], o.get("width", 64)) for o, row in rows):
            points = [
                (o["tokens"], row[key])
                for o, row in rows
                if (row["backend"], o.get("width", 64)) == (name, width) and row[key]
            ]
            if points:
                axes.loglog(*zip(*sorted(points), strict=True), "o-", label=f"{name} D{width}")
        axes.set(xlabel="tokens", ylabel=label, title=f"attention kl, {record['gpu']}")
        if axes.lines:
            axes.legend()
            figure.savefig(out / f"lengths-{'time' if key == 'both' else 'memory'}.png", dpi=120)
