"""Compiles the kernels for GPUs that aren't there, with the very arguments of a launch, and reads what came out.

    python tests/gpu/offline.py        writes the tables of docs/gpu.md

``ptxas`` and ``cuobjdump`` are those in Triton's wheel; AMD's figures are in the assembly's own metadata.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from rmsnorm.bench.pages import replace_block
from rmsnorm.gpu import (
    backward,
    forms,
    general,
    heads,
    launch,
    neighbours,
    triton_backward,
    triton_forward,
    triton_heads,
    triton_quantised,
    triton_sandwich,
)

ROOT = Path(__file__).parents[2]
TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 90, 100, 120)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}
WIDTHS = (1024, 2048, 4096, 8192, 16384, 32768)
DTYPES = (torch.bfloat16, torch.float32)
# One thread's accesses, by the bytes of each.
_NVIDIA = re.compile(r"\b(ld|st)\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.b(\d+)\b")
_AMD = re.compile(r"\b(?:buffer|global)_(load|store)_(dwordx4|dwordx2|dword|short|ushort)\w*")
_AMD_BYTES = {"dwordx4": 16, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2}


class _Absent(DriverBase):
    """A device that can be compiled for and not run on."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> None:
        return None


@dataclass(frozen=True)
class Compiled:
    kernel: str
    constants: dict[str, Any]
    threads: int
    registers: int
    spills: int
    """Bytes of a thread's local memory; on AMD, spilled registers."""
    loads: tuple[int, ...]
    """The bytes of each load from global memory in the code of one thread, and below, of each store."""
    stores: tuple[int, ...]
    assembly: str


