"""Compare the backend that `backend="auto"` takes with all others, over operators, dtypes and classes of shapes.

The backends of a row run in turn within one process, so that noise of the machine affects all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dsdistill import disk
from dsdistill.bench.arguments import check_instruction_set
from dsdistill.bench.contenders import present
from dsdistill.bench.operators import DTYPES, machine, seconds_of, step
from dsdistill.bench.works import WORKS, Work, device
from dsdistill.config import UserError
from dsdistill.ops.backends import AMX, BACKENDS, taken_in

SHORTEST = 1e-3  # shorter calls are repeated before the clock is read again
ROUNDS, FEWEST_ROUNDS, SECONDS = 41, 5, 0.8

_HEADS_12 = {"batch": 1, "heads": 12}
CLASSES: tuple[tuple[str, dict], ...] = (
    *(
        (
            "attention",
            {"batch": 1, "heads": heads, "tokens": tokens, "width": width, "divergence": divergence},
        )
        for divergence in ("kl", "mse", "score_mse")
        for heads, tokens, width in ((2, 8, 8), (4, 32, 32), (12, 128, 64), (12, 512, 64))
    ),
    ("attention", {**_HEADS_12, "tokens": 512, "causal": True}),
    ("attention", {**_HEADS_12, "tokens": 128, "batch": 4, "masked": True}),
    ("attention", {**_HEADS_12, "tokens": 512, "rows": 128}),
    *(
        ("pairwise", {"batch": batch, "tokens": tokens, "width": width, "relation": relation})
        for relation in ("cosine", "distance")
        for batch, tokens, width in ((1, 8, 16), (8, 32, 384), (1, 128, 768), (1, 512, 768), (1, 1024, 256))
    ),
    ("pairwise", {"tokens": 512, "width": 384, "rows": 128}),
    *(
        ("hidden", {"tokens": tokens, "width": width, "teacher_width": teacher, "divergence": divergence})
        for divergence in ("mse", "cosine")
        for tokens, width, teacher in ((8, 16, 24), (128, 384, 768), (512, 384, 768), (2048, 384, 768))
    ),
    *(
        ("hidden", {"tokens": tokens, "width": width, "projected": False, "divergence": divergence})
        for divergence in ("mse", "cosine")
        for tokens, width in ((8, 16), (128, 384), (2048, 384))
    ),
    *(
        (operator, {"tokens": tokens, "vocabulary": vocabulary, "width": 384})
        for operator in ("soft-label", "cross-entropy", "vocabulary")
        for tokens, vocabulary, width in (
            (32, 2, 384),
            (512, 16, 384),
            (512, 1024, 384),
            (256, 8192, 384),
            (512, 16384, 384),
        )
    ),
)


def run_auto(
    *,
    options: dict | None = None,
    dtype: str = "float32",
    backends: object = None,
    json_path: str | Path | None = None,
    plot_path: object = None,
) -> int:
    """Print for each operator, class of shapes and dtype what "auto" takes, what is the fastest, and the loss.

    The loss is the share by which the median time of auto's backend, forward and backward, exceeds the fastest one's.
    The other arguments of `bench` do not matter here, and must be absent. Return 0.
    """
    unused = {"shapes": options, "dtype": dtype != "float32", "backends": backends, "plot": plot_path}
    for name, given in unused.items():
        if given:
            raise UserError(f"bench --{name}", "a value for auto", "none: it measures all of its own rows")
    check_instruction_set()
    found = {"machine": machine(), "amx": AMX}
    for key, value in found["machine"].items():
        print(f"{key}: {value}")
    print(
        f"{'operator':14} {'call':44} {'dtype':9} {'auto takes':>10} {'ms':>9} {'fastest':>10} {'ms':>9} {'loss':>6}"
    )
    rows = []
    for operator, sizes in CLASSES:
        for name in DTYPES:
            row = measure(operator, sizes, name)
            rows.append(row)
            ms = {backend: seconds * 1e3 for backend, seconds in row["seconds"].items()}
            print(
                f"{operator:14} {row['work']:44} {name:9} {row['auto']:>10} {ms[row['auto']]:9.3f} "
                f"{row['fastest']:>10} {ms[row['fastest']]:9.3f} {row['loss']:6.1%}",
                flush=True,
            )
    over = sum(row["loss"] > 0.05 for row in rows)
    print(f"{over} of {len(rows)} rows lose more than 5%, the worst {max(row['loss'] for row in rows):.1%}")
    if json_path is not None:
        disk.save_json(json_path, {**found, "rows": rows})
    return 0


def measure(operator: str, sizes: dict, dtype: str) -> dict:
    """Return one row: what "auto" takes, the median seconds of every backend, and the loss."""
    torch.manual_seed(0)
    work = WORKS[operator](**sizes, dtype=DTYPES[dtype])
    able = present(operator, sizes, dtype) - {"eager"} | {"reference"}
    calls = {name: _call(work, name) for name in BACKENDS if name in able}
    seconds = in_turn(calls)
    auto = taken_in(lambda: work.loss("auto"))
    fastest = min(seconds, key=seconds.__getitem__)
    row = {"operator": operator, "work": work.label, "dtype": dtype, "auto": auto, "fastest": fastest}
    return row | {"loss": seconds[auto] / seconds[fastest] - 1, "seconds": seconds}


def _call(work: Work, backend: str) -> Callable[[], None]:
    return lambda: step(work, lambda: work.loss(backend))


def seconds_alone(call: Callable[[], object]) -> float:
    """Return the seconds of one call. With one thread it is the thread's CPU time, without that of other processes."""
    if device() == "cuda" or torch.get_num_threads() > 1:
        return seconds_of(call)
    begin = time.thread_time()
    call()
    return time.thread_time() - begin


def in_turn(calls: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Return the median seconds of each call; short ones are repeated within a round."""
    repeats, times = {}, {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, round(SHORTEST / min(seconds_alone(call) for _ in range(2))))
        times[name] = []
    spent = 0.0
    for turn in range(ROUNDS):
        if turn >= FEWEST_ROUNDS and spent > SECONDS:
            break
        for name, call in calls.items():
            count = repeats[name]
            took = seconds_alone(lambda call=call, count=count: [call() for _ in range(count)])
            times[name].append(took / count)
            spent += took
    return {name: statistics.median(values) for name, values in times.items()}
