"""Judge every GPU kernel without a GPU: by its compiled code, and by the least time that its instructions take.

python -m dsdistill.bench.preflight --match "columns bf16 D64"                one kernel, with the Triton found here
python -m dsdistill.bench.preflight --match "columns bf16 D64" --tile 32,64,4,2     the same with another tile
launch/gpu_preflight.sh                                                       all of them, in an environment of its own

The prediction assumes that every issue slot is used: it is the least time of the kernel on one call of B8 H16 N4096
(attention), B8 N512 (pairwise) or 16,384 tokens (hidden). The floor is the least time of the products, exponentials and
bytes that the definition needs, at the rates of the data sheets.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from dsdistill import disk
from dsdistill.bench import aot, sass
from dsdistill.bench.aot import Variant
from dsdistill.config import UserError

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90")
WIDTHS = (64, 128, 32, 256, 16)  # of heads; the most common ones first, in case the process is ended early
TABLES = Path(__file__).parent / "results" / "preflight"  # apart from the records of GPUs
# A prediction may rise by this factor before it counts as a regression.
SLACK = 1.02


@dataclass(frozen=True)
class Gpu:
    """A Gpu holds its multiprocessors, clock in Hz, bytes/s, and dense operations per clock of a multiprocessor.

    On all GPUs a multiprocessor computes 16 special functions (exp2) per clock, and 4 warps issue an instruction each.
    """

    sms: int
    clock: float
    bandwidth: float
    tensor: dict[tuple[str, str], float]


# NVIDIA's white papers: 312 and 989 TFLOP/s in half precision. On sm_90 the older instruction reaches about two thirds
# of the newer one's rate (Luo et al. 2024, arXiv 2402.13499).
SM_90 = {
    ("HGMMA", "half"): 4096.0,
    ("HGMMA", "TF32"): 2048.0,
    ("HMMA", "half"): 2730.0,
    ("HMMA", "TF32"): 1365.0,
}
GPUS = {
    "A100": Gpu(108, 1.41e9, 2.04e12, {("HMMA", "half"): 2048.0, ("HMMA", "TF32"): 1024.0}),
    "H100": Gpu(132, 1.83e9, 3.35e12, SM_90),
    "H200": Gpu(132, 1.83e9, 4.8e12, SM_90),
}
RUNS = {"sm_80": ("A100",), "sm_90": ("H100", "H200")}
REGISTERS = 65_536  # of a multiprocessor
THREADS = {"sm_80": 2048, "sm_86": 1536, "sm_89": 1536, "sm_90": 2048}


@dataclass(frozen=True)
class Call:
    """A Call is the measured call as one kernel sees it.

    It holds the number of programs, tiles per program, products (operations) and exponentials per tile by the
    definition, and bytes of the whole call. unrolled: the compiler knows how many tiles there are and may unroll the
    loop over them.
    """

    programs: float
    tiles: float
    products: float
    exps: float
    bytes: float
    unrolled: bool = True


def call_of(variant: Variant) -> Call | None:
    """Return the call that a kernel is judged by; None for kernels without a prediction."""
    given = dict(variant.constants)
    types = dict(variant.signature)
    kernel = variant.kernel.removesuffix("_kernel")
    if kernel == "rows" and "BT" in given:  # the kernel of hidden states
        size = sum(2 if types[name] in ("*bf16", "*fp16") else 4 for name in ("y", "target", "gradient"))
        tokens, width = 16_384, given["D"]
        return Call(tokens / given["BT"], math.ceil(width / given["BD"]), 0, 0, tokens * width * size)
    if kernel == "relation":
        if types["student"] == "*fp32":
            return None
        pairs = given["BR"] * given["BC"]
        panels = 8 * math.ceil(512 / given["BR"]) * math.ceil(512 / given["BC"])
        depth = math.ceil(given["DS"] / given["BK"])
        return Call(panels, depth, 2 * pairs * given["BK"], 0, 0)
    if kernel not in PRODUCTS or types.get("query_s", types.get("query")) == "*fp32":
        return None
    rows, columns = given["BR"], given["BC"]
    heads, tokens = 8 * 16, columns if kernel == "full_row" else 4096
    owned, walked = (columns, rows) if kernel == "columns" else (rows, columns)
    # Without gradients, kl needs only the teacher's probabilities.
    one = kernel == "lse" or (given.get("DIVERGENCE") == 0 and given.get("WITH_GRADIENT") is False)
    exps = 0 if given.get("DIVERGENCE") == 2 else 1 if one else 2
    products = PRODUCTS[kernel] + sum(given.get(name) is True for name in ADDED)
    width = given.get("DS", given.get("D"))
    return Call(
        heads * math.ceil(tokens / owned),
        math.ceil(tokens / walked),
        2 * products * rows * columns * width,
        exps * rows * columns,
        0,
        unrolled=False,
    )


PRODUCTS = {"statistics": 2, "rows": 2, "columns": 2, "full_row": 2, "lse": 1}
ADDED = ("WITH_GRADIENT", "WITH_KEY", "WITH_QUERY", "MERGED", "ALONE")  # each adds one product


@dataclass(frozen=True)
class Row:
    """A Row is one kernel of the table.

    instructions, tensor, exp2: of one warp in one tile, 0 for architectures without a prediction. ms, floor, h200_ms,
    h200_floor: milliseconds of the call, on an A100 for sm_80, on an H100 and an H200 for sm_90.
    """

    kernel: str
    architecture: str
    tile: str
    registers: int
    stack: int
    shared: int
    blocks: int
    instructions: int
    tensor: int
    unit: str
    exp2: int
    cycles: int | None  # issue slots for each 4096 pairs
    ms: float | None
    floor: float | None
    h200_ms: float | None
    h200_floor: float | None
    failure: str


def blocks_of(architecture: str, registers: int, shared: int, warps: int) -> int:
    """Return how many programs a multiprocessor holds at a time; registers are allocated per warp in units of 256."""
    per_warp = -(-registers * 32 // 256) * 256
    room = aot.SHARED_LIMIT[architecture] + 1024  # each program takes 1024 bytes of its own
    by = (
        REGISTERS // (per_warp * warps),
        THREADS[architecture] // (32 * warps),
        room // (shared + 1024),
    )
    return max(1, min(by))


def seconds(gpu: Gpu, call: Call, warps: int, outside: sass.Count, loops: list[sass.Count]):
    """Return the least seconds that the instructions take on a GPU, with every issue slot used."""

    def cycles(count: sass.Count, times: float) -> tuple[float, float, float]:
        tensor = sum(work * warps / gpu.tensor[key] for key, work in count.products.items())
        return count.all * warps / 4 * times, count.special * 32 * warps / 16 * times, tensor * times

    parts = [cycles(outside, 1)] + [cycles(loop, call.tiles / passes(loop, call, warps)) for loop in loops]
    program = max(sum(part[i] for part in parts) for i in range(3))
    # The multiprocessor with the most programs finishes last.
    most = math.ceil(call.programs / gpu.sms)
    return max(most * program / gpu.clock, call.bytes / gpu.bandwidth)


def passes(loop: sass.Count, call: Call, warps: int) -> int:
    """Return how many tiles one pass of a loop covers.

    If the loop cannot be unrolled, products beyond those of the definition are work that warps repeat.
    """
    return 1 if not (call.unrolled and call.products) else max(1, round(loop.flops * warps / call.products))


def floor_seconds(gpu: Gpu, call: Call) -> float:
    tiles = call.programs * call.tiles
    best = max(gpu.tensor.values())
    clocks = max(tiles * call.products / best, tiles * call.exps / 16)
    return max(clocks / gpu.sms / gpu.clock, call.bytes / gpu.bandwidth)


def measure(variant: Variant) -> Row:
    """Compile one kernel and count its instructions, in a process of its own or of a pool."""
    given = dict(variant.constants)
    sizes = [
        given.get("BR", given.get("BT")),
        given.get("BC", given.get("BD")),
        variant.warps,
        variant.stages,
    ]
    tile = "x".join(map(str, sizes))
    blank = (None,) * 5
    try:
        kernel = aot.compiled(variant)
    except Exception as error:  # finding the compiler's failures is the purpose
        said = aot.last_line(error)
        return Row(variant.label, variant.architecture, tile, 0, 0, 0, 0, 0, 0, "", 0, *blank, said)
    result = aot.result_of(variant, kernel)
    outside, loops = sass.Count(), []
    # Other architectures have no prediction, and a listing takes half as long as a compilation.
    if variant.architecture in RUNS:
        outside, loops = sass.count(aot.dump(kernel.asm["cubin"], "-sass"))
    blocks = blocks_of(variant.architecture, result.registers, result.shared, variant.warps)
    call = call_of(variant)
    loops = aot.main_loops(variant, loops)
    main = loops or [outside]
    covered = [passes(loop, call, variant.warps) if call and loops else 1 for loop in main]

    def a_tile(name: str) -> int:
        return sum(round(getattr(loop, name) / times) for loop, times in zip(main, covered, strict=True))

    units = sorted({unit for loop in main for unit, _ in loop.products})
    numbers: dict = dict(cycles=None, ms=None, floor=None, h200_ms=None, h200_floor=None)
    if call and "BR" in given and outside.all:
        pairs = given["BR"] * given["BC"]
        numbers["cycles"] = round(a_tile("all") * variant.warps / 4 * 4096 / pairs)
    for prefix, name in zip(("", "h200_"), RUNS.get(variant.architecture, ()), strict=False):
        if call:
            found = seconds(GPUS[name], call, variant.warps, outside, loops)
            numbers[f"{prefix}ms"] = round(found * 1e3, 4)
            numbers[f"{prefix}floor"] = round(floor_seconds(GPUS[name], call) * 1e3, 4)
    return Row(
        variant.label,
        variant.architecture,
        tile,
        result.registers,
        result.stack,
        result.shared,
        blocks,
        a_tile("all"),
        a_tile("tensor"),
        "+".join(units),
        a_tile("exp2"),
        failure="; ".join(result.failures),
        **numbers,
    )


def cuda_rows() -> list[Row]:
    """Return a row for each CUDA source and architecture, with the worst figures over its kernels."""
    rows = []
    for source in aot.cuda_sources():
        for r in aot.compile_cuda(source, ARCHITECTURES):
            blank = (0, 0, "", 0, None, None, None, None, None)
            failure = "; ".join(r.failures)
            rows.append(Row(r.label, r.architecture, "", r.registers, r.stack, r.shared, 0, *blank, failure))
    return rows


# Run in a process of its own, since this one may already have loaded the extension of the source folder.
LOADED = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("dsdistill._C", sys.argv[1])
sys.modules["dsdistill._C"] = library = importlib.util.module_from_spec(spec)
spec.loader.exec_module(library)
from dsdistill.ops.backends import extension
from dsdistill.ops.hidden.rows import cuda_rows
assert extension() is library
registered = torch._C._dispatch_has_kernel_for_dispatch_key("dsdistill::hidden_rows", "CUDA")
assert registered, "hidden_rows has no kernel for CUDA tensors"
assert hasattr(torch._C, "_cuda_getCurrentStream"), "this torch gives no CUDA stream"
y, one = torch.ones(2, 8), torch.ones(())
values, _ = cuda_rows(y, 3 * y, None, torch.ones(2), one, 0, None)
assert values.tolist() == [32.0, 32.0], values
print("torch", torch.__version__, *library.cuda_architectures)
"""


