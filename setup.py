"""Builds librmsnorm.so: the torch boundary once, and the kernels once per CPU target, each with its own flags.

The library has no Python symbols and uses only torch's stable ABI, so one wheel serves every Python and every
torch from 2.10 on. Without a compiler, with one that fails, and on Windows it is left out with one line that says why,
so that a pure-Python install still works; RMSNORM_BUILD_NATIVE=0 leaves it out on purpose, and =1 makes that an error.

For another machine (packaging/wheels.py): CXX is a compiler for it, with flags; LDFLAGS as always; RMSNORM_TORCH a
folder with its torch's include/ and lib/; _PYTHON_HOST_PLATFORM its name, as Python's own cross builds have it.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_platform

from setuptools import Extension, setup
from setuptools import __version__ as setuptools_version
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ModuleNotFoundError:  # before setuptools 70.1 it was in the package wheel, which pip asks for then
    from wheel.bdist_wheel import bdist_wheel

WANTED = os.environ.get("RMSNORM_BUILD_NATIVE", "")
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
LINK_FLAGS = shlex.split(os.environ.get("LDFLAGS", ""))
SYSTEM = "macos" if get_platform().startswith("macosx") else get_platform().partition("-")[0]  # linux, win
MACHINE = next((name for name in ("x86_64", "aarch64", "arm64") if get_platform().endswith(name)), platform.machine())

# -ffp-contract=off is part of the numerics contract: a multiply-add is fused where the source says so, nowhere else.
# gcc 12 takes the deliberately undefined operands inside its own AVX-512 intrinsics for uninitialised variables.
KERNEL_FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
KERNEL_FLAGS += ["-Wno-ignored-attributes", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# Passes that take time and leave kernels written in vectors as they were. (-fno-tree-pre saves as much, but gradients
# that go past the caches then take 4 to 6 % longer.)
KERNEL_FLAGS += ["-fno-gcse", "-fno-tree-vectorize", "-fno-tree-slp-vectorize", "-fno-unswitch-loops"]
# A ninth of a build's time, for 1 % more code; jumps that aren't aligned are 25 KB less.
KERNEL_FLAGS += ["-fno-tree-ccp", "-fno-tree-vrp", "-fno-align-jumps"]
# Two more: 0.09 MB of code less. (Without -fmove-loop-invariants less again, but bf16 takes 1.07 of the time forward,
# AVX2's 1.09, in L2 to 1.2: its constants are read in the loop.)
KERNEL_FLAGS += ["-fno-split-loops", "-fno-ivopts"]
# Nothing is thrown through them: 0.1 MB.
KERNEL_FLAGS += ["-fno-exceptions", "-fno-asynchronous-unwind-tables"]
# The compiler collects garbage from half a gigabyte on, not each time that it holds twice as much: a twelfth of the
# time of the units that never do. The largest hold 1.3 GB, as they did.
GARBAGE = "--param=ggc-min-heapsize=500000"
# What clang doesn't know, or takes for unknown.
NOT_CLANGS = {"-fno-gcse", "-fno-unswitch-loops", "-fno-tree-pta", "-Wno-maybe-uninitialized"}
NOT_CLANGS |= {"-fno-tree-ccp", "-fno-tree-vrp", "-fno-align-jumps", "-fpeel-loops"}
NOT_CLANGS |= {"-fno-split-loops", "-fno-ivopts", GARBAGE}
# What stands between Python and the norm that everybody calls: for speed. The other operators are compiled for size.
EVERYDAY = ("everyday_ops", "ops", "layer_ops", "aten", "graph_ops", "handed_ops", "straight_ops")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512BF16 = [*AVX512, "-mavx512bf16", "-mavx512vnni"]  # no CPU has the first without the other
# The baseline is the portable one, for CPUs before 2013: -Os, as -O1 makes 1.3 times the code for 0.9 to 1.2 of the
# speed (backward; 1.3 in fp64), and -O3 four times. AArch64's is no emulation, and less than -O2 would leave sums in
# memory: 79 instructions for the squares of 32 columns of fp32, not 43.
BASELINE = {"baseline": ["-fno-tree-pta"] if MACHINE in ("aarch64", "arm64") else ["-Os", "-fno-tree-pta"]}
TARGETS = BASELINE
if MACHINE == "x86_64":  # the longest to compile first, or one core waits for another at the end
    TARGETS = {"avx2": [*AVX2, "-fno-tree-pta"], "avx512": AVX512, **BASELINE, "avx512bf16": AVX512BF16}
# Rows of fp64 are units of their own, lent to their target. AVX2's are smaller by a fifth so, for 1.00 to 1.08 of the
# time (backward with a gate 1.2); AVX-512's would be larger.
FP64 = {"avx2": ["-O2", "-fpeel-loops"]}


def kernel_units() -> list[tuple[str, list[str]]]:
    """Names and flags of what is compiled from csrc/target.cpp: for each target most types of rows, and fp64.

    avx512bf16 differs from avx512 in how it rounds to bf16 alone, and borrows all else.
    """
    units, fp64 = [], []
    for name, flags in TARGETS.items():
        types, lender = ("bf16",), "avx512"
        if name != "avx512bf16":
            types, lender = ("f32", "bf16", "f16"), f"{name}_f64"
            lent = ["-DRMSNORM_TYPES=Type::f64", f"-DRMSNORM_LENDS=lent_{lender}"]
            fp64.append((lender, [*KERNEL_FLAGS, *flags, *FP64.get(name, []), *lent]))
        define = [f"-DRMSNORM_TARGET=target_{name}", f'-DRMSNORM_TARGET_NAME="{name}"']
        define.append("-DRMSNORM_TYPES=" + ", ".join(f"Type::{kind}" for kind in types))
        define += [f"-DRMSNORM_LENDER=lent_{lender}", f"-DRMSNORM_LENDS=lent_{name}"]
        units.append((name, [*KERNEL_FLAGS, *flags, *define]))
    return [*units, *fp64]


def link_flags(torch: Path) -> list[str]:
    """Every symbol must be found: in torch's libraries, which are loaded before ours, or the system's."""
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    if SYSTEM == "macos":  # where an undefined symbol is an error by itself, and libraries are found by their path
        return ["-shared", *libraries, "-Wl,-rpath,@loader_path/../torch/lib"]
    # Stripped: 0.25 MB of names that nobody can call. Only weak symbols of libc10 are wanted (raise.h), which don't
    # count where --as-needed is the compiler's habit.
    return ["-shared", "-s", "-Wl,--no-undefined,--no-as-needed", *libraries]


def is_clang() -> bool:
    """Whether the compiler is one; says which is missing if there is none."""
    if SYSTEM == "win":
        raise OSError("there are no kernels for Windows: they need g++ 12 or clang, and torch there is of another ABI")
    if shutil.which(COMPILER[0]) is None:
        raise FileNotFoundError(
            f"no C++ compiler: {COMPILER[0]!r} isn't there (apt-get install g++; xcode-select --install; or set CXX)"
        )
    said = subprocess.run([*COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search("clang", said) is not None


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))  # no Python version in the name

    def build_extension(self, ext: Extension) -> None:
        clang, build = is_clang(), Path(self.build_temp)
        torch = find_spec("torch")  # found, not imported, which takes two seconds; only a native build needs it
        if (torch is None or torch.origin is None) and "RMSNORM_TORCH" not in os.environ:
            raise ModuleNotFoundError("torch is not installed: pip install torch==2.13.0")
        root = Path(os.environ.get("RMSNORM_TORCH") or Path(torch.origin).parent)
        build.mkdir(parents=True, exist_ok=True)
        common = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-g0", GARBAGE]
        boundary = [*common, "-O2", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(root / "include")]
        units = [("csrc/target.cpp", f"target_{name}.o", [*common, *flags]) for name, flags in kernel_units()]
        # What faces torch, in two units of several files: each reads torch's headers once, which is half of the time.
        facing_torch = [Path("csrc/aten.cpp"), Path("csrc/gpu_launches.cpp"), *sorted(Path("csrc").glob("*ops.cpp"))]
        groups: dict[str, list[Path]] = {"everyday": [], "forms": []}
        for source in facing_torch:
            groups["everyday" if source.stem in EVERYDAY else "forms"].append(source)
        # Operators do nothing but call: at -O2 they are twice the code, for 0.1 µs of a call's 3 (a GPU's) or 5.
        small = ["-Os" if flag == "-O2" else flag for flag in boundary]
        for group, (*before, last) in groups.items():
            included = [flag for source in before for flag in ("-include", str(source))]
            flags = boundary if group == "everyday" else small
            units.append((str(last), f"{group}_ops.o", [*flags, *included]))
        units += [(f"csrc/{name}.cpp", f"{name}.o", [*common, "-O2"]) for name in ("dispatch", "launch", "older")]

        def compile_unit(unit: tuple[str, str, list[str]]) -> str:
            source, target, flags = unit
            if clang:
                flags = [flag for flag in flags if flag not in NOT_CLANGS]
            self.spawn([*COMPILER, *flags, "-c", source, "-o", str(build / target)])
            return str(build / target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_unit, units))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        self.spawn([*COMPILER, *objects, *link_flags(root), *LINK_FLAGS, "-o", f"{output}.tmp"])
        os.replace(f"{output}.tmp", output)

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if WANTED == "1":
                raise
            print(f"rmsnorm: the native library was NOT built, pure Python is installed: {error}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


KERNELS = Extension("rmsnorm.librmsnorm", sources=["csrc/ops.cpp"], depends=sorted(map(str, Path("csrc").iterdir())))
LICENSE = "license" if int(setuptools_version.partition(".")[0]) < 77 else "license_expression"
setup(
    **{LICENSE: "Apache-2.0"},
    ext_modules=[] if WANTED == "0" else [KERNELS],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
