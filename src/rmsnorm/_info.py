"""The only file that describes the running configuration: versions, library, CPU target, threads."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from . import _install, _native
from .gpu import route


@dataclass(frozen=True)
class Info:
    """What ``rmsnorm.info()`` returns; prints as one ``name: value`` line each."""

    rmsnorm: str
    """The version of this package,"""
    torch: str
    """of torch,"""
    python: str
    """and of Python."""
    native: bool
    """Whether the C++ kernels serve CPU tensors."""
    why_not_native: str | None
    """Why they don't, in a sentence; None if they do."""
    cpu_target: str | None
    """The kernels in use, or None without the native library."""
    cpu_targets: list[str]
    """All that this build and this CPU have, best first."""
    caches: list[str]
    """Of a core: L1, L2 and the last one, as the kernels take them: what decides how large calls are done."""
    huge_pages: str
    """Who gets them, by the system's rule: always, madvise (who asks, as large outputs here do), never, or unknown."""
    contract: str | None
    """An id of the order of sums, rounding points and the chunks of backward: where it is equal, so are the bits."""
    installed: bool
    """Whether torch's own ``F.rms_norm`` runs on these kernels (``rmsnorm.install()``)."""
    threads: int
    """What ``torch.get_num_threads()`` says."""
    triton: str | None
    """Its version, or None: then GPUs have torch's fused kernel and the reference definition alone."""
    cuda: str
    """Who is first where both can serve a call on a GPU, ``torch`` or ``triton`` (RMSNORM_CUDA)."""

    def __str__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in vars(self).items())


def version() -> str:
    """The installed version of this package."""
    return importlib.metadata.version("rmsnorm")


def _huge_pages() -> str:
    try:
        rules = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return rules.partition("[")[2].partition("]")[0]


def info() -> Info:
    """Versions, the native library or why there is none, the CPU target, caches, torch's threads, Triton's version.

    Returns:
        An ``Info``, plain data that prints as one ``name: value`` line each.

    Examples:
        >>> info().torch == torch.__version__
        True
    """
    return Info(
        rmsnorm=version(),
        torch=torch.__version__,
        python=platform.python_version(),
        native=_native.why_not() is None,
        why_not_native=_native.why_not(),
        cpu_target=_native.cpu_target(),
        cpu_targets=_native.cpu_targets(),
        caches=[f"{b / 2**20:g} MiB" if b >= 2**20 else f"{b / 2**10:g} KiB" for b in _native.cache_bytes()],
        huge_pages=_huge_pages(),
        contract=None if (text := _native.contract()) is None else hashlib.sha256(text.encode()).hexdigest()[:12],
        installed=_install.is_installed(),
        threads=torch.get_num_threads(),
        triton=importlib.metadata.version("triton") if route.has_triton() else None,
        cuda=route.choice(),
    )
