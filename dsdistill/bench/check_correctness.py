"""Run part "correctness" of launch/gpu_check.sh: check the built library and the kernels for `auto`, and run tests."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from dsdistill.bench import verify as checks
from dsdistill.bench.cases import Case
from dsdistill.bench.check_operators import RECORDED, recordable
from dsdistill.bench.check_report import save
from dsdistill.bench.operators import first_line
from dsdistill.bench.works import device
from dsdistill.ops import clock

ROOT = Path(__file__).parents[2]
TESTS = ("gpu_kernels", "records", "tile_tuning", "attention_tiles")

# Run in a process of its own: this one may already have loaded the library of the source folder.
SYMBOLS = """
import importlib.util, json, sys, torch
if len(sys.argv) > 1:
    spec = importlib.util.spec_from_file_location("dsdistill._C", sys.argv[1])
    sys.modules["dsdistill._C"] = library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
from dsdistill.ops import available_backends
from dsdistill.ops.backends import extension
library = extension()
registered = torch._C._dispatch_has_kernel_for_dispatch_key
found = {"backends": available_backends(), "library": library and library.__file__, "cuda": [], "registered": []}
if library:
    found["cuda"] = list(library.cuda_architectures)
    found["instruction_set"] = library.instruction_set()
    names = [f"dsdistill::{name}" for name in ("attention_alignment", "pairwise_alignment", "hidden_alignment")]
    found["registered"] = [name for name in names if registered(name, "CPU")]
    if found["cuda"] and registered("dsdistill::hidden_rows", "CUDA"):
        found["registered"].append("dsdistill::hidden_rows")
print(json.dumps(found))
"""


def symbols(out: Path, dry: bool) -> int:
    """Load the built library, and check that its operators are there and all symbols are resolved."""
    built = [path for path in [os.environ.get("DSDISTILL_BUILT")] if path]  # a dry run builds it elsewhere
    done = subprocess.run(
        [sys.executable, "-c", SYMBOLS, *built], capture_output=True, text=True, check=False
    )
    if done.returncode:
        save(out, {"failures": [done.stderr.strip()[-400:]]})
        print(done.stderr)
        return 1
    found = json.loads(done.stdout.splitlines()[-1])
    failures = []
    if found["library"] is None:
        failures += ["no library was built"] if os.environ.get("DSDISTILL_NATIVE") != "0" else []
    else:
        failures += [] if len(found["registered"]) >= 3 else [f"only {found['registered']} are registered"]
        failures += weak_symbols(found["library"])
    if not dry and "dsdistill::hidden_rows" not in found["registered"]:
        failures.append(
            "the library has no CUDA kernel: nvcc was not found, or its source did not compile (log.txt)"
        )
    if not dry and not {"triton", "cuda"} <= set(found["backends"]):
        failures.append(f"only {found['backends']} can run here")
    save(out, found | {"failures": failures})
    print(*failures, sep="\n")
    return int(bool(failures))


def weak_symbols(library: str) -> list[str]:
    """Return a complaint about weak symbols, which may stay null unnoticed; empty if there are none."""
    if not shutil.which("nm"):
        return []
    command = ["nm", "-D", "--undefined-only", library]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    weak = [words[-1] for words in map(str.split, lines) if words[0] in "wv"]
    ours = [name for name in weak if not name.startswith(("_ITM_", "__cxa_", "__gmon_start__"))]
    return [f"weak symbols, which stay null where they are not found: {ours}"] if ours else []


def variant_of(case: Case) -> str:
    """Return the name by which `auto` knows a case's variant."""
    options = case.options
    name = options.get("relation") or options.get("divergence", "forward_kl")
    if options.get("heads", "match") != "match":
        return f"{name} {options['heads']}"
    return f"{name} projected" if "projection" in case.tensors else name


def could_take(case: Case, backend: str, dtype: torch.dtype) -> bool:
    """Return whether `auto` may use a backend for a case: `chunked` always, GPU kernels if a record can allow it."""
    if backend not in RECORDED:
        return backend == "chunked"
    kind = str(dtype).removeprefix("torch.")
    return (case.operator, variant_of(case), kind) in recordable()


