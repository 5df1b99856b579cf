"""The preflight of GPU kernels: its counts, its predictions, and what counts as worse. Nothing needs a GPU."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsdistill.bench import preflight, sass
from dsdistill.config import UserError
from dsdistill.ops.gpu import SHARED_LIMIT
from dsdistill.ops.records import FOLDER, records

pytest.importorskip("triton")

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;       /* 0x00000a0000017a02 */
                                                                /* 0x000fe40000000f00 */
        /*0010*/              @!P0 BRA 0xa0 ;
        /*0020*/                   LDG.E.128 R4, [R2.64] ;
        /*0030*/                   FADD R4, R4, R5 ;
        /*0040*/               @P1 BRA 0x20 ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, R56, gdesc[UR16].tnspB, R24, gsb0 ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0070*/                   HMMA.1688.F32.TF32 R4, R8, R12, R4 ;
        /*0080*/                   MUFU.EX2 R4, R4 ;
        /*0090*/              @!P5 BRA 0x50 ;
        /*00a0*/                   MUFU.RCP R4, R4 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0;
        /*00d0*/                   NOP;
"""


def test_main_loops_are_counted():
    outside, (loop,) = sass.count(LISTING)
    assert (loop.all, loop.tensor, loop.exp2, loop.special) == (5, 3, 1, 1)
    assert loop.products == {
        ("HGMMA", "half"): 2 * 64 * 128 * 16 / 4,
        ("HMMA", "half"): 2 * 16 * 8 * 16,
        ("HMMA", "TF32"): 2 * 16 * 8 * 8,
    }
    assert (outside.all, outside.loads, outside.special) == (8, 1, 1)
    without = "\n".join(line for line in LISTING.splitlines() if "MMA" not in line)
    _, (loop,) = sass.count(without)
    assert (loop.all, loop.loads) == (3, 1)


def test_programs_of_a_multiprocessor():
    assert preflight.blocks_of("sm_90", 128, 65_536, 8) == 2  # 65,536 registers
    assert preflight.blocks_of("sm_90", 32, 100_000, 4) == 2  # 233,472 bytes
    assert preflight.blocks_of("sm_80", 16, 0, 8) == 8  # 2,048 threads
    assert preflight.blocks_of("sm_86", 16, 0, 8) == 6


@pytest.mark.parametrize(("programs", "most"), [(1, 1), (108, 1), (109, 2), (1080, 10)])
def test_the_busiest_multiprocessor_ends_last(programs, most):
    """A warp of 400 instructions takes 100 clocks of the four schedulers on an A100's 108 multiprocessors."""
    gpu, call = preflight.GPUS["A100"], preflight.Call(programs, 1, 0, 0, 0)
    found = preflight.seconds(gpu, call, 1, sass.Count(all=400), [])
    assert found == pytest.approx(most * 100 / gpu.clock)


ROW = preflight.Row(
    "columns bf16",
    "sm_90",
    "32x128x8x2",
    167,
    0,
    74_240,
    2,
    419,
    26,
    "HGMMA",
    32,
    838,
    1.9,
    1.1,
    1.9,
    1.1,
    "",
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"registers": 200, "ms": 1.93}, None),
        ({"stack": 8}, "stack 0 → 8"),
        ({"blocks": 1}, "blocks 2 → 1"),
        ({"unit": "HMMA"}, "no wgmma any more"),
        ({"ms": 1.95}, "ms 1.9 → 1.95"),
        ({"h200_ms": 2.0}, "h200_ms 1.9 → 2.0"),
        ({"failure": "spills: 40 bytes of stack"}, "spills"),
    ],
)
def test_what_is_worse(change, said):
    found = preflight.regressions(dataclasses.replace(ROW, **change), ROW)
    assert (found == []) if said is None else (len(found) == 1 and said in found[0])
    assert preflight.regressions(dataclasses.replace(ROW, **change), None) == []


def test_tables_are_read_as_written_and_are_no_records(tmp_path):
    other = dataclasses.replace(ROW, architecture="sm_86", ms=None, floor=None, h200_ms=None, cycles=None)
    rows = {(r.kernel, r.architecture): r for r in (ROW, other)}
    preflight.write_table(tmp_path / "table.csv", rows)
    assert preflight.read_table(tmp_path / "table.csv") == rows
    assert preflight.read_table(tmp_path / "none.csv") == {}
    tables = sorted(preflight.TABLES.glob("*.csv"))
    assert tables and preflight.TABLES.parent == FOLDER and not list(FOLDER.glob("*.csv"))
    for path in tables:
        committed = preflight.read_table(path)
        assert {arch for _, arch in committed} == set(preflight.ARCHITECTURES)
        assert not [r for r in committed.values() if r.failure], path
        assert all(r.shared <= SHARED_LIMIT[r.architecture] for r in committed.values())
    assert all("rows" in record for record in records())


TWICE = """
import dataclasses, pathlib, sys
from dsdistill.bench import preflight
preflight.TABLES = pathlib.Path(sys.argv.pop())
print("code", preflight.main())
rows = preflight.read_table(preflight.table_path())
better = {key: dataclasses.replace(row, ms=row.ms / 2) for key, row in rows.items()}
preflight.write_table(preflight.table_path(), better)
sys.argv.remove("--write")
print("code", preflight.main())
preflight.write_table(preflight.table_path(), rows)
"""


def test_one_kernel_is_judged_and_a_worse_one_fails(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    match = ("--match", "rows bf16 D16 kl sweeps sm_90", "--write", str(tmp_path))
    command = [sys.executable, "-W", "ignore", "-c", TWICE, *match]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert "1 compiled, 0 failed, no triton-" in done.stdout and "code 0" in done.stdout, done.stderr
    assert "WORSE: ms" in done.stdout and "1 worse" in done.stdout and "code 1" in done.stdout
    (path,) = tmp_path.glob("*.csv")
    (row,) = preflight.read_table(path).values()
    queries, keys, warps, _ = map(int, row.tile.split("x"))
    assert row.unit.startswith("HGMMA") and row.tensor > 0
    assert row.exp2 * warps * 32 == 2 * queries * keys  # each pair once, for both models
    assert row.floor < row.ms < 3 * row.floor
    assert row.floor == pytest.approx(2 * 128 * 4096**2 / 16 / 132 / 1.83e9 * 1e3, rel=1e-3)


def test_misuse_is_one_line(monkeypatch):
    for arguments, said in (
        (["--tile", "32,64"], "expected ROWS,COLUMNS,WARPS,STAGES"),
        (["--tile", "32,64,4,2", "--write"], "one of them"),
        ([], "TRITON_INTERPRET"),
    ):
        monkeypatch.setattr(sys, "argv", ["preflight", *arguments])
        with pytest.raises(UserError, match=said):
            preflight.main()
    script = Path(__file__).parents[2] / "launch" / "gpu_preflight.sh"
    done = subprocess.run(["bash", str(script), "--write"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "expected ENV_DIR" in done.stderr
