"""The only file that knows what is measured: shapes, types, directions, the bytes that must move, grids with a name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

DIRECTIONS = {
    "forward": "the output, in inference mode",
    "backward": "the gradients of input and weight from a given contiguous gradient, on a graph that is kept",
    "add": "input + residual and the norm of that sum, both kept, in inference mode",
    "recorded": "the output, with what backward will need",
}

MEMORIES = {
    "fresh": "a new output in each call; the previous one was freed",
    "warm": "into memory that is given (`out=`) and was written before; forward only",
}

# Tensors of the input's size that must be read or written. The weight, and one number per row, stay in a cache.
TENSORS = {"forward": 2, "backward": 3, "add": 4, "recorded": 2}
COPY_TENSORS = 2


@dataclass(frozen=True)
class Case:
    """One race: a shape, a type, what is computed, where the output goes, and how many threads may work on it."""

    rows: int
    cols: int
    dtype: str
    direction: str = "forward"
    memory: str = "fresh"
    threads: int = field(default_factory=torch.get_num_threads)
    device: str = "cpu"

    @property
    def task(self) -> str:
        """What a contender must know how to do: a direction, or "warm" for a forward into given memory."""
        return "warm" if self.memory == "warm" else self.direction

    @property
    def tensor_bytes(self) -> int:
        return self.rows * self.cols * DTYPES[self.dtype].itemsize

    @property
    def moved_bytes(self) -> int:
        """What must cross the memory bus when nothing is in a cache and nothing moves twice."""
        return TENSORS[self.direction] * self.tensor_bytes

    @property
    def shape(self) -> str:
        return f"{self.rows}×{self.cols}"

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype} {self.direction}{' warm' * (self.memory == 'warm')}"


def grid(
    shapes: Iterable[tuple[int, int]],
    dtypes: Iterable[str] = ("float32", "bfloat16"),
    directions: Iterable[str] = ("forward", "backward"),
    memories: Iterable[str] = ("fresh",),
    threads: Iterable[int] | None = None,
    device: str = "cpu",
) -> list[Case]:
    """Every combination, but for warm memory, which only forward has; grouped by thread count."""
    return [
        Case(rows, cols, dtype, direction, memory, count, device)
        for count in threads or (torch.get_num_threads(),)
        for rows, cols in shapes
        for dtype in dtypes
        for direction in directions
        for memory in memories
        if memory == "fresh" or direction == "forward"
    ]


@dataclass(frozen=True)
class Preset:
    """A grid with a name, and what goes with it."""

    about: str
    shapes: tuple[tuple[int, int], ...]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    directions: tuple[str, ...] = ("forward", "backward")
    memories: tuple[str, ...] = ("fresh",)
    against: str = "torch"
    footprint: bool = False
    """Whether the bytes are measured too (memory.py)."""


README_SHAPES = ((1, 4096), (512, 4096), (4096, 4096))
PRESETS = {
    "readme": Preset("the table of the README: one row, in cache, beyond the caches", README_SHAPES),
    "all": Preset(
        "every shape, output fresh and given, against every library: the results in benchmarks/results",
        ((1, 4096), (16, 4096), (512, 4096), (2048, 576), (32768, 128), (4096, 4096)),
        memories=("fresh", "warm"),
        against="all",
        footprint=True,
    ),
    "layernorm": Preset(
        "RMSNorm against LayerNorm on the same engine, in cache and beyond",
        ((1, 4096), (16, 4096), (512, 4096), (32768, 128), (4096, 4096)),
        against="rmsnorm.layer_norm,F.layer_norm",
    ),
    "gpu": Preset(
        "for --device: one row, in a GPU's second-level cache, and beyond it (256 MiB of bfloat16)",
        ((1, 4096), (2048, 4096), (32768, 128), (16384, 8192)),
        directions=("forward", "backward", "add"),
        against="F.rms_norm,torch.compile",
    ),
    "sizes": Preset(
        "4096 columns from 16 KiB to 128 MiB of float32, output given: the roofline",
        ((1, 4096), (4, 4096), (16, 4096), (64, 4096), (256, 4096), (1024, 4096), (4096, 4096), (8192, 4096)),
        directions=("forward",),
        memories=("warm",),
    ),
    "decode": Preset(
        "few rows, as when tokens are generated one by one",
        tuple((rows, cols) for cols in (576, 2048, 4096, 8192) for rows in (1, 8, 32)),
        directions=("forward",),
    ),
}
