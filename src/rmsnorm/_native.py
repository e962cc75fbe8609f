"""The only file that loads the C++ library, and the only one that knows why it is missing.

Environment: ``RMSNORM_NATIVE=0`` leaves the library out; ``RMSNORM_CPU_TARGET`` (``avx512``, ``avx2``,
``baseline``) chooses the kernels instead of the best that this CPU has.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("librmsnorm.so")
KNOWN_TARGETS = ("avx512", "avx2", "baseline")

_LOADER = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int64)
_loader: Any = None  # what C++ holds
_library: Any = None  # a ctypes.CDLL, once it is loaded
_why_not: str | None = "it was not loaded yet"
_warned = False


def load() -> None:
    """Loads the library, or remembers why it can't be. A forced CPU target that can't be had is an error."""
    global _library, _why_not
    target = os.environ.get("RMSNORM_CPU_TARGET", "")
    if target and target not in KNOWN_TARGETS:
        raise ValueError(
            f"RMSNORM_CPU_TARGET={target!r} is not a CPU target: choose one of {', '.join(KNOWN_TARGETS)}, or unset it"
        )
    if os.environ.get("RMSNORM_NATIVE", "1") == "0":
        _why_not = "RMSNORM_NATIVE=0 turned it off"
    elif not LIBRARY.exists():
        _why_not = _why_not_built(sys.platform, platform.machine())
    else:
        try:
            torch.ops.load_library(LIBRARY)
            _library, _why_not = ctypes.CDLL(str(LIBRARY)), None
        except OSError as error:
            _why_not = f"{LIBRARY.name} could not be loaded into torch {torch.__version__}: {error}"
    if _library is not None:
        for name, kinds in _FUNCTIONS.items():
            function = getattr(_library, f"rmsnorm_{name}")
            function.argtypes, function.restype = kinds[1:], kinds[0]
        if target:
            set_cpu_target(target)


# Functions that the launcher asks for, in the order of Driver in csrc/launch.cpp: of the driver, and of torch.
_DRIVERS = ("cuLaunchKernel", "cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuGetErrorString")
_TORCHS = ("aoti_torch_get_current_cuda_stream",)
# The library's functions: what each returns, and takes.
_TEXT, _INT, _POINTER = ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("cpu_target", "cpu_targets", "gpu_operators"), (_TEXT,)),
    "set_cpu_target": (ctypes.c_bool, _TEXT),
    "install": (_TEXT, ctypes.c_bool),
    "failed": (None, _TEXT, _TEXT),
    "set_cache_bytes": (None, ctypes.c_int, _INT),
    **dict.fromkeys(("large_bytes", "local_bytes"), (_INT,)),
    "cache_bytes": (_INT, ctypes.c_int),
    "contract": (None, _TEXT, _INT),
    "handed": (_POINTER, _POINTER, ctypes.POINTER(_POINTER), _INT),
    "straight": (_POINTER, _TEXT, _TEXT, _INT, ctypes.POINTER(_POINTER)),
    "gpu_open": (None, ctypes.POINTER(_POINTER)),
    "gpu_loader": (None, _LOADER),
    "gpu_tiles": (None, ctypes.POINTER(_INT), _INT),
    "gpu_serve": (None, ctypes.c_int, ctypes.c_int),
    "gpu_kernel": (None, _TEXT, ctypes.c_uint64, ctypes.c_int, ctypes.c_int, _TEXT, _INT),
    "gpu_forget": (None,),
    "gpu_register": (_TEXT, _TEXT, _TEXT),
}


def _why_not_built(system: str, machine: str) -> str:
    """Why a package has no library, on what ``sys.platform`` and ``platform.machine()`` call this platform."""
    if system == "win32":
        return "there are no native kernels for Windows (they are written for g++ and clang); WSL runs those for Linux"
    wheels = {"linux": ("x86_64", "aarch64"), "darwin": ("arm64",)}
    if machine not in wheels.get(system, ()):
        return (
            f"no wheel of rmsnorm is made for {system} on {machine}, and {LIBRARY.name} was not built when the package "
            "was installed; they are portable: install g++ 12 or newer, or clang, then reinstall it with --no-cache-dir"
        )
    return (
        f"{LIBRARY.name} was not built when the package was installed: it needs a C++20 compiler "
        "(g++ 12 or newer, or clang); install one, then reinstall rmsnorm, with pip's --no-cache-dir"
    )


def why_not() -> str | None:
    """The reason why the native library is not in use, or None."""
    return _why_not


def cpu_target() -> str | None:
    """The name of the kernels in use, with the extension they use for bf16 if there is one."""
    return _library.rmsnorm_cpu_target().decode() if _library else None


def cpu_targets() -> list[str]:
    """The targets that were built and that this CPU can run, best first."""
    return _library.rmsnorm_cpu_targets().decode().split() if _library else []


def set_cpu_target(name: str) -> None:
    """Uses the kernels of the named target from now on, in every thread."""
    if _library is None or not _library.rmsnorm_set_cpu_target(name.encode()):
        raise RuntimeError(
            f"CPU target {name!r} can't run here: this CPU and this build have {', '.join(cpu_targets()) or 'none'}"
        )


def contract() -> str | None:
    """What decides the bits of the kernels in use, in words (csrc/contract.h)."""
    if _library is None:
        return None
    text = ctypes.create_string_buffer(1024)
    _library.rmsnorm_contract(text, len(text))
    return text.value.decode()


def large_bytes() -> int:
    """From how many bytes on an output goes past the caches, in huge pages if it is fresh (csrc/memory.h)."""
    return _library.rmsnorm_large_bytes() if _library else 0


def cache_bytes() -> list[int]:
    """What the kernels take for a core's first cache, its second, and the last (csrc/memory.h)."""
    return [_library.rmsnorm_cache_bytes(level) for level in (1, 2, 3)] if _library else []


