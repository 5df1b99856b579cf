"""Plans of the configs for teachers of 7, 32 and 70 billion values, without GPU, network or weights."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dsdistill.config import load
from dsdistill.planner.plan import RESERVE, Forecast, peak

ROOT = Path(__file__).parents[2]
GIB = 2**30
# The published counts of values: teacher and student.
SIZES = {
    "llama_70b_to_8b": (70.55e9, 8.03e9),
    "qwen_32b_to_3b": (32.76e9, 3.09e9),
    "qwen_7b_cut": (7.62e9, None),
}


@pytest.mark.parametrize("name", SIZES)
def test_it_fits_eight_gpus(name):
    config = load([str(ROOT / "configs" / f"{name}.yaml")])
    forecast = Forecast(config, 8, gpu=True)
    for size, published in zip((forecast.teacher, forecast.student), SIZES[name], strict=True):
        assert published is None or size.total == pytest.approx(published, rel=0.002)
    need = max(map(peak, forecast.stages(config.train.micro_batch_size).values()))
    print(f"{name}: {need / GIB:.2f} GiB a rank, {peak(forecast.node(8, need)) / GIB:.2f} GiB a node")
    assert 10 * GIB < need <= 80 * GIB - RESERVE
    assert peak(forecast.node(8, need)) < 256 * GIB


@pytest.mark.soak
def test_a_minute_and_two_gigabytes():
    """The command plans the largest in 60 s of processor time, since others may use the machine too."""
    config = str(ROOT / "configs" / "llama_70b_to_8b.yaml")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "dsdistill", "plan", config, "--world-size", "8"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "days for 3,000 steps" in done.stdout
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{seconds:.0f} s of processor time, {after.ru_maxrss / 2**20:.2f} GiB at most")
    assert seconds < 60 and after.ru_maxrss < 2 * 2**20
