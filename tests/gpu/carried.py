"""Carries launches to a real GPU and back: the tests, the oracle and the route stay on the CPU, the kernels run there.

A tensor goes with its whole buffer and keeps its strides and its offset in it, so that layouts are what the tests made
them, and what a kernel writes beside its output comes back too. A launch's own outputs begin as NaN, wherever torch
fills what is empty (conftest.py turns that on): an element that no program wrote shows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

DEVICE = os.environ.get("RMSNORM_TEST_DEVICE", "")


def carried(launch: Callable[..., Any]) -> Callable[..., Any]:
    """``launch`` on the GPU, for CPU tensors; as it is, for what another one has carried there."""

    @wraps(launch)
    def call(*arguments: Any, **options: Any) -> tuple[Any, ...] | None:
        if not any(t.is_cpu for t in arguments if isinstance(t, Tensor)):
            return launch(*arguments, **options)
        buffers: dict[int, tuple[Tensor, Tensor]] = {}  # by address: tensors that share one share it there too

        def there(tensor: Any) -> Any:
            if not isinstance(tensor, Tensor):
                return tensor
            storage = tensor.untyped_storage()
            here = torch.empty(0, dtype=tensor.dtype).set_(storage)
            _, far = buffers.setdefault(storage.data_ptr(), (here, here.to(DEVICE)))
            return far.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

        results = launch(*map(there, arguments), **options)
        if results is None:
            return None
        for here, far in buffers.values():
            here.copy_(far)
        return tuple(t.cpu() if isinstance(t, Tensor) else t for t in results)

    return call