def set_cache_bytes(level: int, count: int) -> None:
    """Sets the second or the last, in every thread. For the tests: with a last of 1 every output is large."""
    _library.rmsnorm_set_cache_bytes(level, count)


def publish(name: str) -> bool:
    """Whether the library has such a function, which code that is loaded from now on then finds by its name."""
    if _library is None or not hasattr(_library, name):
        return False
    ctypes.CDLL(str(LIBRARY), mode=ctypes.RTLD_GLOBAL)
    return True


def fill_slot(on: bool) -> str | None:
    """Puts the kernels into the CPU slot of torch's own operator, or takes them out; returns what went wrong."""
    return error.decode() if (error := _library.rmsnorm_install(on)) else None


def ask(name: str, *given: Any) -> Any:
    """What a function of the library answers, or None without it."""
    return getattr(_library, f"rmsnorm_{name}")(*given) if _library else None


@contextmanager
def telling() -> Iterator[None]:
    """Tells the C++ that called this code what goes wrong in it, for it to raise: torch's stable ABI says no more than
    that something did."""
    try:
        yield
    except Exception as error:
        if _library is not None:
            kinds = (NotImplementedError, ValueError, TypeError, torch.OutOfMemoryError)
            kind = next((kind.__name__ for kind in kinds if isinstance(error, kind)), "RuntimeError")
            _library.rmsnorm_failed(kind.encode(), str(error).encode())
        raise


def gpu_operators() -> list[str]:
    """The operators that C++ has for a GPU."""
    return _library.rmsnorm_gpu_operators().decode().split() if _library else []


def gpu_register(key: str, prefix: str) -> None:
    """Serves them for a dispatch key from here on, each under its name with a prefix."""
    if error := _library.rmsnorm_gpu_register(key.encode(), prefix.encode()):
        raise RuntimeError(error.decode())


def gpu_open(cuda: str, torch_cuda: str, loader: Callable[[bytes], bool], tiles: Sequence[int]) -> str | None:
    """Finds the driver, or says what is missing. The loader gets the key of a kernel that isn't known; one for which it
    raises is Triton's to launch from then on, through Python, which meets the same and says so. While a stream is
    captured it loads as torch's allocator gets memory, in relaxed mode, if the driver is CUDA 12.3's or later."""
    global _loader
    functions: list[int | None] = []
    for path, names in ((cuda, _DRIVERS), (torch_cuda, _TORCHS)):
        try:
            found = ctypes.CDLL(path)
            functions += [ctypes.cast(getattr(found, name), ctypes.c_void_p).value for name in names]
            exchange = ctypes.CDLL(cuda).cuThreadExchangeStreamCaptureMode
        except (OSError, AttributeError) as error:
            return str(error)
    _library.rmsnorm_gpu_open((ctypes.c_void_p * len(functions))(*functions))

    def load(key: int, size: int) -> bool:
        name, mode = ctypes.string_at(key, size), ctypes.byref(ctypes.c_int(2))  # CU_STREAM_CAPTURE_MODE_RELAXED
        exchange(mode)
        try:
            return loader(name)
        except Exception:
            gpu_kernel(name, 0, 0, 0, b"")
            return False
        finally:
            exchange(mode)

    _loader = _LOADER(load)
    _library.rmsnorm_gpu_loader(_loader)
    _library.rmsnorm_gpu_tiles((ctypes.c_int64 * len(tiles))(*tiles), len(tiles))  # as Tiles in csrc/launch.h
    return None


def gpu_serve(device: int, how: int) -> None:
    """Who serves a device: 0, Python; 1, torch what it can, and C++ the rest; 2, C++; 3, torch, and Python the rest."""
    _library.rmsnorm_gpu_serve(device, how)


def gpu_kernel(key: bytes, function: int, threads: int, shared: int, sizes: bytes) -> None:
    """Makes a kernel known, with the bytes of each argument; function 0 is one that Triton launches itself."""
    _library.rmsnorm_gpu_kernel(key, function, threads, shared, sizes, len(sizes))


def gpu_forget() -> None:
    """Forgets all kernels, for the tests."""
    _library.rmsnorm_gpu_forget()


def warn_if_missing(input: Tensor) -> None:
    """Says once, when the first CPU tensor takes the slow path, why it does. Silent where the user asked for it."""
    global _warned
    if _warned or _why_not is None or input.device.type != "cpu" or os.environ.get("RMSNORM_NATIVE") == "0":
        return
    _warned = True
    warnings.warn(
        f"rmsnorm runs without its native CPU kernels, several times slower: {_why_not}",
        RuntimeWarning,
        stacklevel=2 if sys.version_info < (3, 12) else 3,
    )
