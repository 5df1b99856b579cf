"""launch/gpu_check.sh is tested as far as possible without a GPU: its parts in tiny form, and failures."""

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dsdistill.bench import (
    check_correctness,
    check_operators,
    check_report,
    check_step,
    gpu_check,
    verify,
    wheels,
)
from dsdistill.bench.check_operators import Bench
from dsdistill.ops import available_backends

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "gpu_check.sh"
triton = pytest.mark.skipif("triton" not in available_backends(), reason="Triton cannot run here")


def run(*arguments: object, **variables: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["DSDISTILL_NATIVE"] = "0"  # building takes time, and the installation tests it already
    environment |= {key: str(value) for key, value in variables.items()}
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_part_in_tiny_form(tmp_path):
    done = run(tmp_path, "--dry-run", "--part", "correctness")
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()[-3000:]
    assert "== build: passed" in done.stdout
    record = read(next(tmp_path.glob("*.json")))
    assert {name: step["status"] for name, step in record["steps"].items()} == dict.fromkeys(
        ("symbols", "verify", "tests"), "passed"
    )
    checks = record["steps"]["verify"]["found"]
    assert checks["done"] == checks["checks"] >= 6 and 0 < checks["worst"] <= 1
    said = done.stdout.split("What to change first:")[1]
    assert "unknown: attention kl B8 H16 D64 N4096 bf16" in said and "not measured (--part operators)" in said
    assert said.strip().splitlines()[0] in next(tmp_path.glob("*.md")).read_text()


@triton
def test_operators_in_tiny_form(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", torch.compile)  # a dry run replaces it
    monkeypatch.setattr(
        check_operators.operators, "checked", lambda *given: None
    )  # tests/ops has these checks
    monkeypatch.setattr(check_operators.tuning, "REPEATS", 1)
    assert check_operators.tiles(tmp_path / "tiles.json", True) == 0
    assert (
        tuple(row["kernel"] for row in read(tmp_path / "tiles.json"))
        == check_operators.PLAN_KERNELS["merged"]
    )
    monkeypatch.setattr(check_operators, "KERNELS", [check_operators.KERNELS[i] for i in (1, 9)])
    assert check_operators.kernels(tmp_path / "kernels.json", True) == 0
    rows = read(tmp_path / "kernels.json")
    # The sweeps' kernels are those whose tiles are compiled ahead, by the names that they are launched under.
    assert [tuple(row["kernels"]) for row in rows] == [check_operators.PLAN_KERNELS["sweeps"], ("rows",)]
    for row in rows:  # times depend on the machine; the arithmetic has a test of its own
        assert all(kernel["seconds"] > 0 for kernel in row["kernels"].values())
        assert row["seconds"] > 0 and row["host_seconds"] > 0
    few = [check_operators.ATTENTION[3], check_operators.OTHERS[0], check_operators.VOCABULARY[0]]
    few.append(Bench("hidden", "mse projected", {"batch": 2}))
    check_operators.measure_benches(tmp_path / "benches.json", few, True)
    rows = read(tmp_path / "benches.json")
    attention, hidden, vocabulary, broken = rows
    measured = {row["backend"] for row in attention["rows"]}
    assert measured == {"eager", "compile", "chunked", "triton"}
    assert {"apart", "chunked"} <= {row["backend"] for row in vocabulary["rows"]} and hidden["rows"]
    assert broken["operator"] == "hidden" and "got 'batch'" in broken["error"]
    recorded = check_operators.record_rows(rows)
    assert [row["operator"] for row in recorded] == [
        "attention_alignment",
        "hidden_alignment",
        "vocabulary_losses",
    ]


def test_kernel_seconds_are_those_of_one_call(monkeypatch):
    """Laps by hand: one call launches `rows` twice, for a quarter and half a second, and `columns` once."""

    @contextlib.contextmanager
    def laps(device):
        yield lambda: [("rows", (64, 32), 0.25), ("columns", (32, 64), 0.125), ("rows", (64, 32), 0.5)]

    monkeypatch.setattr(check_operators.clock, "kernel_laps", laps)
    monkeypatch.setattr(check_operators.clock, "host_seconds_of", lambda call, device: 0.0625)
    monkeypatch.setattr(check_operators.operators, "seconds_of", lambda call: 1.0)
    monkeypatch.setattr(check_operators.operators, "step", lambda work, contender: None)
    monkeypatch.setattr(check_operators, "contender", lambda work, name: None)
    assert check_operators.measure_kernels(SimpleNamespace(label="a call"), "triton", 2) == {
        "work": "a call",
        "seconds": 1.0,
        "host_seconds": 0.0625,
        "kernels": {
            "rows": {"tile": "64x32", "launches": 2, "seconds": 0.75},
            "columns": {"tile": "32x64", "launches": 1, "seconds": 0.125},
        },
    }


def test_every_bench_can_be_made():
    """The benches are small; a wrong name must show here and not on a GPU."""
    for benches in check_operators.BENCHES.values():
        small = check_operators.in_small(benches)
        assert 3 <= len(small) <= len(benches)
        for bench in small:
            loss = check_operators.WORKS[bench.operator](**bench.options, dtype=torch.bfloat16).loss(
                "reference"
            )
            assert torch.isfinite(loss)
            assert set(bench.backends) <= set(check_operators.operators.CONTENDERS)
        for bench in benches:
            assert "triton" in bench.backends
            assert "chunked" in bench.backends or bench.options["tokens"] > 8192  # their rows make no record
            known = bench.options.get("relation") or bench.options.get("divergence")
            assert known is None or known in bench.variant
    judged = {
        goal for benches in check_operators.BENCHES.values() for bench in benches for goal in bench.goals
    }
    assert judged == {"floor", "compile", "short", "copy", "liger speed", "liger memory"}


def test_a_step_in_tiny_form(tmp_path, monkeypatch):
    assert check_step.levels(tmp_path / "levels.json", True) == 0
    rows = read(tmp_path / "levels.json")
    assert [(row["arm"], row["tokens"]) for row in rows] == [
        (arm, tokens) for tokens in (16, 32) for arm in check_step.LEVELS
    ]
    assert rows[0]["vs_logits"] == 1 and all(row["seconds"] > 0 for row in rows)
    assert check_step.profile(tmp_path / "profile.json", True) == 0
    rows = read(tmp_path / "profile.json")
    assert len(rows) == 10 and rows[0]["seconds"] >= rows[-1]["seconds"]
    monkeypatch.setattr(check_step, "CASES", ["hidden-mse-bias"])
    assert check_step.sanitizer(tmp_path / "sanitizer.json", True) == 0
    if "triton" in available_backends():
        assert read(tmp_path / "sanitizer.json")["said"][-1].startswith("hidden-mse-bias triton")


def test_the_sanitizer_has_cases():
    assert set(check_step.CASES) <= set(map(str, verify.all_cases()))


def test_a_run_in_tiny_form(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert check_step.run(tmp_path / "run.json", True) == 0
    (row,) = read(tmp_path / "run.json")
    assert row["tokens_per_second"] > 0 and row["steps"] == 2 and row["terms"].count("+") == 3


def test_a_failed_step_is_reported_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    codes = {
        "symbols": "raise SystemExit(3)",
        "verify": "import time; time.sleep(60)",
        "tests": "import json, sys; json.dump([1], open(sys.argv[1], 'w'))",
    }
    monkeypatch.setitem(gpu_check.BUDGETS["correctness"], "verify", 1)
    original = gpu_check.run_step
    monkeypatch.setattr(
        gpu_check,
        "run_step",
        lambda part, name, work, log, dry: original(
            part, name, work, log, False, [sys.executable, "-c", codes[name], str(work / f"{name}.json")]
        ),
    )
    monkeypatch.setattr(sys, "argv", ["gpu_check", str(tmp_path), "--part", "correctness", "--dry-run"])
    assert gpu_check.main() == 1
    record = read(next(tmp_path.glob("*.json")))
    statuses = [step["status"] for step in record["steps"].values()]
    assert statuses == ["failed with exit code 3", "stopped after its 1 s", "passed"]
    assert record["steps"]["tests"]["found"] == [1]
    said = capsys.readouterr().out
    assert "1. broken: symbols: failed with exit code 3" in said and "2. broken: verify: stopped" in said


def test_budgets_leave_nine_minutes_for_each_part():
    parts = {"correctness": check_correctness, "operators": check_operators, "step": check_step}
    for part, module in parts.items():
        assert gpu_check.BUDGETS[part].keys() == module.STEPS.keys()
        assert gpu_check.BUILD + sum(gpu_check.BUDGETS[part].values()) < 540
    assert f"\nlimit={gpu_check.BUILD}\n" in SCRIPT.read_text()


def test_only_what_a_record_can_name_is_verified(monkeypatch):
    """Every backend is available, as on a GPU."""
    monkeypatch.setattr(verify, "interpreting", lambda: False)
    monkeypatch.setattr(verify, "available_backends", lambda: ["reference", "chunked", "triton", "cuda"])
    tasks, cases = check_correctness.tasks(False), verify.all_cases()
    assert len(tasks) == len(set(tasks))
    kernels = [task for task in tasks if task[1] != "chunked"]
    assert {dtype for _, _, dtype, _ in kernels} == {torch.bfloat16}
    assert {(cases[i].operator, backend) for i, backend, _, _ in kernels} == {
        *(
            (operator, "triton")
            for operator in ("attention", "pairwise", "hidden", "soft-label", "vocabulary")
        ),
        ("hidden", "cuda"),
    }
    assert not any("mean-heads" in cases[i].name for i, *_ in kernels)
    parity = [name == "parity" for *_, name in tasks]
    assert all(parity[: sum(parity)]) and not all(parity)


def bench(goals: list[str], times: dict[str, float], memory: float | None = None, **options) -> dict:
    """Return a row as the operators' steps write it. times: seconds by backend."""
    rows = [
        {"backend": name, "both": both, "forward": both / 3, "memory_mib": memory, "roofline": 0.5}
        | {
            f"vs_{rival}": times[rival] / both if rival in times else None
            for rival in ("eager", "compile", "liger")
        }
        for name, both in times.items()
    ]
    sizes = {"batch": 8, "heads": 16, "tokens": 4096} | options
    return {
        "operator": "attention",
        "variant": "kl",
        "dtype": "bfloat16",
        "options": sizes,
        "goals": goals,
        "work": f"N{sizes['tokens']}",
        "flops": 1e12,
        "measured_flops": 5e14,
        "rows": rows,
        "failures": {},
        "stopped": {},
    }


def record_of(**steps) -> dict:
    found = {name: {"status": "passed", "seconds": 1.0, "found": rows} for name, rows in steps.items()}
    machine = {
        "gpu": "NVIDIA H100 80GB HBM3",
        "date": "2026-01-01",
        "torch": "2",
        "triton": "3",
        "python": "3",
    }
    return machine | {"dry_run": False, "steps": found}


def test_goals_are_judged_and_the_farthest_comes_first():
    attention = [
        bench(["floor", "compile"], {"triton": 6e-3, "compile": 18e-3, "chunked": 9e-3}),
        bench(["short"], {"triton": 1e-3, "eager": 2e-3}, tokens=128),
    ]
    vocabulary = [bench(["liger speed", "liger memory"], {"liger": 4e-3, "triton": 3e-3}, memory=100.0)]
    kernel = {
        "operator": "attention",
        "backend": "triton-merged",
        "options": attention[0]["options"],
        "work": "N4096",
    }
    kernel |= {"seconds": 6e-3, "host_seconds": 1e-4}
    kernel["kernels"] = {"columns": {"tile": "64x128x8x2", "launches": 1, "seconds": 4e-3}}
    levels = [
        {
            "arm": arm,
            "tokens": 512,
            "short": True,
            "seconds": seconds,
            "vs_logits": 1,
            "memory_mib": 1,
            "backends": "",
        }
        for arm, seconds in (("logits", 1.0), ("hidden", 1.05), ("attention", 1.1), ("pairwise", 1.2))
    ]
    record = record_of(attention=attention, vocabulary=vocabulary, kernels=[kernel], levels=levels)
    lines = check_report.what_to_change(record)
    kinds = [line.split(":")[0] for line in lines]
    assert kinds == ["missed"] * 3 + ["unknown"] + ["met"] * 2
    assert "torch.compile: got 3.00 ×" in lines[0] and "wanted at least 6 ×" in lines[0]
    # Two sweeps of 2 exponentials a pair, 16 a clock, on 132 multiprocessors of 1.83 GHz.
    floor = 2 * 2 * 8 * 16 * 4096**2 / 16 / 132 / 1.83e9
    assert (
        f"{6e-3 / floor:.2f} × the floor" in lines[1]
        and "columns takes most, 4.000 ms, tile 64x128x8x2" in lines[1]
    )
    assert "all levels" in lines[2] and "got +20%, wanted at most 15%" in lines[2]
    assert "hidden states" in lines[3]
    text = check_report.markdown(record)
    assert all(line in text for line in lines) and "| attention N4096 | triton | 2.000 | 6.000 |" in text
    record["gpu"] = "another"
    assert "measured rate" in "".join(check_report.what_to_change(record))


def test_liger_is_beaten_in_speed_and_memory_or_the_goal_is_missed():
    row = bench(["liger speed", "liger memory"], {"liger": 4e-3, "triton": 3e-3}, memory=100.0)
    row["rows"][1]["memory_mib"] = 130.0
    (line,) = [x for x in check_report.what_to_change(record_of(vocabulary=[row])) if "vocabulary" in x]
    assert line.startswith("missed") and "130 MiB of its 100" in line


def test_what_is_wrong_comes_before_everything():
    checks = {"checks": 2, "done": 2, "worst": 3.0, "failures": ["parity attention-kl triton: off"]}
    record = record_of(verify=checks, attention=[bench([], {"triton": 1.0}) | {"error": "OutOfMemoryError"}])
    assert check_report.what_to_change(record)[0] == "wrong: parity attention-kl triton: off"
    assert "OutOfMemoryError" in check_report.markdown(record)


def test_rows_that_auto_reads():
    found = bench([], {"chunked": 3.0, "triton": 1.5}, tokens=512)
    (row,) = check_operators.record_rows([found])
    assert row["vs_chunked"] == 2.0 and row["checked"] and row["operator"] == "attention_alignment"
    assert row["tokens"] == 512
    (row,) = check_operators.record_rows([found | {"operator": "vocabulary", "failures": {"triton": "off"}}])
    assert row["operator"] == "vocabulary_losses" and not row["checked"]
    assert check_operators.record_rows([found | {"operator": "step"}, found | {"error": "x"}]) == []
    assert check_operators.record_rows(None) == []


def test_misuse_is_one_line(tmp_path):
    for arguments, variables, said in (
        ((), {}, "expected OUT_DIR"),
        (("--wheels",), {}, "got 0 values, expected one folder"),
        (("--wheels", tmp_path), {"PYTHON_VERSION": "12"}, "got '12', expected a version such as 3.12"),
        (("--wheels", tmp_path), {"HAVE": tmp_path}, "expected a file made by `pip freeze`"),
    ):
        done = run(*arguments, **variables)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr


def wheel(folder: Path, name: str, version: str, needs: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        info = f"{name}-{version}.dist-info"
        archive.writestr(f"{name}.py", f"version = {version!r}\n")
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_wheels_of_what_is_missing_are_installed_without_dependencies(tmp_path):
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel(folder, "dsdistill_is_missing", "1.0", "Requires-Dist: nowhere-to-be-found\n")
    wheel(folder, "torch", "1.0", "")
    (folder / "dsdistill_is_broken-1.0-py3-none-any.whl").write_text("")
    python = tmp_path / "python"  # which leaves the steps out, after it has shown what they could import
    python.write_text(
        f"""#!/bin/sh
case "$*" in "-m dsdistill.bench.gpu_check "*)
  exec {sys.executable} -c 'import dsdistill_is_missing as m, sys; print(m.version, *sys.argv[2:])' "$@" ;;
esac
exec {sys.executable} "$@"
"""
    )
    python.chmod(0o755)
    done = run(tmp_path / "out", "--dry-run", "--part", "step", WHEELS=folder, PYTHON=python)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if ".whl" in line]
    assert said == [
        "== dsdistill_is_broken-1.0-py3-none-any.whl could not be installed (log.txt)",
        "== installed dsdistill_is_missing-1.0-py3-none-any.whl",
    ]
    assert (
        done.stdout.splitlines()[-1] == f"1.0 dsdistill.bench.gpu_check {tmp_path}/out --dry-run --part step"
    )


def test_the_wheels_that_are_needed():
    found = wheels.needed("3.12")
    assert {"deepspeed", "hjson", "pydantic-core", "transformers", "pytest"} <= set(found)
    assert not {"torch", "triton", "numpy", "sympy", "dsdistill"} & set(found)
    assert "hjson" not in wheels.needed("3.12", ["HJSON"])
    assert "liger-kernel" in found and "liger-kernel" not in wheels.needed("3.12", ["liger_kernel"])
    assert found["deepspeed"] == importlib.metadata.version("deepspeed")
