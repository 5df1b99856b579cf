"""No integer of a GPU kernel overflows: long sequences, many heads, rows far apart (proven on bounds, not run)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.integer_ranges import overflows

pytest.importorskip("triton")

TOKENS = 131_072
# Each kernel at its largest: N = 131,072, B·H up to 65,536, rows as wide as 16 features of 256 or of 8192.
COMPILED = f"""
import json, sys
import torch
from dsdistill.bench import aot
from dsdistill.bench.aot_calls import vocabulary_call
from dsdistill.ops.attention import triton_schedule as attention
from dsdistill.ops.gpu import recording
from dsdistill.ops.hidden import rows as hidden
from dsdistill.ops.pairwise import triton_panels as pairwise

def empty(*shape, dtype=torch.bfloat16, wide=None):
    full = torch.empty(*shape[:-1], wide or shape[-1], dtype=dtype, device="meta")
    return full[..., : shape[-1]]

def attend(batch, heads, tokens, mean, plan):
    query, key = empty(batch, heads, tokens, 16, wide=256), empty(batch, heads // 2, tokens, 16, wide=256)
    mask, one = empty(batch, tokens, dtype=torch.bool), empty(1, dtype=torch.float32)[0]
    scales = (0.25, 0.25)
    attention.run(query, key, query, key, mask, *[None] * 5, one, 0, *scales, True, 4000, mean, plan, True, True)

def states(batch, tokens, relation):
    x, weights = empty(batch, tokens, 16, wide=8192), empty(batch, tokens, dtype=torch.float32)
    one = empty(1, dtype=torch.float32)[0]
    pairwise.run(x, x, empty(batch, tokens, dtype=torch.bool), weights, one, relation, True)

def rows(tokens, width):
    y, weights = empty(tokens, width, wide=2 * width), empty(tokens, dtype=torch.float32)
    hidden.triton_rows(y, y, weights, weights, weights, 1, torch.bfloat16)

CALLS = [
    lambda: attend(64, 64, {TOKENS}, False, "merged"),
    lambda: attend(64, 64, {TOKENS}, False, "sweeps"),
    lambda: attend(2, 256, {TOKENS}, True, "auto"),
    lambda: attend(256, 256, 128, False, "row"),
    lambda: states(64, {TOKENS}, 0),
    lambda: states(64, {TOKENS}, 2),
    lambda: rows(1 << 24, 512),
    lambda: vocabulary_call(torch.bfloat16, "jsd", True, True),
]
found, seen = [], set()
for call in CALLS:
    with recording("sm_90") as launches:
        call()
    for launch in launches:
        variant = aot.variant_of(launch, "", "sm_90")
        key = (variant, launch.programs)
        if key in seen:
            continue
        seen.add(key)
        arguments = {{k: v for k, v in launch.arguments.items() if type(v) is int}}
        code = aot.compiled(variant).asm["ttir"]
        found.append([variant.kernel, code, arguments, launch.programs])
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def kernels():
    """Return (name, intermediate code, arguments, programs) of each launch, compiled in another process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILED]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_no_integer_overflows(kernels):
    names = {name.removesuffix("_kernel") for name, *_ in kernels}
    assert names == {
        "statistics",
        "rows",
        "columns",
        "full_row",
        "lse",
        "mean_heads",
        "relation",
        "vocabulary",
    }
    for name, code, arguments, programs in kernels:
        assert 0 < programs < 2**31, (name, programs)
        assert overflows(code, arguments, programs) == [], name
    # These calls are large enough: with one more head int32 would overflow.
    assert any(a.get("qs_h", 0) * a.get("heads_s", 0) >= 2**31 for _, _, a, _ in kernels)


def test_an_overflow_is_found():
    code = """
    %c64_i32 = arith.constant 64 : i32 loc(#loc1)
    %program = tt.get_program_id x : i32 loc(#loc1)
    %block = arith.remsi %program, %N : i32 loc(#loc2)
    %r = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32> loc(#loc2)
    %loss = scf.for %h = %c64_i32 to %heads step %c64_i32 iter_args(%x = %cst) -> (tensor<32xf32>)  : i32 {
      %rows = arith.muli %block, %c64_i32 : i32 loc(#loc2)
      %wide = arith.extsi %h : i32 to i64 loc(#loc2)
      %far = arith.muli %wide, %stride_wide : i64 loc(#loc2)
      %near = arith.muli %h, %stride : i32 loc(#loc2)
    """
    given = {"N": 1000, "heads": 128, "stride": 2**24, "stride_wide": 2**40}
    assert overflows(code, given, 10**6) == []
    (line,) = overflows(code, given | {"stride": 2**25}, 10**6)
    assert "%near" in line and str(127 * 2**25) in line
    (line,) = overflows(code, {k: v for k, v in given.items() if k != "stride_wide"}, 10**6)
    assert "no bound" in line and "%far" in line
