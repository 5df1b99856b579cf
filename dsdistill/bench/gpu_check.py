"""Run all checks that need a GPU; launch/gpu_check.sh starts this after it has built the package.

There are three parts, each of which takes less than nine minutes and is useful alone. Their steps run one after the
other in processes of their own, each within its budget; a step that fails is reported and the rest goes on. The results
are OUT_DIR/<gpu>-<date>.json (also the record that `auto` and the tiles of attention read), .md, plots, log.txt, and
parts/, where each step writes its results as they come. Parts with the same OUT_DIR make one record.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import torch

from dsdistill.bench.check_report import found, markdown, plots, save, what_to_change
from dsdistill.ops.records import this_machine

BUILD = 75  # seconds of launch/gpu_check.sh, before the steps of each part
# Seconds of each step. With BUILD the steps of a part take less than nine minutes.
BUDGETS = {
    "correctness": {"symbols": 20, "verify": 280, "tests": 150},
    "operators": {"tiles": 90, "kernels": 40, "attention": 175, "vocabulary": 110, "others": 45},
    "step": {"levels": 120, "profile": 60, "sanitizer": 100, "run": 170},
}
PARTS = {step: part for part, steps in BUDGETS.items() for step in steps}
ROOT = Path(__file__).parents[2]


def module_of(part: str) -> ModuleType:
    """Import the module that runs a part; it may load libraries that other parts do not need."""
    return importlib.import_module(f"dsdistill.bench.check_{part}")


def run_step(part: str, name: str, work: Path, log, dry: bool, command: list[str] | None = None) -> dict:
    """Run one step in a process group of its own, which is ended when its budget is used up."""
    out, budget = work / f"{name}.json", BUDGETS[part][name]
    out.unlink(missing_ok=True)  # what an earlier run left
    command = command or [sys.executable, "-m", "dsdistill.bench.gpu_check", str(out), "--step", name]
    start = time.monotonic()
    environment = os.environ | {"DSDISTILL_RECORDS": str(work / "records")}
    if dry:
        # Then Triton's kernels run in its interpreter, on the CPU.
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        command + (["--dry-run"] if dry else []),
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        cwd=ROOT,
    )
    try:
        code = process.wait(budget * (10 if dry else 1))
        status = "passed" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        status = f"stopped after its {budget} s"
    seconds = round(time.monotonic() - start, 1)
    result = json.loads(out.read_text(encoding="utf-8")) if out.exists() else None
    print(f"== {name}: {status} ({seconds} s)", flush=True)
    return {"status": status, "seconds": seconds, "found": result}


def run_parts(parts: list[str], out: Path, dry: bool) -> dict:
    """Run the steps of some parts, write the record after each, and return it."""
    out.mkdir(parents=True, exist_ok=True)
    record = this_machine() | {"python": sys.version.split()[0], "dry_run": dry}
    record |= {"rows": [], "tiles": [], "steps": {}}
    name = re.sub(r"[^a-z0-9]+", "-", record["gpu"].lower()) + "-" + record["date"]
    path = out / f"{name}.json"
    if path.exists():  # from another part on the same day
        earlier = json.loads(path.read_text(encoding="utf-8"))
        record |= {key: earlier[key] for key in ("rows", "tiles", "steps") if earlier["dry_run"] == dry}
    work = out.absolute() / "parts"
    (work / "records").mkdir(parents=True, exist_ok=True)
    with (out / "log.txt").open("a") as log:
        for part in parts:
            for step in BUDGETS[part]:
                record["steps"][step] = run_step(part, step, work, log, dry)
                if part == "operators":
                    check_operators = module_of(part)
                    benches = [row for kind in check_operators.BENCHES for row in found(record, kind) or ()]
                    record["rows"] = check_operators.record_rows(benches)
                    record["tiles"] = found(record, "tiles") or []
                    save(work / "records" / "this.json", record | {"steps": {}})
                save(path, record)
                path.with_suffix(".md").write_text(markdown(record), encoding="utf-8")
    try:
        plots(record, out)
    except ImportError as error:
        print(f"== no plots: {error}")
    said = " (a dry run: these figures mean nothing)" if dry else ""
    print(f"== {path.with_suffix('.md')} has it all{said}. What to change first:")
    for number, line in enumerate(what_to_change(record), 1):
        print(f"{number}. {line}")
    return record


def main() -> int:
    parser = argparse.ArgumentParser(prog="launch/gpu_check.sh")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--part", choices=BUDGETS, help="run this part alone; default: all three")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU: the script's own logic")
    parser.add_argument("--step", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        return module_of(PARTS[given.step]).STEPS[given.step](given.out, given.dry_run)
    if not given.dry_run and not torch.cuda.is_available():
        said = "got no GPU, expected one that torch sees (or --dry-run)"
        print(f"dsdistill: gpu_check: {said}", file=sys.stderr)
        return 2
    parts = [given.part] if given.part else list(BUDGETS)
    record = run_parts(parts, given.out, given.dry_run)
    ran = [record["steps"][step]["status"] for part in parts for step in BUDGETS[part]]
    return int(any(status != "passed" for status in ran))


if __name__ == "__main__":
    sys.exit(main())
