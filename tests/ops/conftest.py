"""While operators are tested, memory that nobody has written holds NaN."""

import functools

import pytest
import torch

# Modules in which each of these is looked up; all of them return uninitialised memory.
UNWRITTEN = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
)

# When torch first meets such a context it notes, for the rest of the process, which functions make memory. If it met it
# below, it would note the replacements, and models meant for the meta device would get memory in every later test.
with torch.device("meta"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill what the functions of UNWRITTEN return: floats with NaN, integers with their largest value, bools with True.

    An operator that reads what it did not write then fails its test, whatever the memory held before. This holds for
    all Python code, torch's own included, and for the Triton kernels, whose buffers are made in Python. It does not
    reach memory that is made in C++: outputs and workspace of the compiled operators, and the results of torch's own
    operations. The outputs of compiled operators are filled in test_poisoned_memory.py; their workspace, and other
    processes, are not reached at all.
    """
    for owner, name in UNWRITTEN:
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(function):
    @functools.wraps(function)
    def call(*arguments, **options):
        memory = function(*arguments, **options)
        with torch.no_grad():
            if memory.is_floating_point() or memory.is_complex():
                return memory.fill_(torch.nan)
            return memory.fill_(True if memory.dtype == torch.bool else torch.iinfo(memory.dtype).max)

    return call
