"""Run part "step" of launch/gpu_check.sh: time a whole step by level, list its largest kernels, train, run a sanitizer.

The models are causal language models in bfloat16 with random weights: a teacher with 24 layers of width 1024, and a
student with 6 layers of width 768. `auto` chooses by the records of the package, and by that of part "operators" if it
was written to the same OUT_DIR before.
"""

from __future__ import annotations

import functools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch

from dsdistill.bench import operators, step
from dsdistill.bench.check_report import save
from dsdistill.bench.step_arms import LEVELS, Decoders, make
from dsdistill.bench.works import device

ROOT = Path(__file__).parents[2]
TINY = Decoders(teacher=4, student=2, width=32, student_width=16, heads=2, vocabulary=64, tokens=32, step=64)
SHORT = {False: 512, True: 16}  # tokens; True: in a dry run
DTYPE = "bfloat16"
LARGEST = 10


def sizes_of(dry: bool) -> Decoders:
    return TINY if dry else Decoders()


def levels(out: Path, dry: bool) -> int:
    """Time each level's step, in turn, on short and long sequences; measure its peak above weights and gradients."""
    sizes, place = sizes_of(dry), torch.device(device())
    made = {arm: make(arm, sizes, sizes.student, DTYPE, place) for arm in LEVELS}
    rows: list[dict] = []
    for tokens in (SHORT[dry], sizes.tokens):
        batch = sizes.batch(tokens, place)
        calls, times, peaks = {}, {}, {}
        for arm, (_, loss) in made.items():
            call = functools.partial(step.one_step, loss, batch)
            row = {"arm": arm, "tokens": tokens, "short": tokens == SHORT[dry]}
            try:
                call()
                peaks[arm] = step.peak(call, place)
                calls[arm] = call
            except Exception as error:  # also from a compiler or driver; out of memory
                traceback.print_exc(file=sys.stdout)
                rows.append(row | {"error": operators.first_line(error)})
                save(out, rows)
        for turn in range(2 if dry else 10):
            for arm in list(calls)[:: -1 if turn % 2 else 1]:
                times.setdefault(arm, []).append(operators.seconds_of(calls[arm]))
        middle = {arm: statistics.median(values) for arm, values in times.items()}
        for arm, seconds in middle.items():
            row = {"arm": arm, "tokens": tokens, "short": tokens == SHORT[dry], "seconds": seconds}
            row |= {"vs_logits": seconds / middle[step.FLOOR] if step.FLOOR in middle else float("nan")}
            row |= {"memory_mib": peaks[arm], "tokens_per_second": batch.input_ids.numel() / seconds}
            taken = (
                made[arm][0].objective.backends if arm == LEVELS[-1] else {}
            )  # those of all calls of this process
            row["backends"] = ", ".join(f"{name} {' '.join(names)}" for name, names in sorted(taken.items()))
            rows.append(row)
        save(out, rows)
    return int(any("error" in row for row in rows))


def profile(out: Path, dry: bool) -> int:
    """Name the largest kernels of a step with all levels on; on a CPU, the largest operators."""
    from torch.profiler import ProfilerActivity, profile

    sizes, place = sizes_of(dry), torch.device(device())
    _, loss = make(LEVELS[-1], sizes, sizes.student, DTYPE, place)
    call = functools.partial(step.one_step, loss, sizes.batch(SHORT[dry], place))
    for _ in range(3):
        call()
    on_gpu = place.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        operators.seconds_of(call)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda event: getattr(event, key), reverse=True)
    rows = [
        {"name": event.key, "calls": event.count, "seconds": getattr(event, key) / 1e6}
        for event in events[:LARGEST]
    ]
    save(out, rows)
    return int(not rows or rows[0]["seconds"] <= 0)


def run(out: Path, dry: bool) -> int:
    """Train for some steps as a user would: DeepSpeed, its optimizer, a checkpoint."""
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher) if launcher.exists() else "deepspeed", "--num_gpus", "1"]
    command += ["--master_port", str(20000 + os.getpid() % 20000)]
    with tempfile.TemporaryDirectory() as folder:
        command += [str(ROOT / "dsdistill/bench/job.py"), folder, str(out), *(["--tiny"] if dry else [])]
        return subprocess.run(command, check=False).returncode


SANITIZED = """
import sys, torch
from dsdistill.bench import verify
for case in verify.all_cases():
    for backend in ("triton", "cuda"):
        if str(case) in sys.argv[1:] and backend in verify.available_backends():
            if verify.runnable(case, backend, torch.bfloat16):
                print(case, backend, round(verify.check_parity(case, backend, torch.bfloat16), 2), flush=True)
"""
CASES = [
    "attention-kl-packed",
    "pairwise-distance-odd-ragged",
    "hidden-mse-bias",
    "vocabulary-forward_kl-warm",
]


def sanitizer(out: Path, dry: bool) -> int:
    """Search for reads and writes outside tensors. PyTorch's cache is off, so that each tensor has its own memory."""
    tool = shutil.which("compute-sanitizer")
    if not tool and not dry:
        save(out, {"compute_sanitizer": "not found"})
        return 0
    command = [tool, "--error-exitcode", "9"] if tool and not dry else []
    command += [sys.executable, "-c", SANITIZED, *CASES]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found: dict = {"compute_sanitizer": tool or "not found", "said": []}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None  # asked for
        for line in process.stdout:
            print(line, end="")
            found["said"] = [*found["said"], line.rstrip()][-40:]
            save(out, found)
    save(out, found | {"returncode": process.returncode})
    return process.returncode


STEPS = {"levels": levels, "profile": profile, "sanitizer": sanitizer, "run": run}
