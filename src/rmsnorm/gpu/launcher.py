"""The only file that hands kernels which Triton compiled to the launcher in C++, and says when that serves a GPU.

A call of an operator in C++ (``csrc/gpu_ops.cpp``) goes to the driver from there. It comes here twice: the first call
on a device asks whether the kernels run there, and is served by Python, as all calls were; and a kernel that isn't
known yet is compiled by Triton, or found in its cache, from the key that C++ made of the arguments. What C++ doesn't
take comes to the operators ``_python_…``, which are those of ``route.py`` and ``serve.py``.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _form, _native
from . import route

DRIVER, TORCH = "libcuda.so.1", "libtorch_cuda.so"
PYTHON, TORCH_FIRST, OURS, TORCH_ALONE = range(4)
_HEAD = struct.Struct("=BBHid10i")
_NONE, _OPEN, _CLOSE, _MORE, _NUMBER, _INTEGER, _COUNT, _POINTER = 1, 2, 3, 4, 5, 8, 16, 128
_TYPES = {0: torch.uint8, 5: torch.float16, 6: torch.float32, 7: torch.float64, 15: torch.bfloat16}
_SIZES = {"constexpr": 0, "i32": 4, "i64": 8, "fp64": 8}
STEPS = ("", "unrounded", "gated", "gated, each", "silu", "sigmoid", "lean", "none", "each")
"""What the constants LOAD and STORE say, in the order of ``Step`` in csrc/gpu_steps.h."""
_FLAGS = frozenset({"LAYER", "FLOOR", "ROUND_FIRST", "LOOP", "ROWWISE", "INTERLEAVED", "WIDER", "E4M3", "NORM", "BACK"})

_device_type = "cuda"
_asked: set[torch.device] = set()
_kept: list[Any] = []  # kernels that C++ launches


class _Pointer:
    """What Triton asks an argument that is an address."""

    def __init__(self, dtype: torch.dtype, aligned: bool) -> None:
        self.dtype, self._address = dtype, 16 if aligned else 2

    def data_ptr(self) -> int:
        return self._address


def kernels() -> tuple[Any, ...]:
    """In the order of ``Kernel`` in csrc/launch.h."""
    from . import triton_backward, triton_forward, triton_heads, triton_quantised, triton_sandwich

    ahead = triton_forward.forward, triton_forward.add
    back = triton_backward.backward, triton_backward.wide_means, triton_backward.fold
    return *ahead, *back, triton_sandwich.sandwich, triton_quantised.quantised, triton_heads.turn


def tiles() -> list[int]:
    """The tables of ``launch.py`` and ``backward.py``, in the order of ``Tiles`` in csrc/launch.h."""
    from . import backward, launch

    per_way = launch.WIDEST, launch.LOOP_BLOCK, launch.TILE, launch.PER_WARP
    numbers: list[Any] = [value for table in per_way for value in table.values()]
    numbers += [launch.NARROW, launch.FEWEST_WARPS, launch.MOST_WARPS, backward.PARTIALS]
    numbers += [backward.FEWEST_STEPS, backward.STEPS, backward.GROUP_PARTIALS, backward.FOLD]
    return [one for value in numbers for one in (value if isinstance(value, tuple) else (value,))]


def load(key: bytes) -> bool:
    """Makes the kernel of a key known to C++: its handle, or that Triton has to launch it."""
    number, warps, device, count, offset, *values = _HEAD.unpack_from(key)
    kernel, kinds = kernels()[number], key[_HEAD.size : _HEAD.size + count]
    names = [param.name for param in kernel.params if param.is_constexpr]
    left = iter(values)
    constants = {name: offset if name == "OFFSET" else _constant(name, next(left)) for name in names}
    with route.on(torch.device(_device_type, device)):
        compiled = kernel.warmup(
            *_arguments(iter(kinds)), grid=(1,), **constants, num_warps=warps, enable_fp_fusion=False
        )
        try:
            compiled._init_handles()
        except RuntimeError as error:
            compiled._run = None  # or Triton would launch what has no handle
            if "captur" in str(error):  # Python meets the same, and says so; after the capture this is asked for again
                return False
            raise
        there = [kind for kind in kinds if kind not in (_OPEN, _CLOSE, _MORE)]
        sizes = _sizes(compiled, len(there))
        function = compiled.function if sizes is not None and _is_plain(compiled.metadata) else 0
        threads = 32 * compiled.metadata.num_warps
        _native.gpu_kernel(key, function, threads, compiled.metadata.shared, bytes(sizes or ()))
    _kept.append(compiled)
    return True


def _constant(name: str, value: int) -> Any:
    return STEPS[value] if name in ("LOAD", "STORE") else bool(value) if name in _FLAGS else value


def _arguments(kinds: Iterator[int]) -> list[Any]:
    """One for each kind, for which Triton compiles as for the real one."""
    from .steps import More

    found: list[Any] = []
    for kind in kinds:
        if kind == _CLOSE:
            break
        if kind >= _POINTER:
            found.append(_Pointer(_TYPES[(kind - _POINTER) // 2], bool(kind % 2)))
        elif kind in (_OPEN, _MORE):
            inner = _arguments(kinds)
            found.append(More(*inner) if kind == _MORE else tuple(inner))
        elif kind >= _COUNT:
            found.append(2**31 if kind > _COUNT else 2)
        elif kind >= _INTEGER:
            one, whole, wide = kind & 1, kind & 2, kind & 4
            found.append(1 if one else (2**31 if wide else 0) + (16 if whole else 3))
        else:
            found.append(None if kind == _NONE else 0.0)
    return found


def _sizes(compiled: Any, count: int) -> list[int] | None:
    """The bytes of each argument, by Triton's own signature: 0 of what is compiled into the kernel."""

    def flat(kinds: Any) -> Iterator[str]:
        for kind in kinds:
            yield from flat(kind) if isinstance(kind, tuple) else (kind,)

    kinds = list(flat(compiled.src.signature.values()))
    sizes = [8 if kind.startswith("*") else _SIZES.get(kind, -1) for kind in kinds[:count]]
    return None if min(sizes) < 0 or any(kind != "constexpr" for kind in kinds[count:]) else sizes


