"""The only file that runs a model without leaving a trace: a proof is no call, and nobody may notice it later.

Modes are set module by module. ``eval()`` is more than a mode for some: loralib's layers merge their weights in it, and
transformers exchanges kernels. What a forward counts, caches or makes at its first call is put back, and dice are
rolled as before. Hooks do hear the calls.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_MODULES = frozenset(vars(nn.Module()))


@contextmanager
def rehearsing(model: nn.Module, training: bool = False) -> Iterator[None]:
    """All modules in one mode, each run with the same dice; then the modes, buffers and attributes of before."""
    kept = [_Kept(module) for module in model.modules()]
    with torch.random.fork_rng(devices=[]):
        try:
            for each in kept:
                each.module.training = training
            yield
        finally:
            for each in kept:
                each.restore()


class _Kept:
    """What one module keeps beside its parameters and modules: attributes, lists and dictionaries of things among
    them, and the contents of tensors. What lies deeper is the model's."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.cls, self.training = module, type(module), module.training
        self.own = _own(module)
        self.buffers = dict(module._buffers)
        holders = [value for value in self.own.values() if isinstance(value, list | dict | set)]
        self.holders = [(value, copy.copy(value)) for value in holders]
        held: list[Any] = [*self.own.values(), *self.buffers.values()]
        for holder in holders:
            held += holder.values() if isinstance(holder, dict) else holder
        held = [t for t in held if isinstance(t, Tensor) and not isinstance(t, nn.Parameter)]
        # An inference tensor counts no versions; no forward may write to it here.
        tensors = {id(t): t for t in held if not t.is_inference()}.values()
        self.tensors = [(t, t._version, t.detach().clone()) for t in tensors]

    def restore(self) -> None:
        module = self.module
        module.training = self.training
        if type(module) is not self.cls:
            return  # a lazy module that has become another, for good
        for name in _own(module).keys() - self.own.keys():
            del vars(module)[name]
        vars(module).update(self.own)
        for name in module._buffers.keys() - self.buffers.keys():
            del module._buffers[name]
        for name, buffer in self.buffers.items():
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer
        for holder, before in self.holders:
            _refill(holder, before)
        with torch.no_grad():
            for tensor, version, contents in self.tensors:
                if tensor._version != version:
                    tensor.copy_(contents)


def _own(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _MODULES}


def _refill(holder: Any, before: Any) -> None:
    if isinstance(holder, list):
        if len(holder) != len(before) or any(a is not b for a, b in zip(holder, before, strict=True)):
            holder[:] = before
    elif holder != before if isinstance(holder, set) else _differ(holder, before):
        holder.clear()
        holder.update(before)


def _differ(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return one.keys() != other.keys() or any(one[key] is not other[key] for key in one)
