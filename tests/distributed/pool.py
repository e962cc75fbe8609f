"""The only file that starts ranks for tests: gloo processes on this machine, which run the functions they are sent.

Four are started once and serve all tests; smaller meshes use the first of them, and the others stand beside, as ranks
outside of a mesh do. They meet at a file, so there is no port, and nothing waits longer than ``SECONDS``.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

SECONDS = 120.0
# Ranks are forks of one process that has imported torch, which takes each of them three seconds otherwise. It does
# nothing else, so that no thread is running in it.
_START = multiprocessing.get_context("forkserver")
_START.set_forkserver_preload(["torch.distributed.tensor", "rmsnorm"])


def serve(rank: int, size: int, meeting: str, orders: Connection, seconds: float) -> None:
    """What a rank does: joins the others, runs what it is sent, and sends back the result or how it failed."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=seconds)
    )
    while order := orders.recv():
        job, args = order
        try:
            orders.send((job(*args), None))
        except Exception:
            orders.send((None, traceback.format_exc()))
    os._exit(0)  # gloo's own threads need not be waited for


class Ranks:
    """``size`` processes; ``run`` has each call ``job(*args)`` and returns what they return, by rank."""

    def __init__(self, size: int, folder: Path, seconds: float = SECONDS) -> None:
        self.orders, self.processes = [], []
        for rank in range(size):
            here, there = _START.Pipe()
            args = (rank, size, str(folder / "meeting"), there, seconds)
            process = _START.Process(target=serve, args=args, daemon=True)
            process.start()
            there.close()  # so that a dead rank is an end of file
            self.orders.append(here)
            self.processes.append(process)

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        self.send(job, *args)
        answers = [self.answer(rank) for rank in range(len(self.orders))]
        for rank, (_, failure) in enumerate(answers):
            assert failure is None, f"rank {rank}: {failure}"
        return [value for value, _ in answers]

    def send(self, job: Callable[..., Any], *args: Any) -> None:
        for orders in self.orders:
            orders.send((job, args))

    def answer(self, rank: int) -> tuple[Any, str | None]:
        """What the job returned, and the traceback if it failed."""
        assert self.orders[rank].poll(2 * SECONDS), f"rank {rank} gave no answer"
        return self.orders[rank].recv()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@cache
def mesh(*shape: int) -> DeviceMesh:
    """The first ranks in that shape. All ranks have to call it, also those outside."""
    names = ("dp", "tp")[-len(shape) :]
    return DeviceMesh("cpu", torch.arange(torch.Size(shape).numel()).view(shape), mesh_dim_names=names)


class Wire(TorchDispatchMode):
    """The collectives that this thread starts while it is on: their names and how many bytes each takes in."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor runs it as operators on plain tensors, which come here again
        if "c10d" in func.namespace and not any(word in func.__name__ for word in ("wait", "wrap")):
            tensors = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            name = func.__name__.split(".")[0].rstrip("_")
            self.collectives.append((name, sum(t.numel() * t.element_size() for t in tensors)))
        return func(*args, **(kwargs or {}))
