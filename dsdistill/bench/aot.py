"""Compile GPU kernels without a GPU: report their registers, spills, shared memory and matrix instructions.

Operators run on meta tensors while `ops.gpu.recording` collects their launches; each distinct launch is compiled for
sm_80 and sm_90 with the installed Triton. A spill appears as STACK > 0 in the output of cuobjdump.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from dsdistill import disk
from dsdistill.bench import sass
from dsdistill.config import UserError
from dsdistill.ops.gpu import SHARED_LIMIT, Launch, recording

ARCHITECTURES = ("sm_80", "sm_90")  # those that setup.py compiles for
# Bytes of a thread's stack that a kernel may spill: up to eight values, which cost less than a smaller tile. More
# fails, unless no main loop accesses the stack: values that a program spills only once cost almost nothing.
TOLERATED_STACK = 32
# The same for a kernel without loops, whose program has one tile and spills only once.
TOLERATED_ONCE = 160
# Kernels with separate loops for tiles in which all pairs exist and for tiles with conditions.
EDGED = ("statistics", "rows", "columns")
T = TypeVar("T")
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Variant:
    """A Variant is one kernel with the types and constants of one launch, for one architecture; it can be pickled."""

    label: str
    module: str
    kernel: str
    architecture: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[str, ...]
    warps: int
    stages: int


@dataclass(frozen=True)
class Result:
    label: str
    architecture: str
    warps: int
    registers: int
    stack: int
    shared: int
    wgmma: bool
    failures: tuple[str, ...]


def variant_of(launch: Launch, label: str, architecture: str) -> Variant:
    """Return what Triton specialises a launch to: numbers equal to 1 are constants, multiples of 16 are marked."""
    signature, constants, divisible = [], [], []
    for parameter in launch.kernel.params:
        name, value = parameter.name, launch.arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature.append((name, POINTERS[value.dtype]))
            divisible.append(name)
            continue
        if parameter.is_constexpr or (value == 1 and isinstance(value, int)):
            signature.append((name, "constexpr"))
            constants.append((name, value))
            continue
        if isinstance(value, int):
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0:
                divisible.append(name)
        else:
            signature.append((name, "fp32"))
    return Variant(
        label,
        launch.kernel.fn.__module__,
        launch.kernel.fn.__name__,
        architecture,
        tuple(signature),
        tuple(constants),
        tuple(divisible),
        launch.tile.warps,
        launch.tile.stages,
    )


def compiled(variant: Variant):
    """Return the kernel that Triton compiles from a variant; raise whatever its compiler raises."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(variant.module), variant.kernel)
    source = ASTSource(
        fn=function,
        signature=dict(variant.signature),
        constexprs=dict(variant.constants),
        attrs={(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible},
    )
    target = GPUTarget("cuda", int(variant.architecture.removeprefix("sm_")), 32)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    return triton.compile(source, target=target, options=options)


def compile_variant(variant: Variant) -> Result:
    """Compile and judge a variant, in a process of its own or of a pool."""
    try:
        kernel = compiled(variant)
    except Exception as error:  # finding the compiler's failures is the purpose
        return Result(variant.label, variant.architecture, variant.warps, 0, 0, 0, False, (last_line(error),))
    return result_of(variant, kernel)


def last_line(error: Exception) -> str:
    said = str(error).strip().splitlines() or [type(error).__name__]
    return said[-1][:200]


def result_of(variant: Variant, kernel) -> Result:
    """Judge a kernel that `compiled` returned."""
    registers, stack = resources(kernel.asm["cubin"])
    shared = kernel.metadata.shared
    wgmma = "wgmma.mma_async" in kernel.asm["ptx"]
    harmful = 0 if stack <= TOLERATED_STACK or put_away(variant, kernel.asm["cubin"], stack) else stack
    failures = judge(variant.architecture, harmful, shared)
    if variant.architecture == "sm_90" and needs_wgmma(variant) and not wgmma:
        failures.append("no wgmma")
    return Result(
        variant.label, variant.architecture, variant.warps, registers, stack, shared, wgmma, tuple(failures)
    )


def kernel_of(variant: Variant) -> str:
    name = variant.kernel.removesuffix("_kernel")
    return "hidden rows" if name == "rows" and "BT" in dict(variant.constants) else name


def main_loops(variant: Variant, loops: list[sass.Count]) -> list[sass.Count]:
    """Return the loops that most tiles run through, without the separate loops for tiles at the edges."""
    return [min(loops, key=lambda loop: loop.all)] if kernel_of(variant) in EDGED and loops else loops


def put_away(variant: Variant, cubin: bytes, stack: int) -> bool:
    """Return whether no main loop accesses the stack; for a kernel without loops, whether the stack is small."""
    _, loops = sass.count(dump(cubin, "-sass"))
    return not any(loop.stack for loop in main_loops(variant, loops)) if loops else stack <= TOLERATED_ONCE


def judge(architecture: str, stack: int, shared: int) -> list[str]:
    failures = [f"spills: {stack} bytes of stack"] if stack > TOLERATED_STACK else []
    if shared > SHARED_LIMIT[architecture]:
        failures.append(f"{shared} bytes of shared memory, limit {SHARED_LIMIT[architecture]}")
    return failures


def needs_wgmma(variant: Variant) -> bool:
    """Return whether wgmma is required: half precision, at least 4 warps, and at least 64 rows in the left factor."""
    half = {"*bf16", "*fp16"} & {kind for name, kind in variant.signature if name in ("query_s", "student")}
    constants = dict(variant.constants)
    rows = constants["BC" if variant.kernel == "columns_kernel" else "BR"] if "BR" in constants else 0
    return bool(half) and variant.warps >= 4 and rows >= 64


def resources(cubin: bytes) -> tuple[int, int]:
    """Return (registers of a thread, bytes of its stack) as cuobjdump reports them."""
    text = dump(cubin, "--dump-resource-usage")
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def tool(name: str) -> str:
    """Return the path of one of the CUDA programs that come with Triton."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def dump(cubin: bytes, option: str) -> str:
    """Return what cuobjdump prints about a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("cuobjdump"), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_all(
    variants: list[Variant], compile_one: Callable[[Variant], T] = compile_variant
) -> Iterator[T]:
    """Yield the result of `compile_one` for each variant, in order, as soon as it is ready, from several processes."""
    import multiprocessing

    workers = min(len(variants), os.cpu_count() or 1)
    if workers <= 1:
        yield from map(compile_one, variants)
        return
    # These are fresh processes, because forking a process that has threads may hang.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from tqdm(pool.map(compile_one, variants), total=len(variants), unit="kernel", disable=None)


def variants_of(
    calls: Iterator[tuple[str, Callable[[], object]]], architectures: Sequence[str] = ARCHITECTURES
) -> list[Variant]:
    """Return every distinct variant that the calls (label, function to run on meta tensors) launch."""
    variants = {}
    for label, call in calls:
        for architecture in architectures:
            with recording(architecture) as launches:
                call()
            for launch in launches:
                variant = variant_of(launch, "", architecture)
                key = (variant,)
                name = variant.kernel.removesuffix("_kernel")
                stage = dict(variant.constants).get("STAGE")
                name = name if stage is None else f"{name} stage {stage}"
                variants.setdefault(key, variant_of(launch, f"{name} {label}", architecture))
    return list(variants.values())


def compile_cuda(source: Path, architectures: Sequence[str] = ARCHITECTURES) -> list[Result]:
    """Compile a .cu file with nvcc; return for each architecture the worst figures over its kernels."""
    results = []
    for architecture in architectures:
        command = [
            "nvcc",
            "-std=c++17",
            "-O3",
            f"-arch={architecture}",
            "-Xptxas",
            "-v",
            "-cubin",
            "-o",
            os.devnull,
        ]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True)
        label = f"cuda {source.parent.name}"
        if done.returncode:
            failure = (done.stderr.strip().splitlines()[-1][:200],)
            results.append(Result(label, architecture, 0, 0, 0, 0, False, failure))
            continue
        registers, stack, shared = (
            max(map(int, re.findall(pattern, done.stderr)), default=0)
            for pattern in (r"Used (\d+) registers", r"(\d+) bytes stack frame", r"(\d+) bytes smem")
        )
        failures = judge(architecture, stack, shared)
        count = len(re.findall(r"Used \d+ registers", done.stderr))
        label += f", {count} kernels"
        results.append(Result(label, architecture, 0, registers, stack, shared, False, tuple(failures)))
    return results