def _is_plain(metadata: Any) -> bool:
    """Whether nothing has to be done for a launch but to launch: no cluster, no scratch, no cooperation."""
    others = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")
    return getattr(metadata, "num_ctas", 1) == 1 and not any(getattr(metadata, name, 0) for name in others)


def _ask(device: torch.device) -> None:
    """Whether C++ serves a device from now on."""
    why_not, how = None, TORCH_ALONE
    if route.runs_triton(device):
        first = route.choice() == "torch"
        why_not = _native.gpu_open(DRIVER, TORCH, load, tiles())
        if why_not is None:
            how = TORCH_FIRST if first else OURS
        elif not first:
            how = PYTHON
    _native.gpu_serve(device.index or 0, how)
    _asked.add(device)
    if why_not is not None:
        warnings.warn(
            f"rmsnorm launches its GPU kernels through Python, which takes longer: {why_not}",
            RuntimeWarning,
            stacklevel=2,
        )


def _in_python(serving: Callable[..., Any]) -> Callable[..., Any]:
    """The operator for what C++ doesn't take, which tells C++ what it raises."""

    def operator(*arguments: Any) -> Any:
        with _native.telling():
            device = next(argument for argument in arguments if isinstance(argument, Tensor)).device
            if device not in _asked:
                _ask(device)
            return serving(*arguments)

    return operator


def available() -> bool:
    """Whether C++ can serve NVIDIA's GPUs here; ROCm stays with Triton's launcher."""
    return bool(_native.gpu_operators()) and torch.version.cuda is not None


def take_over(key: str, serving: dict[str, Callable[..., Any]], prefix: str = "") -> set[str]:
    """Serves a dispatch key by C++ from here on, with these operators behind it; returns the names of those that it
    has. With a prefix, its own have that in front of their names, and are defined here: for tests, on the CPU."""
    global _device_type
    _device_type = key.lower()
    names = _native.gpu_operators()
    for name in names:
        schema = str(getattr(torch.ops.rmsnorm, name).default._schema).partition("(")[2]
        if name in serving:
            if not hasattr(torch.ops.rmsnorm, f"_python_{name}"):
                _form.library.define(f"_python_{name}({schema}")
            _form.library.impl(f"_python_{name}", _in_python(serving[name]), key)
        if prefix:
            _form.library.define(f"{prefix}{name}({schema}")
    _native.gpu_register(key, prefix)
    return set(names)
