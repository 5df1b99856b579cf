"""Build of dsdistill's native operators; everything else lives in pyproject.toml.

The extension uses torch's stable ABI: one build runs under every torch from 2.11 on. Kernels are compiled once
for each instruction set and the best one is chosen at run time. CUDA kernels (sm_80, sm_90) are built in where torch
has CUDA and nvcc is found; DSDISTILL_CUDA=0 leaves them out. Without torch or a working C++ compiler the package
installs all the same, with operators in plain PyTorch; DSDISTILL_NATIVE=0 skips the build.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
TORCH_TARGET = "0x020b000000000000"  # 2.11

# Register width in bytes and compiler flags of each instruction set.
INSTRUCTION_SETS = {"portable": (16, [])}
if X86:
    INSTRUCTION_SETS["avx2"] = (32, ["-mavx2", "-mfma"])
    INSTRUCTION_SETS["avx512"] = (64, ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"])
    INSTRUCTION_SETS["avx512_bf16"] = (64, [*INSTRUCTION_SETS["avx512"][1], "-mavx512bf16"])
    INSTRUCTION_SETS["amx_bf16"] = (64, [*INSTRUCTION_SETS["avx512_bf16"][1], "-mamx-tile", "-mamx-bf16"])

KERNELS = sorted(map(str, Path("csrc").glob("*/cpu.cpp")))
SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp") if path.name != "cpu.cpp")
HEADERS = sorted(map(str, Path("csrc").rglob("*.h")))
FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-ffp-contract=fast", "-fno-math-errno"]
FLAGS += ["-DDSD_X86"] if X86 else []
CUDA_KERNELS = sorted(map(str, Path("csrc").glob("*/cuda.cu")))
# Machine code for A100 and H100/H200, and PTX of the latter for what comes after. dsdistill.bench.aot has the same.
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_FLAGS += [
    "-gencode",
    "arch=compute_80,code=sm_80",
    "-gencode",
    "arch=compute_90,code=[sm_90,compute_90]",
]
EXTRA = os.environ.get("DSDISTILL_CFLAGS", "").split()  # e.g. -fsanitize=address


class BuildNative(build_ext):
    """Compiles every source in parallel, kernels once for each instruction set."""

    def build_extension(self, ext):
        try:
            import pybind11
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError as error:
            self.warn(
                f"no native operators: {error}. Install with --no-build-isolation beside torch to build them."
            )
            return
        # pybind11's own headers before those that torch bundles: torch 2.11.0's refuse the stable ABI.
        torch_flags = [f"-I{path}" for path in (pybind11.get_include(), *include_paths())]
        torch_flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-Wno-attributes"]
        jobs = [(source, "torch", torch_flags) for source in SOURCES]
        for name, (width, flags) in INSTRUCTION_SETS.items():
            # No psABI note: vectors never cross a compilation unit. GCC 12 warns of its own intrinsics.
            isa = [f"-DDSD_ISA={name}", f"-DDSD_VECTOR_BYTES={width}", "-Wno-psabi", *flags]
            isa += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"] if width == 64 else []
            jobs += [(source, name, isa) for source in KERNELS]
        nvcc = self.nvcc()
        if nvcc:
            torch_flags.append("-DDSD_CUDA")
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = list(pool.map(lambda job: self.compile(*job), jobs))
            if nvcc:
                objects += pool.map(lambda source: self.compile_cuda(nvcc, source), CUDA_KERNELS)
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=["torch_cpu", "c10", *(["cudart_static", "dl", "rt", "pthread"] if nvcc else [])],
            library_dirs=[*library_paths(), *(cuda_libraries(nvcc) if nvcc else [])],
            extra_postargs=EXTRA,
            target_lang="c++",
        )

    def nvcc(self):
        """nvcc where CUDA kernels can be built and used: beside a torch with CUDA."""
        import torch
        from torch.utils.cpp_extension import CUDA_HOME

        if torch.version.cuda is None or os.environ.get("DSDISTILL_CUDA") == "0":
            return None
        found = shutil.which("nvcc") or (CUDA_HOME and shutil.which("nvcc", path=f"{CUDA_HOME}/bin"))
        if not found:
            self.warn("no CUDA kernels: got no nvcc, expected it on the PATH or under CUDA_HOME")
        return found

    def compile_cuda(self, nvcc, source):
        target = Path(self.build_temp) / "cuda" / Path(source).with_suffix(".o")
        if not self.is_new(target, source):
            target.parent.mkdir(parents=True, exist_ok=True)
            self.spawn([nvcc, *CUDA_FLAGS, "-c", source, "-o", str(target)])
        return str(target)

    def is_new(self, target, source):
        """Whether an object is newer than its source, every header and this file."""
        if self.force or EXTRA or not target.exists():
            return False
        return all(
            Path(path).stat().st_mtime <= target.stat().st_mtime for path in (source, *HEADERS, __file__)
        )

    def compile(self, source, variant, flags):
        """One object; left alone when it is new."""
        folder = Path(self.build_temp) / variant
        target = folder / Path(source).with_suffix(".o")
        if self.is_new(target, source):
            return str(target)
        (built,) = self.compiler.compile(
            [source], str(folder), include_dirs=self.include_dirs, extra_postargs=[*FLAGS, *flags, *EXTRA]
        )
        return built


def cuda_libraries(nvcc):
    """Where nvcc itself would look for the CUDA runtime, and beside it, where the packages of an index put it."""
    said = subprocess.run(
        [nvcc, "--dryrun", "-o", os.devnull, *CUDA_KERNELS], capture_output=True, text=True
    ).stderr
    line = next((line for line in said.splitlines() if "LIBRARIES=" in line), "")
    return [*re.findall(r'-L"?([^" ]+)', line), str(Path(nvcc).parents[1] / "lib")]


native = Extension(
    "dsdistill._C", sources=[*SOURCES, *KERNELS], depends=[*HEADERS, *CUDA_KERNELS], optional=True
)
skip = os.environ.get("DSDISTILL_NATIVE") == "0" or sys.platform == "win32"
setup(ext_modules=[] if skip else [native], cmdclass={"build_ext": BuildNative})
