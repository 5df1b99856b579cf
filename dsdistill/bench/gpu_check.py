"""All that a GPU can tell, in under nine minutes: run by launch/gpu_check.sh, after it has built the package.

Parts run one after the other in processes of their own, the most telling first, each within its budget; one that
fails is reported and the rest goes on. Results: OUT_DIR/<gpu>-<date>.json (also the record that `auto` reads), .md,
two plots, log.txt, and parts/, where each part writes its results as they come.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from dsdistill import disk

# Seconds of each part. With BUILD they make less than nine minutes.
BUDGETS = {
    "verify": 90,
    "bench": 110,
    "lengths": 40,
    "job": 115,
    "tests": 40,
    "aot": 45,
    "sanitizer": 20,
}
BUILD = 75  # of launch/gpu_check.sh, before the parts
ROOT = Path(__file__).parents[2]

# (operator, options, dtype, the name that `auto` knows the variant by)
BENCHES = [
    ("attention", {"batch": 8, "heads": 16, "tokens": 4096, "divergence": "kl"}, "bfloat16", "kl"),
    ("attention", {"batch": 8, "heads": 16, "tokens": 4096, "divergence": "mse"}, "bfloat16", "mse"),
    ("attention", {"batch": 8, "heads": 16, "tokens": 512, "divergence": "kl"}, "bfloat16", "kl"),
    ("attention", {"batch": 8, "heads": 16, "tokens": 128, "divergence": "kl"}, "bfloat16", "kl"),
    ("hidden", {"tokens": 16384, "projected": False}, "bfloat16", "mse"),
    ("hidden", {"tokens": 16384}, "bfloat16", "mse projected"),
    ("hidden", {"tokens": 1024}, "bfloat16", "mse projected"),
    ("pairwise", {"batch": 8, "tokens": 512}, "bfloat16", "cosine"),
    ("pairwise", {"batch": 8, "tokens": 512, "relation": "distance"}, "bfloat16", "distance"),
    ("soft-label", {"tokens": 4096, "divergence": "jsd"}, "bfloat16", "jsd"),
    ("vocabulary", {"tokens": 4096, "vocabulary": 151936, "width": 2048}, "bfloat16", "forward_kl"),
    ("attention", {"batch": 8, "heads": 16, "tokens": 4096, "causal": True}, "bfloat16", "kl"),
    ("attention", {"batch": 8, "heads": 16, "tokens": 1024, "divergence": "kl"}, "float32", "kl"),
    (
        "attention",
        {"batch": 8, "heads": 16, "tokens": 4096, "divergence": "score_mse"},
        "bfloat16",
        "score_mse",
    ),
]
TINY_BENCHES = [
    ("attention", {"batch": 1, "heads": 1, "tokens": 16, "width": 8}, "float32", "kl"),
    ("hidden", {"tokens": 8, "width": 8, "teacher_width": 8}, "float32", "mse projected"),
]
LENGTHS = [512 << i for i in range(9)]  # to 131072
PUBLIC = {
    "attention": "attention_alignment",
    "pairwise": "pairwise_alignment",
    "hidden": "hidden_alignment",
    "soft-label": "soft_label_alignment",
    "vocabulary": "vocabulary_losses",
}


def verify(out: Path, dry: bool) -> None:
    """Every case and dtype in processes side by side, since most of the time goes into compiling kernels."""
    from dsdistill.bench import verify as checks

    backends = [b for b in checks.available_backends() if b in ("triton", "cuda", "chunked")]
    names = ["parity", "padding"] if dry else list(checks.CHECKS)
    tasks = [
        (index, backend, dtype, name)
        for name in names
        for index, case in enumerate(checks.all_cases())
        for backend in (["chunked"] if dry else backends)
        for dtype in ([torch.float32] if dry else checks.DTYPES)
        if checks.runnable(case, backend, dtype, name) and not (dry and index > 1)
    ]
    outcome = {"checks": len(tasks), "done": 0, "worst": 0.0, "failures": []}
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        for failure, ratio in pool.map(check_one, tasks):
            outcome["done"] += 1
            outcome["worst"] = max(outcome["worst"], ratio)
            outcome["failures"] += [failure] if failure else []
            if outcome["done"] % 20 == 0 or failure:
                save(out, outcome)
    save(out, outcome)
    print(*outcome["failures"], sep="\n")
    sys.exit(bool(outcome["failures"]))


def check_one(task: tuple) -> tuple[str | None, float]:
    from dsdistill.bench import verify as checks

    index, backend, dtype, name = task
    case = checks.all_cases()[index]
    try:
        return None, checks.CHECKS[name](case, backend, dtype)
    except Exception as error:  # a compiler's or a driver's, as much as a mismatch
        return f"{name} {case} {backend} {dtype}: {type(error).__name__}: {error}"[:400], 0.0


def bench(out: Path, dry: bool) -> None:
    """Rows are written as they come: what the budget cuts off is lost alone, and so is a row that raises."""
    from dsdistill.bench.operators import first_line, run_bench

    rows = []
    for operator, options, dtype, variant in TINY_BENCHES if dry else BENCHES:
        path = out.with_suffix(".one")
        backends = ["eager", "chunked"] if dry else None
        row = {"operator": operator, "options": options, "dtype": dtype, "variant": variant}
        try:
            run_bench(
                operator,
                options=options,
                dtype=dtype,
                backends=backends,
                repeats=3 if dry else 10,
                seconds=3,
                memory=not dry,
                json_path=path,
            )
            row |= json.loads(path.read_text())
        except Exception as error:  # of a compiler or a driver, too
            traceback.print_exc(file=sys.stdout)
            row["error"] = first_line(error)
        rows.append(row)
        save(out, rows)
    sys.exit(any("error" in row for row in rows))


def lengths(out: Path, dry: bool) -> None:
    """Attention kl in bfloat16, one sequence: milliseconds and extra MiB of each length."""
    from dsdistill.bench import operators
    from dsdistill.bench.works import attention_work

    rows = []
    backends = ("chunked",) if dry else ("triton", "eager", "chunked")
    for tokens in LENGTHS[:1] if dry else LENGTHS:
        options = {"batch": 1, "heads": 1 if dry else 8, "tokens": 32 if dry else tokens}
        for name in backends:
            if name != "triton" and tokens > 16384:
                continue
            row = {"tokens": options["tokens"], "backend": name}
            try:
                work = attention_work(**options, dtype=torch.bfloat16)
                calls, stopped = operators.warm_up(work, [name])
                row["stopped"] = stopped.get(name)
                if calls:
                    times = operators.measure(work, calls, 3, 5.0)[name]
                    memory = None if dry else operators.peak_memory("attention", options, "bfloat16", name)
                    row |= {"forward": times["forward"], "both": times["both"], "memory_mib": memory}
            except Exception as error:
                row["stopped"] = operators.first_line(error)
            rows.append(row)
            save(out, rows)


def job(out: Path, dry: bool) -> None:
    port = 20000 + os.getpid() % 20000
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [
        str(launcher) if launcher.exists() else "deepspeed",
        "--num_gpus",
        "1",
        "--master_port",
        str(port),
    ]
    with tempfile.TemporaryDirectory() as folder:
        command += [str(ROOT / "dsdistill/bench/job.py"), folder, str(out), *(["--tiny"] if dry else [])]
        sys.exit(subprocess.run(command, check=False).returncode)


def tests(out: Path, dry: bool) -> None:
    files = (
        ["tests/ops/test_records.py"]
        if dry
        else ["tests/ops/test_gpu_kernels.py", "tests/ops/test_records.py"]
    )
    os.environ.pop("DSDISTILL_RECORDS", None)  # a test compares what is installed
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], done.stderr[-2000:])
    save(out, {"returncode": done.returncode, "summary": done.stdout.strip().splitlines()[-1:]})
    sys.exit(done.returncode)


def aot(out: Path, dry: bool) -> None:
    from dsdistill.bench.aot import run_aot

    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(run_aot(out, match="hidden mse D768" if dry else ""))


SANITIZED = """
from dsdistill.bench import verify
for name in ("kl-packed", "distance-odd-ragged", "mse-bias"):
    for backend in ("triton", "cuda"):
        for case in verify.all_cases():
            if case.name == name and backend in verify.available_backends():
                if verify.runnable(case, backend, verify.DTYPES[1]):
                    verify.check_parity(case, backend, verify.DTYPES[1])
