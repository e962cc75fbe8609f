"""Builds librmsnorm.so: the torch boundary once, and the kernels once per CPU target, each with its own flags.

The library has no Python symbols and uses only torch's stable ABI, so one wheel serves every Python and every
torch from 2.10 on. A failing compiler leaves it out with a warning, so that a pure-Python install still works;
RMSNORM_BUILD_NATIVE=0 leaves it out on purpose, and =1 makes a failure an error.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

WANTED = os.environ.get("RMSNORM_BUILD_NATIVE", "")

# -ffp-contract=off is part of the numerics contract: a multiply-add is fused where the source says so, nowhere else.
# gcc 12 takes the deliberately undefined operands inside its own AVX-512 intrinsics for uninitialised variables.
KERNEL_FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
KERNEL_FLAGS += ["-Wno-ignored-attributes", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# Passes that take time and leave kernels written in vectors as they were. (-fno-tree-pre saves as much, but gradients
# that go past the caches then take 4 to 6 % longer.)
KERNEL_FLAGS += ["-fno-gcse", "-fno-tree-vectorize"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# The baseline is the portable one: -O1, as -O2 takes twice as long to compile its emulated operations for the same
# speed, and -O3 unrolls them into four times the code.
TARGETS = {"baseline": ["-O1", "-fno-tree-pta"]}
if platform.machine() in ("x86_64", "AMD64"):
    TARGETS |= {"avx2": [*AVX2, "-fno-tree-pta"], "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))  # no Python version in the name

    def build_extension(self, ext: Extension) -> None:
        torch = find_spec("torch")  # found, not imported, which takes two seconds; only a native build needs it
        if torch is None or torch.origin is None:
            raise ModuleNotFoundError("torch is not installed: pip install torch==2.13.0")
        root, build = Path(torch.origin).parent, Path(self.build_temp)
        build.mkdir(parents=True, exist_ok=True)
        common = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-g0"]
        boundary = [*common, "-O2", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(root / "include")]
        units = []  # the longest first, or one core waits for another at the end
        for name, flags in TARGETS.items():
            define = [f"-DRMSNORM_TARGET=target_{name}", f'-DRMSNORM_TARGET_NAME="{name}"']
            if name == "avx512bf16":
                define.append("-DRMSNORM_LENDER=target_avx512")
            units.append(("csrc/target.cpp", f"target_{name}.o", [*common, *define, *KERNEL_FLAGS, *flags]))
        units += [(f"csrc/{name}.cpp", f"{name}.o", boundary) for name in ("ops", "gated_ops", "layer_ops", "aten")]
        units.append(("csrc/dispatch.cpp", "dispatch.o", [*common, "-O2"]))
        compiler = os.environ.get("CXX", "c++")

        def compile_unit(unit: tuple[str, str, list[str]]) -> str:
            source, target, flags = unit
            self.spawn([compiler, *flags, "-c", source, "-o", str(build / target)])
            return str(build / target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_unit, units))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        link = ["-shared", "-Wl,--no-undefined", f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        self.spawn([compiler, *objects, *link, "-o", f"{output}.tmp"])
        os.replace(f"{output}.tmp", output)

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if WANTED == "1":
                raise
            print(f"rmsnorm: the native library was NOT built: {error}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[] if WANTED == "0" else [Extension("rmsnorm.librmsnorm", sources=["csrc/ops.cpp"])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
