"""Start real ranks the way users do."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")
ROOT = Path(__file__).parents[2]


def heed() -> None:
    """Take signals as a process in a terminal does, even if the tests run below nohup, which ignores SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_command(*arguments: object, ranks: int = 2) -> tuple[list[str], dict[str, str]]:
    """deepspeed --num_gpus RANKS ARGUMENTS, one thread a rank: command and environment. One rank needs no launcher."""
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--num_gpus", ranks, "--master_port", free_port(), *arguments]
    if ranks == 1:
        command = [sys.executable, *arguments]
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),  # workers share code
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    environment.pop("TRITON_INTERPRET", None)  # set for the operators' tests
    return list(map(str, command)), environment


def launch(*arguments: object, ranks: int = 2, timeout: int = 400) -> subprocess.CompletedProcess:
    command, environment = launch_command(*arguments, ranks=ranks)
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def run_configs(paths: list[Path | str], ranks: int = 2) -> str:
    """Run the configs on real ranks; fails with their output unless all came to their end. Returns the log.

    CONFIG@STEP takes the run back to the checkpoint of that step first.
    """
    done = launch(WORKER, *paths, ranks=ranks)
    assert done.returncode == 0 and "all configs done" in done.stdout, (
        done.stdout[-3000:] + done.stderr[-6000:]
    )
    return done.stderr


def processes_of(path: Path) -> dict[int, list[str]]:
    """Return every process, with its command line, that names this path or one below it."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # the process has ended
            continue
        if any(argument == str(path) or argument.startswith(f"{path}/") for argument in arguments):
            found[int(entry.name)] = arguments
    return found


def wait_for_end(path: Path, seconds: float) -> None:
    """Fail if a process that names this path still exists after that time."""
    deadline = time.time() + seconds
    while left := processes_of(path):
        assert time.time() < deadline, f"processes were left behind: {left}"
        time.sleep(0.1)