"""


def sanitizer(out: Path, dry: bool) -> None:
    tool = shutil.which("compute-sanitizer")
    if not tool or dry:
        save(out, {"compute_sanitizer": "not found" if not tool else "not run"})
        return
    command = [tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout[-4000:], done.stderr[-2000:])
    save(out, {"returncode": done.returncode, "last": done.stdout.strip().splitlines()[-1:]})
    sys.exit(done.returncode)


PARTS = {"verify": verify, "bench": bench, "lengths": lengths, "job": job, "tests": tests, "aot": aot}
PARTS["sanitizer"] = sanitizer


def save(path: Path, content: object) -> None:
    """Write at once: a part may be ended at any time."""
    with disk.writing(path) as file:
        json.dump(content, file, indent=1)


def run_part(name: str, work: Path, log, dry: bool, command: list[str] | None = None) -> dict:
    """One part in a process group of its own, ended when its budget is spent."""
    out = work / f"{name}.json"
    command = command or [sys.executable, "-m", "dsdistill.bench.gpu_check", str(out), "--part", name]
    start = time.monotonic()
    environment = os.environ | {"DSDISTILL_RECORDS": str(work / "records")}
    process = subprocess.Popen(
        command + (["--dry-run"] if dry else []),
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        cwd=ROOT,
    )
    try:
        code = process.wait(BUDGETS[name] * (10 if dry else 1))
        status = "passed" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        status = f"stopped after its {BUDGETS[name]} s"
    seconds = round(time.monotonic() - start, 1)
    result = json.loads(out.read_text()) if out.exists() else None
    print(f"== {name}: {status} ({seconds} s)", flush=True)
    return {"status": status, "seconds": seconds, "found": result}


def record_rows(benches: list[dict] | None) -> list[dict]:
    """What `auto` reads: each backend of ours against `chunked`."""
    rows = []
    for measured in benches or ():
        if "error" in measured:
            continue
        times = {row["backend"]: row["both"] for row in measured["rows"]}
        for backend in ("triton", "cuda"):
            if backend in times and "chunked" in times and measured["operator"] in PUBLIC:
                rows.append(
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
    return rows


def machine() -> dict:
    gpu = torch.cuda.is_available()
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    return {
        "gpu": torch.cuda.get_device_name() if gpu else "no GPU",
        "capability": list(torch.cuda.get_device_capability()) if gpu else [0, 0],
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": version,
        "python": sys.version.split()[0],
    }


def markdown(record: dict) -> str:
    lines = [f"# {record['gpu']}, {record['date']}", ""]
    lines += [f"torch {record['torch']}, Triton {record['triton']}, Python {record['python']}", ""]
    lines += ["| part | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {part['status']} | {part['seconds']} |" for name, part in record["parts"].items()]
    checks = record["parts"].get("verify", {}).get("found")
    if checks:
        lines += [
            "",
            f"verify: {checks['done']} of {checks['checks']} checks, {len(checks['failures'])} failed,",
        ]
        lines += [f"worst error {checks['worst']:.2f} of what is allowed", ""]
        lines += [f"- {failure}" for failure in checks["failures"][:20]]
    results = {name: part["found"] for name, part in record["parts"].items() if part["found"]}
    if "bench" in results:
        lines += [
            "",
            "| work | dtype | backend | forward ms | fwd+bwd ms | vs eager | vs compile | roofline | MiB |",
        ]
        lines.append("|---" * 9 + "|")
        for one in results["bench"]:
            if "error" in one:
                sizes = " ".join(f"{name}={value}" for name, value in one["options"].items())
                lines.append(f"| {one['operator']} {sizes} | {one['dtype']} | {one['error']} |")
                continue
            for row in one["rows"]:
                ratios = ["–" if row.get(k) is None else f"{row[k]:.2f}×" for k in ("vs_eager", "vs_compile")]
                memory = "–" if row["memory_mib"] is None else f"{row['memory_mib']:.1f}"
                cells = [f"{one['operator']} {one['work']}", one["dtype"], row["backend"]]
                cells += [f"{row['forward'] * 1e3:.3f}", f"{row['both'] * 1e3:.3f}", *ratios]
                lines.append("| " + " | ".join([*cells, f"{row['roofline']:.0%}", memory]) + " |")
    if "lengths" in results:
        lines += ["", "| tokens | backend | forward ms | fwd+bwd ms | MiB |", "|---|---|---|---|---|"]
        for row in results["lengths"]:
            if row["stopped"]:
                lines.append(f"| {row['tokens']} | {row['backend']} | {row['stopped']} | | |")
            else:
                memory = "–" if row["memory_mib"] is None else f"{row['memory_mib']:.1f}"
                times = f"{row['forward'] * 1e3:.3f} | {row['both'] * 1e3:.3f}"
                lines.append(f"| {row['tokens']} | {row['backend']} | {times} | {memory} |")
    if "job" in results:
        lines += ["", "| terms | sequence | tokens/s | peak GB |", "|---|---|---|---|"]
        for row in results["job"]:
            figures = f"{row['tokens_per_second']:,.0f} | {row['peak_gb']:.2f}"
            lines.append(f"| {row['terms']} | {row['tokens']} | {figures} |")
    return "\n".join(lines) + "\n"


def plots(record: dict, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in record["parts"].get("lengths", {}).get("found") or () if not row["stopped"]]
    if not rows:
        return
    for key, label in (("both", "forward + backward, s"), ("memory_mib", "extra memory, MiB")):
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        for backend in dict.fromkeys(row["backend"] for row in rows):
            points = [(r["tokens"], r[key]) for r in rows if r["backend"] == backend and r[key]]
            if points:
                axes.loglog(*zip(*points, strict=True), "o-", label=backend)
        axes.set(xlabel="tokens", ylabel=label, title=f"attention kl, {record['gpu']}")
        if axes.lines:
            axes.legend()
        figure.savefig(out / f"lengths-{'time' if key == 'both' else 'memory'}.png", dpi=120)
        pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(prog="launch/gpu_check.sh")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--only", choices=PARTS, help="run this part alone")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU: the script's own logic")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        PARTS[given.part](given.out, given.dry_run)
        return 0
    if not given.dry_run and not torch.cuda.is_available():
        print(
            "dsdistill: gpu_check: got no GPU, expected one that torch sees (or --dry-run)", file=sys.stderr
        )
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    record = machine() | {"dry_run": given.dry_run, "rows": [], "parts": {}}
    name = re.sub(r"[^a-z0-9]+", "-", record["gpu"].lower()) + "-" + record["date"]
    work = given.out.absolute() / "parts"
    disk.remove(str(work), ["*"])  # what an earlier run left
    (work / "records").mkdir(parents=True)
    with (given.out / "log.txt").open("a") as log:
        for part in [given.only] if given.only else PARTS:
            record["parts"][part] = run_part(part, work, log, given.dry_run)
            if part == "bench":
                record["rows"] = record_rows(record["parts"][part]["found"])
                save(work / "records" / "this.json", record | {"parts": {}})
            save(given.out / f"{name}.json", record)
            (given.out / f"{name}.md").write_text(markdown(record), encoding="utf-8")
    try:
        plots(record, given.out)
    except ImportError as error:
        print(f"== no plots: {error}")
    print((given.out / f"{name}.md").read_text(encoding="utf-8"))
    return int(any(part["status"] != "passed" for part in record["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
