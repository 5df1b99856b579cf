"""launch/gpu_check.sh, as far as that goes without a GPU: its parts in tiny form, and what it does when one fails."""

import importlib.metadata
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dsdistill.bench import gpu_check, wheels

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "gpu_check.sh"


def run(*arguments: object, **variables: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["DSDISTILL_NATIVE"] = "0"  # the build's own time is spent by the installation
    environment |= {key: str(value) for key, value in variables.items()}
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.parametrize("part", ["bench", "job"])
def test_a_part_in_tiny_form(part, tmp_path):
    done = run(tmp_path, "--dry-run", "--only", part)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()[-3000:]
    names = sorted(path.suffix or path.name for path in tmp_path.iterdir())
    assert names == [".json", ".md", ".txt", "parts"]
    assert "== build: passed" in done.stdout and (tmp_path / "parts" / f"{part}.json").exists()
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert list(found["parts"]) == [part] and found["parts"][part]["status"] == "passed"
    rows = found["parts"][part]["found"]
    if part == "job":
        assert [row["terms"].count("+") for row in rows] == [0, 1, 2, 3]
        assert all(row["tokens_per_second"] > 0 and row["steps"] == 2 for row in rows)
        assert "datasets" not in (tmp_path / "log.txt").read_text()
    else:
        assert {row["backend"] for one in rows for row in one["rows"]} == {"eager", "chunked"}
    assert found["parts"][part]["status"] in next(tmp_path.glob("*.md")).read_text()


def test_a_failed_part_is_reported_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    codes = {"verify": "raise SystemExit(3)", "bench": "import time; time.sleep(60)", "job": "pass"}
    monkeypatch.setattr(gpu_check, "PARTS", dict.fromkeys(codes))
    monkeypatch.setitem(gpu_check.BUDGETS, "bench", 1)
    original = gpu_check.run_part
    monkeypatch.setattr(
        gpu_check,
        "run_part",
        lambda name, work, log, dry: original(name, work, log, False, [sys.executable, "-c", codes[name]]),
    )
    monkeypatch.setattr(sys, "argv", ["gpu_check", str(tmp_path), "--dry-run"])
    assert gpu_check.main() == 1
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    statuses = [part["status"] for part in found["parts"].values()]
    assert statuses == ["failed with exit code 3", "stopped after its 1 s", "passed"]
    assert "stopped after its 1 s" in capsys.readouterr().out


def test_budgets_leave_nine_minutes():
    assert set(gpu_check.BUDGETS) == set(gpu_check.PARTS)
    assert gpu_check.BUILD + sum(gpu_check.BUDGETS.values()) < 540
    assert f"\nlimit={gpu_check.BUILD}\n" in SCRIPT.read_text()


def test_rows_that_auto_reads():
    rows = [{"backend": name, "both": seconds} for name, seconds in (("chunked", 3.0), ("triton", 1.5))]
    found = {"operator": "attention", "variant": "kl", "dtype": "bfloat16", "options": {"tokens": 512}}
    found |= {"rows": rows, "failures": {}}
    (row,) = gpu_check.record_rows([found])
    assert row["vs_chunked"] == 2.0 and row["checked"] and row["operator"] == "attention_alignment"
    (row,) = gpu_check.record_rows([found | {"operator": "vocabulary"}])
    assert row["operator"] == "vocabulary_losses"
    assert gpu_check.record_rows([found | {"operator": "step"}]) == []
    assert gpu_check.record_rows(None) == []


def test_misuse_is_one_line(tmp_path):
    for arguments, variables, said in (
        ((), {}, "expected OUT_DIR"),
        (("--wheels",), {}, "got 0 values, expected one folder"),
        (("--wheels", tmp_path), {"PYTHON_VERSION": "12"}, "got '12', expected a version such as 3.12"),
        (("--wheels", tmp_path), {"HAVE": tmp_path}, "expected a file made by `pip freeze`"),
    ):
        done = run(*arguments, **variables)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr


def test_a_row_that_raises_is_its_own_result(tmp_path, monkeypatch):
    rows = [
        ("hidden", {"tokens": 8, "width": 8, "teacher_width": 0}, "float32", "mse projected"),
        *gpu_check.TINY_BENCHES,
    ]
    monkeypatch.setattr(gpu_check, "TINY_BENCHES", rows)
    with pytest.raises(SystemExit, match="True"):
        gpu_check.bench(tmp_path / "bench.json", True)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert ["error" in row for row in found] == [True, False, False]
    assert gpu_check.record_rows(found) == []
    part = {"status": "failed", "seconds": 1, "found": found}
    record = gpu_check.machine() | {"parts": {"bench": part}}
    assert "teacher_width: got 0" in gpu_check.markdown(record)


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
    done = run(tmp_path / "out", "--dry-run", "--only", "sanitizer", WHEELS=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if ".whl" in line]
    assert said == [
        "== dsdistill_is_broken-1.0-py3-none-any.whl could not be installed (log.txt)",
        "== installed dsdistill_is_missing-1.0-py3-none-any.whl",
    ]


def test_the_wheels_that_are_needed():
    found = wheels.needed("3.12")
    assert {"deepspeed", "hjson", "pydantic-core", "transformers", "pytest"} <= set(found)
    assert not {"torch", "triton", "numpy", "sympy", "dsdistill"} & set(found)
    assert "hjson" not in wheels.needed("3.12", ["HJSON"])
    assert found["deepspeed"] == importlib.metadata.version("deepspeed")