def cuda_sources() -> list[Path]:
    """Return the CUDA sources of a source checkout; none in an installed package."""
    return sorted((Path(__file__).parents[2] / "csrc").glob("*/cuda.cu"))


def run_aot(json_path: str | Path | None = None, match: str = "") -> int:
    """Compile every kernel variant whose label contains `match`; print a table. Return 0, or 1 on a failure.

    Raises UserError if Triton's interpreter is chosen (TRITON_INTERPRET).
    """
    import triton

    from dsdistill.bench.aot_calls import all_calls

    if triton.knobs.runtime.interpret:  # as Triton itself reads the variable: it also accepts "yes"
        raise UserError(
            "TRITON_INTERPRET",
            os.environ.get("TRITON_INTERPRET"),
            "it unset, since nothing is compiled in the interpreter",
        )
    results, written = [], time.monotonic()
    for result in compile_all([v for v in variants_of(all_calls()) if match in v.label]):
        results.append(result)
        if json_path is not None and time.monotonic() - written > 5:  # in case the process is ended early
            disk.save_json(json_path, [asdict(r) for r in results])
            written = time.monotonic()
    if shutil.which("nvcc"):
        results += [r for source in cuda_sources() for r in compile_cuda(source) if match in r.label]
    else:
        print("no nvcc on the PATH: CUDA sources are not compiled")
    print(f"Triton {triton.__version__}")
    print(table(results))
    failed = sum(bool(r.failures) for r in results)
    print(f"{len(results)} compiled, {failed} failed")
    if json_path is not None:
        disk.save_json(json_path, [asdict(r) for r in results])
    return int(failed > 0 or not results)


def table(results: list[Result]) -> str:
    lines = [f"{'kernel':58} {'arch':6} warps  regs  stack  shared  wgmma"]
    for r in results:
        line = f"{r.label:58} {r.architecture:6} {r.warps:5} {r.registers:5} {r.stack:6} {r.shared:7}  "
        lines.append(line + ("yes" if r.wgmma else "no") + "".join(f"  FAILED: {f}" for f in r.failures))
    return "\n".join(lines)