@contextmanager
def compiling(target: GPUTarget, monkeypatch: Any) -> Iterator[list[Compiled]]:
    """Inside, what launches is compiled for the target instead, and collected."""
    found: list[Compiled] = []
    threads_of = target.warp_size

    def collect(kernel: Any, grid: Any, arguments: Any, constants: dict[str, Any], warps: int) -> None:
        warps = min(warps, 1024 // threads_of)  # as launch.py's MOST_WARPS says where it runs
        options = {"num_warps": warps, "enable_fp_fusion": False}
        one = kernel.warmup(*arguments, grid=grid, **constants, **options)
        found.append(_read(kernel.__name__, constants, warps * threads_of, one.asm))

    monkeypatch.setattr(launch, "_launch", collect)
    for kernel in (
        triton_forward.forward,
        triton_forward.add,
        triton_backward.backward,
        triton_backward.wide_means,
        triton_backward.fold,
        triton_heads.turn,
        triton_quantised.quantised,
        triton_sandwich.sandwich,
    ):
        kernel.device_caches.clear()
    with tempfile.TemporaryDirectory() as cache:
        monkeypatch.setenv("TRITON_CACHE_DIR", cache)
        before = driver._active
        driver.set_active(_Absent(target))
        try:
            yield found
        finally:
            driver._active = before


def _read(kernel: str, constants: dict[str, Any], threads: int, asm: dict[str, Any]) -> Compiled:
    if "cubin" in asm:
        text = asm["ptx"]
        accesses = [(kind, int(count or 1) * int(bits) // 8) for kind, count, bits in _NVIDIA.findall(text)]
        with tempfile.TemporaryDirectory() as folder:
            (file := Path(folder, "cubin")).write_bytes(asm["cubin"])
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            usage = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True)
        registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout).groups()
        spills = int(stack) + int(local)
    else:
        text = asm["amdgcn"]
        accesses = [(kind[:2], _AMD_BYTES[size]) for kind, size in _AMD.findall(text)]
        registers, *spilled = (
            int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
            for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
        )
        spills = sum(spilled)
    loads = tuple(size for kind, size in accesses if kind in ("ld", "lo"))
    stores = tuple(size for kind, size in accesses if kind == "st")
    return Compiled(kernel, constants, threads, int(registers), spills, loads, stores, text)


def launch_all(columns: int, dtype: torch.dtype) -> None:
    """Forward with 1/rms, add + norm, and backward, of aligned rows."""
    x, weight = torch.zeros(64, columns, dtype=dtype), torch.zeros(columns, dtype=dtype)
    _, _, rstd = launch.forward(x, None, weight, 1, 1e-5, 0.0, False, True)
    launch.forward(x, x, weight, 1, 1e-5, 0.0, False, False)
    backward.backward(x, None, x, rstd, weight, 1, 1e-5, 0.0, True, True)


def launch_forms(columns: int, dtype: torch.dtype) -> None:
    """The sandwich, norm + add, and the quantised norm, of aligned rows."""
    x, weight = torch.zeros(64, columns, dtype=dtype), torch.zeros(columns, dtype=dtype)
    forms.sandwich_rms_norm(True, x, x, weight, weight, 1, 1e-5, 0.0, False, None)
    forms.rms_norm_add(True, x, x, weight, 1, 1e-5, 0.0, True)
    for residual, e4m3 in ((None, False), (x, True)) if dtype is not torch.float64 else []:
        forms.quantised_rms_norm(False, x, residual, None, weight, 1, 1e-5, 0.0, False, True, True, e4m3)


def launch_neighbours(columns: int, dtype: torch.dtype) -> None:
    """Gated, modulated, general and lean, forward and backward, of aligned rows."""
    x, weight = torch.zeros(64, columns, dtype=dtype).view(4, 16, columns), torch.zeros(columns, dtype=dtype)
    rstd = torch.ones(4, 16, 1, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    shared, norm, all = x[:, :1], (1, 1e-5, 0.0), [True] * 6
    for behind, silu in ((True, True), (False, False)):
        neighbours.gated_rms_norm(True, x, x, weight, *norm, behind, behind, silu)
        neighbours.gated_rms_norm_backward(x, x, x, rstd, weight, *norm, behind, silu, *all[:3])
    for gate, layer, each in ((shared, True, False), (None, False, True)):
        other = None if gate is None else x
        neighbours.modulated_norm(True, x, other, gate, shared, shared, None, *norm, each, layer)
        neighbours.modulated_norm_backward(
            *(x, other, x, gate, shared, shared, x if other is x else x[:0], rstd.double(), rstd, None, *norm, layer),
            *all,
        )
    neighbours.gated_add(True, x, x, shared, True)
    neighbours.gated_add(True, x, x, x, False)
    neighbours.gated_add_backward(x, x, shared, True, True)
    general.general_rms_norm(True, x, weight, weight, *norm, True, columns // 2, True, True, None)
    general.general_rms_norm_backward(x, rstd, x, rstd, weight, weight, 1, -1e-5, 0.0, columns // 2, True, *all[:3])
    general.general_add_rms_norm(True, x, x, weight, None, 1, -1e-5, 1.0, False, -1, False, torch.float32)
    general.add_rms_norm_lean_backward(x, x, rstd, x, rstd, weight, 1, 0.0, *all[:2])
    general.rms_norm_lean_backward(x, None, x, rstd, weight, 1, 0.0, *all[:2])


def launch_heads(columns: int, dtype: torch.dtype, interleaved: bool) -> None:
    """Heads as a projection wrote them: normed and turned, turned, turned back, and the norm's backward."""
    x = torch.zeros(2, 16, 8, columns, dtype=dtype).transpose(1, 2)
    weight, angle = torch.zeros(columns, dtype=dtype), torch.zeros(16, columns, dtype=dtype)
    norm = 1e-5, 0.0
    _, _, rstd, _ = heads.heads_rms_norm_rope(True, x, x[:, :0], angle, angle, weight, None, *norm, True, interleaved)
    heads.rope(False, x, x[:, :0], angle, angle, interleaved)
    heads.rope_backward(x, x, angle, angle, interleaved, True, False)
    heads.heads_rms_norm_rope_backward(
        *(x, x, x, x, angle, angle, rstd, rstd, weight, weight, *norm, interleaved), *(True, False, True, False)
    )


def table() -> str:
    rows = ["| | columns | dtype | threads | registers | spills | bytes loaded, stored by a thread |", "|" + "---|" * 7]
    for name, target in TARGETS.items():
        for dtype in DTYPES:
            for columns in WIDTHS:
                with pytest.MonkeyPatch.context() as patch, compiling(target, patch) as found:
                    launch_all(columns, dtype)
                shown = {"add + norm" if i == 1 else one.kernel: one for i, one in enumerate(found)}
                for kernel, one in shown.items():
                    if kernel != "fold":
                        rows.append(
                            f"| {name} {kernel} | {columns} | {str(dtype)[6:]} | {one.threads} | {one.registers} | "
                            f"{one.spills} | {_bytes(one.loads)}, {_bytes(one.stores)} |"
                        )
    head = f"`python tests/gpu/offline.py`, Triton {triton.__version__}, torch {torch.__version__}."
    return "\n".join([head, "", *rows])


def table_of_steps() -> str:
    """The same of the other norms, of 4096 columns: a line for each, a column for each GPU."""
    lines: dict[str, list[str]] = {}
    for target in TARGETS.values():
        for dtype in DTYPES:
            with pytest.MonkeyPatch.context() as patch, compiling(target, patch) as found:
                launch_neighbours(4096, dtype)
            for i, one in enumerate(one for one in found if one.kernel != "fold"):
                named = {name: one.constants.get(name) for name in ("LOAD", "STORE", "LAYER", "FLOOR")}
                steps = ", ".join(f"{name} {value}".removesuffix(" True") for name, value in named.items() if value)
                line = f"{i:02}| {one.kernel} | {steps} | {str(dtype)[6:]} | {one.threads // target.warp_size} |"
                lines.setdefault(line, []).append(
                    f"{one.registers}" + (f", {one.spills} spilled" if one.spills else "")
                )
    head = ["| | steps | dtype | warps | " + " | ".join(TARGETS) + " |", "|" + "---|" * (4 + len(TARGETS))]
    return "\n".join([*head, *(f"{line[2:]} {' | '.join(found)} |" for line, found in sorted(lines.items()))])


def _bytes(sizes: tuple[int, ...]) -> str:
    return " + ".join(f"{sizes.count(size)}×{size}" for size in sorted(set(sizes), reverse=True)) or "0"


if __name__ == "__main__":
    page = ROOT / "docs/gpu.md"
    replace_block(page, "made by `python tests/gpu/offline.py`", table())
    replace_block(page, "made by `python tests/gpu/offline.py`: the other norms", table_of_steps())
