"""The only file that puts a stand-in in the place of NVIDIA's driver: for C++, and for Triton's own launcher.

CPU tensors take a GPU's way. The operators in C++ have ``_launched_`` in front of their names here, the same in Python
``_python_``, as always. Both compile through Triton, whose kernels get their handles from the stand-in, and both launch
there: Triton's launcher is its own C, compiled against it.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from rmsnorm import _native, _ops
from rmsnorm.gpu import launch, launcher, route, serve

SOURCE = Path(__file__).with_name("driver.c")
PREFIX = "_launched_"
TARGET = GPUTarget("cuda", 90, 32)
DEVICE = torch.device("cpu")


class _Function(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char * 128)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("function", ctypes.POINTER(_Function)),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_uint64),
        ("context", ctypes.c_uint64),
        ("parameters", ctypes.c_int),
        ("sizes", ctypes.c_int * 64),
        ("values", ctypes.c_uint64 * 64),
    ]


class Launched(NamedTuple):
    """A launch as the driver saw it; an argument is its bytes, as a number, and how many."""

    name: str
    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    context: int
    arguments: tuple[tuple[int, int], ...]


def built(folder: Path, *flags: str, name: str = "libcuda.so.1") -> Path:
    """The stand-in, compiled."""
    to = folder / name
    compiler = shutil.which("gcc") or "cc"
    command = [compiler, "-O2", "-shared", "-fPIC", f"-Wl,-soname,{name}", *flags, "-o", str(to), str(SOURCE)]
    subprocess.run(command, check=True, timeout=120)
    return to


class Driver(nvidia.CudaDriver):
    """Triton's, on a device that isn't there: the first of one."""

    def __init__(self, standin: StandIn) -> None:  # not super's, which asks torch for CUDA
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        self.get_current_device = lambda: 0
        self.get_device_capability = lambda device=None: (9, 0)
        self.set_current_device = lambda device: None
        self.get_current_stream = standin.stream_of

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_active_torch_device(self) -> torch.device:
        return DEVICE


class StandIn:
    """What there is of it in a process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = built(folder)
        self.library = ctypes.CDLL(str(self.path), mode=ctypes.RTLD_GLOBAL)
        self.library.standin_launch.restype = ctypes.POINTER(_Launch)
        self.library.standin_called.restype = ctypes.c_char_p
        for name in ("stream", "context"):
            getattr(self.library, f"standin_{name}").argtypes = [ctypes.c_uint64]
        self.context(0xC0)

    @functools.cached_property
    def driver(self) -> Driver:
        return Driver(self)

    def stream_of(self, device: int) -> int:
        stream = ctypes.c_uint64()
        self.library.aoti_torch_get_current_cuda_stream(device, ctypes.byref(stream))
        return stream.value

    def stream(self, number: int) -> None:
        self.library.standin_stream(number)

    def context(self, number: int) -> None:
        self.library.standin_context(number)

    def fail(self, code: int) -> None:
        self.library.standin_fail(code)

    def capture(self, how: int) -> None:
        """1: from here on a stream is captured; 2: by an older driver; 0: no longer."""
        self.library.standin_capture(how)

    def called(self) -> list[str]:
        """The driver's functions that were called since the last time."""
        return self.library.standin_called().decode().split()

    def launches(self) -> list[Launched]:
        """Those since the last time."""
        found = []
        for i in range(self.library.standin_count()):
            one = self.library.standin_launch(i).contents
            arguments = tuple(zip(one.values[: one.parameters], one.sizes[: one.parameters], strict=True))
            function = ctypes.cast(one.function, ctypes.c_void_p).value
            name = one.function.contents.name.decode()
            found.append(
                Launched(
                    name, function, tuple(one.grid), tuple(one.block), one.shared, one.stream, one.context, arguments
                )
            )
        self.library.standin_reset()
        return found


@functools.cache
def operators() -> list[str]:
    """The names of the operators that C++ has, which from here on there are for CPU tensors."""
    taken = launcher.take_over("CPU", serve.served(), PREFIX)
    return sorted(taken)


def in_cpp(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.rmsnorm, PREFIX + name).default._op


def in_python(name: str) -> Callable[..., Any]:
    return serve.served()[name]


@contextmanager
def standing_in(standin: StandIn, patch: Any, chosen: str = "triton") -> Iterator[StandIn]:
    """Inside, kernels are launched on the stand-in."""
    operators()
    patch.setenv("TRITON_LIBCUDA_PATH", str(standin.folder))
    patch.setenv("TRITON_CACHE_DIR", str(standin.folder / "cache"))
    patch.setattr(nvidia, "library_dirs", lambda: [nvidia.libdevice_dir, str(standin.folder)])
    patch.setattr(route, "runs_triton", lambda device: True)
    patch.setattr(route, "choice", lambda: chosen)
    patch.setattr(launcher, "DRIVER", str(standin.path))
    patch.setattr(launcher, "TORCH", str(standin.path))
    patch.setattr(launcher, "_asked", set())
    patch.setattr(launch, "_compiled", {})
    for kernel in launcher.kernels():
        kernel.device_caches.clear()
    before = driver._active
    driver.set_active(standin.driver)
    _native.gpu_forget()
    launcher._ask(DEVICE)
    standin.launches()
    try:
        yield standin
    finally:
        driver._active = before
        _native.gpu_serve(0, launcher.PYTHON)
        _native.gpu_forget()
        standin.fail(0), standin.stream(0x57), standin.context(0xC0), standin.capture(0)
        for kernel in launcher.kernels():
            kernel.device_caches.clear()


