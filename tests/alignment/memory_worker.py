"""Print, as JSON, the peak memory in MiB of this process for one step of each term that is named.

python memory_worker.py CASE BACKEND [CASE BACKEND ...]
"""

import gc
import json
import sys
from pathlib import Path

from dsdistill.bench.operators import resident
from tests.alignment.synthetic import Synthetic
from tests.alignment.test_memory import LENGTHS, VOCABULARY


def peak(case: str, backend: str) -> float:
    Synthetic(case, (16, 9), 64, backend).loss().backward()  # loads libraries and thread pools
    synthetic = Synthetic(case, LENGTHS, VOCABULARY, backend)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    synthetic.loss().backward()
    return resident("VmHWM") - before


if __name__ == "__main__":
    print(json.dumps([peak(*pair) for pair in zip(sys.argv[1::2], sys.argv[2::2], strict=True)]))