def check_library(path: Path) -> None:
    """Load an extension that was built with CUDA kernels, and check that all its symbols are resolved.

    Raises AssertionError, which names what is missing.
    """
    said = output(sys.executable, "-c", LOADED, str(path))
    assert said.split()[2:] == list(aot.ARCHITECTURES), said
    # A weak symbol that is not found is null, and fails only when it is called.
    symbols = [line.split() for line in output("nm", "-D", "--undefined-only", str(path)).splitlines()]
    weak = [name for kind, name in symbols if kind in "wv"]
    ours = [name for name in weak if not name.startswith(("_ITM_", "__cxa_", "__gmon_start__"))]
    assert not ours, f"weak symbols: {ours}"
    found = {}
    for kind in ("elf", "ptx"):
        found[kind] = sorted(
            set(re.findall(r"sm_\d+", output(aot.tool("cuobjdump"), f"--list-{kind}", str(path))))
        )
    assert found == {"elf": sorted(aot.ARCHITECTURES), "ptx": ["sm_90"]}, found
    print(f"{path.name}: {said.strip()}; machine code {found['elf']}, PTX {found['ptx']}, no weak symbol")


def output(*command: str) -> str:
    """Return what a command prints. Raise AssertionError with its error output if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def table_path() -> Path:
    import triton

    return TABLES / f"triton-{triton.__version__}.csv"


def read_table(path: Path) -> dict[tuple[str, str], Row]:
    if not path.exists():
        return {}
    rows = {}
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            values = {}
            for f in fields(Row):
                text = line[f.name]
                is_text = f.name in ("kernel", "architecture", "tile", "unit", "failure")
                real = "ms" in f.name or "floor" in f.name
                values[f.name] = (
                    text if is_text else None if text == "" else float(text) if real else int(text)
                )
            rows[values["kernel"], values["architecture"]] = Row(**values)
    return rows


def write_table(path: Path, rows: dict[tuple[str, str], Row]) -> None:
    with disk.writing(path) as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(rows[key]) for key in sorted(rows))


def regressions(new: Row, old: Row | None) -> list[str]:
    """Return what is worse than in the committed table: spills, programs per multiprocessor, units, predicted time."""
    if old is None:
        return []
    found = []
    if new.failure and new.failure != old.failure:
        found.append(new.failure)
    if new.stack > old.stack:
        found.append(f"stack {old.stack} → {new.stack}")
    if new.blocks < old.blocks:
        found.append(f"blocks {old.blocks} → {new.blocks}")
    if "HGMMA" in old.unit and "HGMMA" not in new.unit:
        found.append("no wgmma any more")
    for name in ("ms", "h200_ms"):
        before, after = getattr(old, name), getattr(new, name)
        if before is not None and after is not None and after > before * SLACK:
            found.append(f"{name} {before} → {after}")
    return found


def show(rows: list[Row], committed: dict[tuple[str, str], Row]) -> int:
    """Print the table; return how many kernels are worse than in the committed one."""
    head = f"{'kernel':54} {'arch':6} {'tile':14} {'regs':>4} {'stack':>5} {'shared':>6} {'blocks':>6} {'instr':>5} "
    print(
        head + f"{'tensor':>6} {'exp2':>4} {'cyc/4k':>6} {'ms':>8} {'floor':>7} {'H200 ms':>8} {'floor':>7}"
    )
    worse = 0
    for r in rows:
        line = f"{r.kernel:54} {r.architecture:6} {r.tile:14} {r.registers:4} {r.stack:5} {r.shared:6} {r.blocks:6} "
        line += f"{r.instructions:5} {r.tensor:6} {r.exp2:4} {'–' if r.cycles is None else r.cycles:>6} "
        for value, wide in ((r.ms, 8), (r.floor, 7), (r.h200_ms, 8), (r.h200_floor, 7)):
            line += f"{'–' if value is None else f'{value:.3f}':>{wide}} "
        found = regressions(r, committed.get((r.kernel, r.architecture)))
        worse += bool(found)
        print(
            line
            + r.unit
            + (f"  FAILED: {r.failure}" if r.failure else "")
            + "".join(f"  WORSE: {x}" for x in found)
        )
    return worse


def try_tile(text: str) -> None:
    """Make attention's kernels use this tile, ROWS,COLUMNS,WARPS,STAGES, instead of the table's."""
    from dsdistill.ops.attention import triton_schedule
    from dsdistill.ops.gpu import Tile, block_width

    try:
        tile = Tile(*map(int, text.split(",")))
    except (TypeError, ValueError):
        raise UserError("--tile", repr(text), "ROWS,COLUMNS,WARPS,STAGES") from None
    triton_schedule.tile_of = lambda kernel, tensors: tile
    # A full row has as many columns as keys.
    triton_schedule.row_tile = lambda tensors: tile._replace(columns=block_width(tensors[0].shape[2]))
    chosen = triton_schedule.alone_tile

    def alone_tile(tensors):
        return (
            tile._replace(columns=tile.rows) if chosen(tensors) and tile.rows >= tensors[0].shape[2] else None
        )

    triton_schedule.alone_tile = alone_tile


def variants(match: str) -> list[Variant]:
    from dsdistill.bench.aot_calls import all_calls

    named = [
        architecture for architecture in ARCHITECTURES if architecture in match
    ]  # only these need to be recorded
    found = aot.variants_of(all_calls(WIDTHS), named or ARCHITECTURES)
    return [v for v in found if match in f"{v.label} {v.architecture}"]


def main() -> int:
    import triton

    parser = argparse.ArgumentParser(prog="python -m dsdistill.bench.preflight")
    parser.add_argument("--match", default="", help="only kernels whose label and architecture contain this")
    parser.add_argument(
        "--tile", help="ROWS,COLUMNS,WARPS,STAGES for attention's kernels instead of the table's"
    )
    parser.add_argument("--write", action="store_true", help="put what is found into the committed table")
    parser.add_argument(
        "--library", type=Path, help="load this built extension instead, and see that it is whole"
    )
    given = parser.parse_args()
    if given.library:
        check_library(given.library)
        return 0
    if given.write and given.tile:
        raise UserError(
            "--write", "it beside --tile", "one of them: the table holds the tiles that are shipped"
        )
    if given.tile:
        try_tile(given.tile)
    if triton.knobs.runtime.interpret:
        raise UserError(
            "TRITON_INTERPRET", "a value", "it unset, since nothing is compiled in the interpreter"
        )
    path = table_path()
    committed = read_table(path)
    kept = committed if given.match else {}

    def write() -> None:
        write_table(path, kept | {(r.kernel, r.architecture): r for r in rows})

    rows, written = [], time.monotonic()
    for row in aot.compile_all(variants(given.match), measure):
        rows.append(row)
        if given.write and time.monotonic() - written > 30:  # in case the process is ended early
            write()
            written = time.monotonic()
    if not given.match:
        rows += cuda_rows()
    worse = show(rows, committed)
    failed = sum(bool(r.failure) for r in rows)
    against = f"{worse} worse than {path.name}" if committed else f"no {path.name} to compare with"
    print(f"Triton {triton.__version__}: {len(rows)} compiled, {failed} failed, {against}")
    if given.write:
        write()
        return int(failed > 0)
    return int(failed > 0 or worse > 0 or not rows)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"dsdistill: {error}", file=sys.stderr)
        sys.exit(2)
