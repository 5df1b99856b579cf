"""launch/gpu_check.sh, as far as that goes without a GPU: its parts in tiny form, and what it does when one fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsdistill.bench import gpu_check

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "gpu_check.sh"


def run(*arguments: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.parametrize("part", ["bench", "job"])
def test_a_part_in_tiny_form(part, tmp_path):
    done = run(tmp_path, "--dry-run", "--only", part)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()[-3000:]
    names = sorted(path.suffix for path in tmp_path.iterdir())
    assert names == [".json", ".md", ".txt"]
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
    assert f"timeout {gpu_check.BUILD} " in SCRIPT.read_text()


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
    done = run()
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "expected OUT_DIR" in done.stderr
