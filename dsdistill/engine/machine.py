"""Name the machine that a measurement was made on."""

import platform
from pathlib import Path


def processor() -> str:
    """Return the processor's name from Linux's /proc/cpuinfo; on other systems the name that Python gives."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
