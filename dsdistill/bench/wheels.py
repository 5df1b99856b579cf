"""Collect the wheels that a machine with a GPU and no package index lacks, for launch/gpu_check.sh --wheels DIR.

These are the packages that this environment has installed for dsdistill and its tests, at the same versions, without
torch, Triton and NumPy, which a machine with a GPU has already; and liger-kernel, which is a rival of our losses.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from dsdistill.config import UserError

PRESENT = {"torch", "triton", "numpy"}
# Rivals of our operators, whether installed here or not: name and version.
RIVALS = {"liger-kernel": "0.8.5"}
ROOTS = ("dsdistill", "pytest", "hypothesis", "setuptools", "wheel")
# A wheel's tag names the oldest C library that it runs with; pip accepts only the tags that it is given.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(35, 4, -1)] + ["manylinux2014_x86_64"]


def normal(name: str) -> str:
    """Return a distribution's normalised name, as the index spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(python: str, have: Iterable[str] = ()) -> dict[str, str]:
    """Return name and version of every distribution that dsdistill needs on the other machine.

    python: version of its Python, such as "3.12". have: names of the distributions that it has already.
    """
    from packaging.requirements import Requirement

    found: dict[str, str] = {}
    skipped = {normal(name) for name in have} | PRESENT
    waiting = list(ROOTS)
    while waiting:
        name = normal(waiting.pop())
        if name in found or name in skipped:
            continue
        found[name] = importlib.metadata.version(name)
        for text in importlib.metadata.requires(name) or ():
            requirement = Requirement(text)
            environment = {"extra": "", "python_version": python, "python_full_version": f"{python}.0"}
            if requirement.marker is None or requirement.marker.evaluate(environment):
                waiting.append(requirement.name)
    del found["dsdistill"]
    found |= {name: version for name, version in RIVALS.items() if name not in skipped}
    return dict(sorted(found.items()))


def fetch(name: str, version: str, python: str, folder: Path) -> str | None:
    """Put one wheel into `folder`, built from source if the index has no wheel. Return what went wrong, or None."""
    wanted = f"{name}=={version}"
    pip = [sys.executable, "-m", "pip"]
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    binary = ["download", "-q", "--no-deps", "--only-binary=:all:", "--python-version", python, *platforms]
    done = subprocess.run([*pip, *binary, "-d", str(folder), wanted], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    before = set(folder.iterdir())
    source = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), wanted]
    done = subprocess.run([*pip, *source], capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
    bound = [path for path in set(folder.iterdir()) - before if not path.name.endswith("-none-any.whl")]
    for path in bound:
        path.unlink()
    return f"no wheel for Python {python}, and {bound[0].name} runs on this machine alone" if bound else None


def main() -> int:
    (folder,) = map(Path, sys.argv[1:])
    python = os.environ.get("PYTHON_VERSION") or f"{sys.version_info[0]}.{sys.version_info[1]}"
    if not re.fullmatch(r"3\.\d+", python):
        raise UserError("PYTHON_VERSION", repr(python), "a version such as 3.12")
    have: list[str] = []
    if os.environ.get("HAVE"):
        try:
            lines = Path(os.environ["HAVE"]).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError("HAVE", os.environ["HAVE"], f"a file made by `pip freeze`: {error}") from None
        have = [re.split(r"[=@ ]", line)[0] for line in lines if line[:1].isalnum()]
    folder.mkdir(parents=True, exist_ok=True)
    failures = 0
    for name, version in needed(python, have).items():
        failure = fetch(name, version, python, folder)
        failures += failure is not None
        print(f"{name}=={version}" + (f"  not fetched: {failure}" if failure else ""), flush=True)
    size = sum(path.stat().st_size for path in folder.glob("*.whl"))
    print(
        f"{len(list(folder.glob('*.whl')))} wheels, {size / 2**20:.0f} MiB in {folder}, for Python {python}"
    )
    return int(failures > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"dsdistill: {error}", file=sys.stderr)
        sys.exit(2)