Task = tuple[int, str, torch.dtype, str]


def tasks(dry: bool) -> list[Task]:
    """Return (case, backend, dtype, check), parity first.

    Operators take turns, so that some tasks of each have run if the step is ended early.
    """
    backends = [name for name in checks.available_backends() if name in ("chunked", *RECORDED)]
    few: dict[str, list[Task]] = {}
    many: dict[str, list[Task]] = {}
    for index, case in enumerate(checks.all_cases()):
        for backend in backends:
            for dtype in checks.DTYPES[1:]:
                for name in checks.CHECKS:
                    if backend == "chunked" and name != "parity":
                        continue
                    if could_take(case, backend, dtype) and checks.runnable(case, backend, dtype, name):
                        group = few if name == "parity" else many
                        group.setdefault(f"{case.operator} {backend}", []).append(
                            (index, backend, dtype, name)
                        )
    if dry:  # one of each
        return [group[0] for group in few.values()]
    return [task for groups in (few, many) for task in in_turn(list(groups.values()))]


def in_turn(groups: list[list[Task]]) -> list[Task]:
    longest = max(map(len, groups), default=0)
    return [group[i] for i in range(longest) for group in groups if i < len(group)]


def verify(out: Path, dry: bool) -> int:
    """Check against float64 in parallel processes, since compiling kernels takes most of the time."""
    todo = tasks(dry)
    outcome: dict = {"checks": len(todo), "done": 0, "worst": 0.0, "by": {}, "failures": []}

    def note(task: Task, failure: str | None, ratio: float) -> None:
        case = checks.all_cases()[task[0]]
        by = f"{case.operator} {task[1]} {str(task[2]).removeprefix('torch.')} {task[3]}"
        outcome["by"][by] = outcome["by"].get(by, 0) + 1
        outcome["done"] += 1
        outcome["worst"] = max(outcome["worst"], ratio)
        outcome["failures"] += [failure] if failure else []
        if outcome["done"] % 20 == 0 or failure:
            save(out, outcome)

    workers = 1 if dry else min(12, os.cpu_count() or 1)
    if workers == 1:
        for task in todo:
            note(task, *check_one(task))
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            waiting = {pool.submit(check_one, task): task for task in todo}
            for future in as_completed(waiting):
                try:
                    note(waiting[future], *future.result())
                except Exception as error:  # a process that dies ends its pool
                    note(waiting[future], f"{waiting[future]}: {first_line(error)}", 0.0)
    save(out, outcome)
    print(*outcome["failures"], sep="\n")
    return int(bool(outcome["failures"]))


def check_one(task: Task) -> tuple[str | None, float]:
    """Return what is wrong, None if nothing is, and the worst error as a share of the allowed one."""
    index, backend, dtype, name = task
    case = checks.all_cases()[index]
    try:
        clock.synchronize(device())
    except Exception:  # an earlier kernel's failure makes the GPU unusable for this process
        return f"{name} {case} {backend} {dtype}: not run, the GPU had failed this process before", 0.0
    try:
        return None, checks.CHECKS[name](case, backend, dtype)
    except Exception as error:  # a mismatch, or an error of a compiler or driver
        return f"{name} {case} {backend} {dtype}: {first_line(error)}"[:400], 0.0


def tests(out: Path, dry: bool) -> int:
    """Run the tests that need a GPU."""
    files = [f"tests/ops/test_{name}.py" for name in (("records",) if dry else TESTS)]
    drop = ("DSDISTILL_RECORDS", "DSDISTILL_TUNE")  # a test reads the installed records
    environment = {key: value for key, value in os.environ.items() if key not in drop}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], done.stderr[-2000:])
    save(out, {"returncode": done.returncode, "summary": done.stdout.strip().splitlines()[-1:]})
    return done.returncode


STEPS = {"symbols": symbols, "verify": verify, "tests": tests}
