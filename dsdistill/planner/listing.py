"""Write a plan as tables and as JSON, and the line that says why a run does not fit."""

import dataclasses
from collections import Counter
from collections.abc import Mapping

from dsdistill import disk
from dsdistill.config import Config
from dsdistill.config.bounded import GIB, MIB
from dsdistill.planner.plan import Plan

DAY = 86400


def write(plan: Plan, path: str) -> None:
    """Write the plan as JSON: sizes in bytes; time in seconds, tokens per second and operations per token."""
    time = None if plan.time is None else dataclasses.asdict(plan.time)
    disk.save_json(path, vars(plan) | {"peak": plan.peak, "host": plan.host, "time": time})


def table(plan: Plan, config: Config, world_size: int, memory: int, host_memory: int | None = None) -> str:
    """Return the plan as text. memory: bytes of a rank; host_memory: bytes of a node, None if not given."""
    train = config.train
    stage = f", stage {plan.stage}" if config.stages else ""
    head = (
        f"{world_size} rank(s), micro-batches of {train.micro_batch_size} × {config.data.max_length} tokens, "
        f"{train.dtype}{stage}"
    )
    reserve = f" + {plan.reserve / GIB:g} reserved for CUDA and NCCL" if plan.reserve else ""
    need = plan.peak + plan.reserve
    verdict = f"peak: {plan.peak / GIB:.2f} GiB ({plan.highest}){reserve} = {need / GIB:.2f} of {memory / GIB:.2f} GiB"
    tail = [f"  {name}: {size / MIB:,.0f} MiB" for name, size in plan.instead.items()]
    if plan.largest:
        tail.append(f"largest micro-batch that fits: {plan.largest}")
    of = "" if host_memory is None else f" of {host_memory / GIB:.2f} GiB"
    highest = max(plan.node, key=lambda moment: plan.node[moment].total())
    return "\n".join(
        [
            *(head, "", *_grid("MiB per rank", plan.phases), "", verdict, "not included:", *tail, ""),
            *(*_grid("MiB of host memory per node", plan.node), ""),
            f"host memory: {plan.host / GIB:.2f} GiB per node ({highest}){of}",
            _disk(plan, config),
            *_time(plan, config),
        ]
    ) + "\n"  # fmt: skip


def _grid(title: str, columns: Mapping[str, Counter]) -> list[str]:
    """Return the lines of a table with a column for each moment, a row for each owner, and a row of sums."""
    rows = [[title, *columns]]
    for owner in dict.fromkeys(owner for column in columns.values() for owner in column):
        sizes = [column[owner] for column in columns.values()]
        if max(sizes) >= MIB / 2:
            rows.append([owner, *(f"{size / MIB:,.0f}" for size in sizes)])
    rows.append(["sum", *(f"{column.total() / MIB:,.0f}" for column in columns.values())])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    lines[1:1] = lines[-1:-1] = ["-" * len(lines[0])]
    return lines


def _disk(plan: Plan, config: Config) -> str:
    sizes = {name: f"{size / GIB:.2f} GiB" for name, size in plan.disk.items() if size}
    most = sizes.pop("at most")
    listed = ", ".join(f"{size} {name}" for name, size in sizes.items())
    return f"disk: {most} at most, with {config.run.keep} checkpoint(s) and one being written; {listed}"


def _time(plan: Plan, config: Config) -> list[str]:
    if plan.time is None:
        return []
    time = plan.time
    line = f"time: {time.tokens:,.0f} tokens/s, {time.step:.1f} s per step"
    if time.seconds is not None:
        line += f", {time.seconds / DAY:.2f} days for {config.train.steps:,} steps"
    total = sum(time.operations.values())
    shares = ", ".join(f"{name} {value / total:.0%}" for name, value in time.operations.items())
    return [line, f"  {total / 1e9:,.1f} billion operations per token: {shares}"]


def refusal(plan: Plan, memory: int, host_memory: int | None = None) -> str | None:
    """Return one line that says by how much the config does not fit, and what would fit; None if it fits."""
    need = plan.peak + plan.reserve
    if need > memory:
        if not plan.largest:
            what, need = "does not fit, not even with micro-batches of 1", plan.least
        else:
            what = f"does not fit (micro-batches of at most {plan.largest} would)"
        return _lacks(what, need, memory, plan.phases[plan.highest])
    if host_memory is not None and plan.host > host_memory:
        moment = max(plan.node, key=lambda name: plan.node[name].total())
        what = f"does not fit into the host memory of a node ({moment})"
        return _lacks(what, plan.host, host_memory, plan.node[moment])
    return None


def _lacks(what: str, need: int, room: int, held: Counter) -> str:
    owner, size = held.most_common(1)[0]
    return (
        f"{what}: {need / GIB:.2f} GiB are needed, {(need - room) / GIB:.2f} more than available; "
        f"{owner} takes the most ({size / GIB:.2f} GiB)"
    )
