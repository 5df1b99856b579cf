"""The launch scripts are valid shell, and say in one line how they were misused."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from dsdistill.config import load

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "multinode.slurm", LAUNCH.parent / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_is_valid_shell(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["node.sh", "multinode.slurm"])
def test_a_missing_config_is_one_line(script):
    done = subprocess.run(["bash", str(LAUNCH / script)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "expected CONFIG.yaml" in done.stderr


def test_an_old_python_is_refused(tmp_path):
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit\nexit 1\n')
    old.chmod(0o755)
    environment = os.environ | {"PYTHON": str(old)}
    done = subprocess.run(
        ["bash", str(LAUNCH / "setup.sh")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "Python 3.9.2, expected Python 3.11" in done.stderr


def test_node_without_gpu_is_one_line(tmp_path):
    environment = os.environ | {"PATH": "/usr/bin:/bin"}
    if any((Path(folder) / "nvidia-smi").exists() for folder in ("/usr/bin", "/bin")):
        pytest.skip("this machine has nvidia-smi")
    done = subprocess.run(
        ["bash", str(LAUNCH / "node.sh"), "x.yaml"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "got no GPU" in done.stderr


def test_quickstart_counts_no_gpus_without_nvidia_smi():
    """Under pipefail a failing pipeline would end the script silently after its set-up."""
    line = next(
        line for line in (LAUNCH / "quickstart.sh").read_text().splitlines() if line.startswith("gpus=")
    )
    script = (
        f"set -euo pipefail; PATH=/nowhere:/usr/bin:/bin; nvidia-smi() {{ return 127; }}; {line}; echo $gpus"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "0")


def test_quickstart_compares_students_that_differ_in_what_they_learn_from_alone(monkeypatch):
    """Each `train` line of the script names configs that load, with one teacher, one cut and the same dev queries."""
    monkeypatch.chdir(LAUNCH.parent)
    lines = re.findall(r"^train (\S+) (.+) \"\$@\"$", (LAUNCH / "quickstart.sh").read_text(), re.MULTILINE)
    found = {name: load(files.split()) for name, files in lines}
    assert list(found) == ["no-teacher", "distilled-without-pairs", "distilled-with-pairs"]
    assert all(name == config.run.name for name, config in found.items())
    first = found["no-teacher"]
    for config in found.values():
        assert (config.teacher, config.student) == (first.teacher, first.student)
        assert (config.data.dev, config.data.max_dev, config.data.text) == (
            first.data.dev,
            first.data.max_dev,
            first.data.text,
        )
        assert config.train.batch_size * config.rows == first.train.batch_size * first.rows  # texts of a step
    assert list(first.terms.named()) == ["task"]
    assert "task" not in found["distilled-without-pairs"].terms.named()
    assert found["distilled-without-pairs"].data.train_columns == 1
    assert {"task", "embedding", "hidden", "attention", "pairwise"} <= set(
        found["distilled-with-pairs"].terms.named()
    )
