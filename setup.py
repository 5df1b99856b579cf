"""Build of dsdistill's native operators; everything else lives in pyproject.toml.

The extension uses torch's stable ABI: one build runs under every torch from 2.11 on. Kernels are compiled once
for each instruction set and the best one is chosen at run time. Without torch or a working C++ compiler the
package installs all the same, with operators in plain PyTorch; DSDISTILL_NATIVE=0 skips the build.
"""

import os
import platform
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

KERNELS = sorted(map(str, Path("csrc").glob("*/cpu.cpp")))
SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp") if path.name != "cpu.cpp")
HEADERS = sorted(map(str, Path("csrc").rglob("*.h")))
FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-ffp-contract=fast", "-fno-math-errno"]
FLAGS += ["-DDSD_X86"] if X86 else []
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
        torch_flags = [*(f"-I{path}" for path in (*include_paths(), pybind11.get_include()))]
        torch_flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-Wno-attributes"]
        jobs = [(source, "torch", torch_flags) for source in SOURCES]
        for name, (width, flags) in INSTRUCTION_SETS.items():
            # No psABI note: vectors never cross a compilation unit.
            isa = [f"-DDSD_ISA={name}", f"-DDSD_VECTOR_BYTES={width}", "-Wno-psabi", *flags]
            jobs += [(source, name, isa) for source in KERNELS]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = list(pool.map(lambda job: self.compile(*job), jobs))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=["torch_cpu", "c10"] if sys.platform != "win32" else [],
            library_dirs=library_paths(),
            extra_postargs=EXTRA,
            target_lang="c++",
        )

    def compile(self, source, variant, flags):
        """One object; left alone when it is newer than its source, every header and this file."""
        folder = Path(self.build_temp) / variant
        target = folder / Path(source).with_suffix(".o")
        inputs = [source, *HEADERS, __file__]
        if not self.force and not EXTRA and target.exists():
            built = target.stat().st_mtime
            if all(Path(path).stat().st_mtime <= built for path in inputs):
                return str(target)
        (built,) = self.compiler.compile(
            [source], str(folder), include_dirs=self.include_dirs, extra_postargs=[*FLAGS, *flags, *EXTRA]
        )
        return built


native = Extension("dsdistill._C", sources=[*SOURCES, *KERNELS], depends=HEADERS, optional=True)
skip = os.environ.get("DSDISTILL_NATIVE") == "0" or sys.platform == "win32"
setup(ext_modules=[] if skip else [native], cmdclass={"build_ext": BuildNative})
