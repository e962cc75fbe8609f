"""The only file that speaks to the ``kernels`` package: our norms in its mapping, for models that ask for them by name.

transformers marks its norms with the names below, and ``model.use_kernels = True`` (or ``kernels.kernelize``) looks
them up for the model's device. ``register()`` fills the slot of the CPU, which ``kernels`` leaves empty.

One name stands for several roundings: of the classes called "RMSNorm" Llama's rounds before the weight, OLMo 2's after
it. ``kernelize`` rebinds the forward of a module and leaves the module what it was, so its class still tells which: the
first time a class is met, its own forward and ours run on a small input, and the options that give the same result
serve from then on. A class that none of them reproduces keeps its own forward, and a warning says so.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _gated, functional

# What a norm of each name may mean: options of rms_norm, or of gated_rms_norm.
_MEANINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "RMSNorm": ({"casting_mode": "llama"}, {"casting_mode": "torch"}),
    "RMSNormZeroCentered": ({"offset": 1.0},),
    "RMSNormGated": ({"casting_mode": "llama"}, {"casting_mode": "torch"}),
}


def register() -> None:
    """Puts the layers into the mapping of ``kernels``, for the CPU: inference and training, compiled or not.

    Models take them up when they are kernelized from then on. What was registered there for the CPU under these names
    is replaced; other devices and names are left alone.

    Raises:
        ImportError: ``kernels`` is not installed.
    """
    kernels = _kernels()
    kernels.register_kernel_mapping(mapping())


def unregister() -> None:
    """Empties the slots again; a model that is kernelized from then on gets its own forward back.

    Raises:
        ImportError: ``kernels`` is not installed.
    """
    _kernels().register_kernel_mapping({name: {"cpu": {}} for name in _LAYERS})


def mapping() -> dict[str, dict[str, dict[Any, Any]]]:
    """What ``register()`` registers; for ``with kernels.use_kernel_mapping(rmsnorm.hub.mapping()):``."""
    mode = _kernels().Mode
    modes = [kind | compiled for kind in (mode.INFERENCE, mode.TRAINING) for compiled in (mode(0), mode.TORCH_COMPILE)]
    return {name: {"cpu": dict.fromkeys(modes, _Repository(name))} for name in _LAYERS}


def _kernels() -> Any:
    try:
        import kernels
    except ImportError as error:
        raise ImportError(
            "rmsnorm.hub needs the package kernels, which is not installed: pip install kernels, in the version that "
            "your transformers asks for (kernels==0.17.2 for transformers 5.20 to 5.22)"
        ) from error
    return kernels


@dataclass(frozen=True)
class _Repository:
    """What ``kernels`` calls a repository: something hashable that loads a layer; here there is nothing to load."""

    name: str

    def load(self) -> type[torch.nn.Module]:
        return _LAYERS[self.name]

    def __str__(self) -> str:
        return f"rmsnorm (layer {self.name})"


# kernels allows a layer a forward of the original's signature, these flags, and nothing else: no constructor, no
# attributes, no further methods. `self` is the module of the model.
class RMSNorm(torch.nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _forward("RMSNorm", self, hidden_states)


class RMSNormZeroCentered(torch.nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _forward("RMSNormZeroCentered", self, hidden_states)


class RMSNormGated(torch.nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return _forward("RMSNormGated", self, hidden_states, gate)


_LAYERS: dict[str, type[torch.nn.Module]] = {
    layer.__name__: layer for layer in (RMSNorm, RMSNormZeroCentered, RMSNormGated)
}


def _forward(name: str, module: Any, *inputs: Any) -> Tensor:
    which = _meaning(name, type(module))
    if which is None or getattr(module, "activation", "silu") not in _gated.ACTIVATIONS:
        return type(module).forward(module, *inputs)
    return _normalise(module, _MEANINGS[name][which], *inputs)


def _normalise(module: Any, options: dict[str, Any], x: Tensor, gate: Tensor | None = None) -> Tensor:
    weight, eps = module.weight, module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    if gate is None:
        return functional.rms_norm(x, weight.shape, weight, eps, **options)
    return _gated.gated_rms_norm(x, gate, weight.shape, weight, eps, activation=module.activation, **options)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # the compiler asks, and doesn't trace it
def _meaning(name: str, cls: Any) -> int | None:
    return _found_meaning(name, cls)


@functools.cache
def _found_meaning(name: str, cls: Any) -> int | None:
    """With which of the meanings ours is the forward of ``cls``, or None."""
    for which, options in enumerate(_MEANINGS[name]):
        if all(_agrees(name, cls, options, *types) for types in _TYPES):
            return which
    warnings.warn(
        f"rmsnorm.hub: {cls.__module__}.{cls.__name__} is registered as {name} but computes something else; "
        "it keeps its own forward",
        stacklevel=4,
    )
    return None


# Types of the input and the weight: the roundings show in half types, and which types meet decides the output's.
_TYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
)


@torch.no_grad()
def _agrees(name: str, cls: Any, options: dict[str, Any], dtype: torch.dtype, weight_dtype: torch.dtype) -> bool:
    """Whether the options give what the class gives on 8 rows of 64, of several sizes, at an eps that shows.

    Two orders of rounding differ in a fifth of the elements. Rounded alike, one in a thousand may still differ, by a
    unit, where torch's fp32 arithmetic and ours lie on two sides of a boundary.
    """
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        module = cls(64, eps=0.25)
        module.weight.data = torch.arange(64).add(0.5).mul(0.77).sin().mul(2).to(weight_dtype)
        x = torch.arange(8 * 64).add(1).mul(0.37).sin().view(8, 64) * torch.arange(8).sub(3).exp2().view(8, 1)
        inputs = [x.to(dtype), x.flip(0).to(dtype)][: 2 if name == "RMSNormGated" else 1]
        ours, theirs = _normalise(module, options, *inputs), cls.forward(module, *inputs)
        if ours.dtype is not theirs.dtype:
            return False
        close = torch.isclose(ours.double(), theirs.double(), rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
        different = ours != theirs if dtype is not torch.float32 else ~close
        return bool(close.all()) and int(different.sum()) <= 4
