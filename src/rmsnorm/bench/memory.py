"""The only file that measures bytes: the peak of a forward and backward, and what is kept between the two.

The peak is that of the process (VmHWM of Linux), not of torch's allocator, which doesn't see what C++ takes for itself,
such as our own partial sums of the weight's gradient (up to 4 MiB). For that every tensor has to be mapped alone and
unmapped at once; the malloc settings below see to it, in a process of its own. The kernel counts late by up to 0.3 MiB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from . import worker
from .cases import Case
from .contenders import BY_NAME, Contender, Problem
from .results import Footprint

CONTENDERS = ("rmsnorm", "F.rms_norm", "transformers")
SHAPES = ((512, 4096), (4096, 4096))
DTYPES = ("float32", "bfloat16")
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def measure(
    names: Iterable[str] = CONTENDERS, shapes: Iterable[tuple[int, int]] = SHAPES, dtypes: Iterable[str] = DTYPES
) -> Iterator[Footprint]:
    """The footprint of each contender at each shape, largest last; those that can't run are left out."""
    return worker.apart(1, footprints, list(names), list(shapes), list(dtypes), variables=MALLOC)


def footprints(names: list[str], shapes: list[tuple[int, int]], dtypes: list[str]) -> Iterator[Footprint]:
    """What ``measure`` runs in a process of its own."""
    for rows, cols in shapes:
        for dtype in dtypes:
            case = Case(rows, cols, dtype, "recorded")
            for name in names:
                try:
                    yield footprint(BY_NAME[name], case)
                except ImportError:
                    continue


def footprint(contender: Contender, case: Case) -> Footprint:
    """Measures in this process, after a small problem that loads code and makes threads."""
    small = Case(2, 64, case.dtype, "recorded")
    for one in (small, case):
        p = Problem(one)
        call, leaves, grad = contender.tasks["recorded"](p), (p.x, p.weight), p.grad

        def step() -> object:
            output = call()  # noqa: B023  (called in this round)
            return output, torch.autograd.grad(output, leaves, grad)  # noqa: B023

        top = peak(step)
        storages = kept(call, leaves)
    return Footprint(
        contender=contender.name,
        rows=case.rows,
        cols=case.cols,
        dtype=case.dtype,
        tensor_bytes=case.tensor_bytes,
        peak_bytes=top,
        kept_bytes=sum(size for size, _ in storages),
        kept=[text for _, text in storages],
    )


def peak(call: Callable[[], object]) -> int:
    """By how many bytes the resident memory of this process rose while the call ran, at most."""
    Path("/proc/self/clear_refs").write_text("5")  # from now on, VmHWM is the highest since now
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def kept(call: Callable[[], Tensor], given: Iterable[Tensor]) -> list[tuple[int, str]]:
    """Bytes and description of each storage that autograd keeps of a call, beside those that it was given."""
    known = {one.untyped_storage().data_ptr() for one in given}
    found: dict[int, tuple[int, str]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            text = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            found.setdefault(storage.data_ptr(), (storage.nbytes(), text))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()  # alive until all are found: no address is used twice
    del output
    return list(found.values())


def _status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
