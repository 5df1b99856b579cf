"""Two nodes, emulated on loopback: two agents of torchrun, with one run folder and temporary folders of their own.

Local ranks are 0 on both. They train, one is killed, and `multinode.slurm` continues under a fake Slurm.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsdistill.engine import checkpoint
from tests.conftest import small_run
from tests.engine.launch import ROOT, free_port, launch, launch_command, wait_for_end
from tests.engine.test_resume import losses, write

SLURM = ROOT / "launch" / "multinode.slurm"
# Replacements for Slurm's commands: every node runs the command, with a temporary folder of its own.
SCONTROL = "#!/bin/sh\nprintf '127.0.0.1\\n127.0.0.1\\n'\n"
SRUN = """#!/bin/bash
for node in 0 1; do
  mkdir -p "$NODES/$node"
  SLURM_PROCID=$node SLURM_NODEID=$node TMPDIR="$NODES/$node" "$@" > "$NODES/$node.log" 2>&1 &
  agents+=($!)
done
code=0
for agent in "${agents[@]}"; do wait "$agent" || code=$?; done
exit $code
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def settings(models_dir, data_dir, folder) -> dict:
    """Return settings of 10 steps with dropout, with a checkpoint after every second step."""
    settings = small_run(models_dir, shutil.copytree(data_dir, folder / "data"), folder)
    settings["student"] |= {"config": {"hidden_dropout_prob": 0.2}, "zero_stage": 3}
    settings["run"] |= {"save_every": 2, "timeout": 0.2}
    return settings


def environment() -> dict[str, str]:
    _, found = launch_command()
    return {name: value for name, value in found.items() if not name.startswith(("SLURM", "TORCHELASTIC"))}


def start(config: Path, folder: Path) -> list[subprocess.Popen]:
    """Start an agent for each node."""
    port, agents = free_port(), []
    for node in range(2):
        own = folder / f"tmp-{node}"
        own.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "nodes"]
        command += ["--local_addr", "127.0.0.1", "-m", "dsdistill", "train", str(config)]
        with open(folder / f"node-{node}.log", "w") as log:
            agents.append(
                subprocess.Popen(
                    command,
                    env=environment() | {"TMPDIR": str(own)},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
    return agents


def test_two_nodes_train_lose_one_and_go_on(settings, folder):
    whole = launch("--module", "dsdistill", "train", write(settings, folder, "whole"))
    assert whole.returncode == 0, whole.stderr[-3000:]
    config = write(settings, folder, "nodes")
    agents = start(config, folder)
    try:
        deadline = time.time() + 200
        while checkpoint.newest(str(folder / "nodes")) is None:
            assert time.time() < deadline and all(agent.poll() is None for agent in agents), (
                folder / "node-0.log"
            ).read_text()[-3000:]
            time.sleep(0.05)
        os.killpg(agents[1].pid, signal.SIGKILL)  # the node's agent and its rank, which dies with it
        agents[0].wait(120)
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()
    wait_for_end(config, seconds=60)
    assert not (folder / "nodes" / "summary.json").exists(), "it was to be killed before its end"
    went_on = slurm(config, folder)
    logs = [(folder / f"{node}.log").read_text() for node in range(2)]
    assert went_on.returncode == 0, went_on.stderr + logs[0][-3000:] + logs[1][-3000:]
    assert "resuming from step-" in logs[0] + logs[1]
    assert losses(folder / "nodes") == losses(folder / "whole")


def slurm(config: Path, folder: Path) -> subprocess.CompletedProcess:
    """Run `multinode.slurm` as Slurm would on two nodes of one device."""
    commands = folder / "commands"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": free_port() % 10000, "SLURM_NNODES": 2, "SLURM_CPUS_PER_TASK": 1}
    variables |= {"SLURM_GPUS_ON_NODE": 1, "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_SUBMIT_DIR": folder}
    found = environment() | {name: str(value) for name, value in variables.items()} | {"NODES": str(folder)}
    found["PATH"] = f"{commands}:{found['PATH']}"
    return subprocess.run(
        ["bash", str(SLURM), str(config)], env=found, capture_output=True, text=True, timeout=400, check=False
    )