@contextmanager
def nothing_compiled(patch: Any) -> Iterator[None]:
    """Inside, Triton makes no code of a kernel, but all else of it: signature, constants, handle and launcher. Its
    image says the bytes of each parameter, by Triton's signature, and of the two that Triton adds; shared memory is
    made up from the name of the kernel, so that no two are alike."""
    sizes = {"i32": 4, "i64": 8, "fp64": 8}

    def flat(kinds: Any) -> Iterator[str]:
        for kind in kinds:
            yield from flat(kind) if isinstance(kind, tuple) else (kind,)

    def compile(source: Any, target: Any = None, options: Any = None, **_: Any) -> Any:
        kinds = [kind for kind in flat(source.signature.values()) if kind != "constexpr"]
        image = [8 if kind.startswith("*") else sizes[kind] for kind in kinds] + [8, 8]
        metadata = {
            "name": source.name,
            "target": {"backend": "cuda", "arch": 90, "warp_size": 32},
            "num_warps": options["num_warps"],
            "num_ctas": 1,
            "shared": 16 * (1 + sum(source.name.encode()) % 64),
            "tmem_size": None,
            "global_scratch_size": 0,
            "global_scratch_align": 1,
            "profile_scratch_size": 0,
            "profile_scratch_align": 1,
            "launch_cooperative_grid": False,
            "launch_pdl": False,
        }
        (code := Path(folder, "kernel.cubin")).write_bytes(b"STANDIN" + bytes([len(image), *image]))
        (facts := Path(folder, "kernel.json")).write_text(json.dumps(metadata))
        files = {"kernel.cubin": str(code), "kernel.json": str(facts)}
        return triton.compiler.CompiledKernel(source, files, "")  # which reads them now

    patch.setattr(triton.compiler, "compile", compile)
    with tempfile.TemporaryDirectory() as folder:
        yield


class Told(NamedTuple):
    """What launches have in common that were asked for with other results."""

    launches: list[Launched]
    """With what an address means in its place: of an input, or in the launch the how-manieth that isn't; what is
    folded, where it was last."""
    places: list[list[tuple[int, int]]]
    """Of each result, in which launches it was, and as which argument; not as what is folded, as a later result may lie
    where that lay."""


def told(launches: list[Launched], given: list[Tensor], results: list[Tensor]) -> Told:
    inputs = {t.data_ptr(): f"input {i}" for i, t in enumerate(given)} | {0: "nothing"}
    found, seen, folded = [], {}, set()
    for number, one in enumerate(launches):
        names = dict(inputs)
        arguments: list[Any] = []
        for place, (value, size) in enumerate(one.arguments):
            if size == 8 and (value == 0 or 2**32 <= value < 2**48):  # no double and no count here looks like that
                before = f" of {seen[value]}" if one.name == "fold" and place == 0 else ""
                if before:
                    folded |= {(number, place), seen[value]}
                arguments.append(names.setdefault(value, f"room {len(names)}{before}"))
                seen[value] = number, place
            else:
                arguments.append((value, size))
        found.append(one._replace(arguments=tuple(arguments)))
    places = [
        [
            (number, place)
            for number, one in enumerate(launches)
            for place, argument in enumerate(one.arguments)
            if argument == (result.data_ptr(), 8) and result.numel() and (number, place) not in folded
        ]
        for result in results
    ]
    return Told(found, places)


def same(driver, name: str, arguments: tuple, placed: bool = True) -> list:
    """The launches, which Triton and C++ have to agree upon, and upon where the results are in them. ``placed`` is
    False where a result may lie where a copy lay that lived for the first launches alone.

    A result may also lie where a sum over rows lay, if that is freed before: in one of three tries, in memory of their
    own, none does.
    """
    given, kept = [t for t in arguments if isinstance(t, Tensor)], []
    for _ in range(3):
        found = []
        for operator in (in_python(name), in_cpp(name)):
            driver.launches()
            results = operator(*arguments)
            results = [results] if isinstance(results, Tensor) else list(results or ())
            found.append((told(driver.launches(), given, results), results))
        (theirs, before), (ours, after) = found
        kept.append(found)
        assert ours.launches == theirs.launches, name
        if ours.places == theirs.places or not placed:
            break
    assert ours.places == theirs.places or not placed, name
    for one, two in zip(before, after, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (two.shape, two.dtype, two.stride()), name
    return ours.launches


def framed(call):
    """How many frames of the package a call enters, and what it returns."""
    entered = []
    home = os.path.dirname(_ops.__file__)
    sys.setprofile(lambda frame, event, _: entered.append(1) if frame.f_code.co_filename.startswith(home) else None)
    try:
        result = call()
    finally:
        sys.setprofile(None)
    return len(entered), result
