"""The only file that speaks to the ``kernels`` package: our norms in its mapping, for models that ask for them by name.

transformers marks its norms with the names below, and ``model.use_kernels = True`` (or ``kernels.kernelize``) looks
them up for the model's device. ``register()`` fills the slot of the CPU, which ``kernels`` leaves empty.

One name stands for several roundings: of the classes called "RMSNorm" Llama's rounds before the weight, OLMo 2's after
it. ``kernelize`` rebinds the forward of a module and leaves the module what it was, so its class still tells which: the
first time a class is met it is examined, as ``rmsnorm.patch`` examines modules. A class that no recipe reproduces keeps
its own forward, and a warning says so.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._extras import extra_line
from .models import binding, probe


def register() -> None:
    """Puts the layers into the mapping of ``kernels``, for the CPU: inference and training, compiled or not.

    Models take them up when they are kernelized from then on. What was registered there for the CPU under these names
    is replaced; other devices and names are left alone.

    Raises:
        ImportError: ``kernels`` is not installed.

    Examples:
        >>> rmsnorm.hub.register()  # then model.use_kernels = True
        >>> rmsnorm.hub.unregister()
    """
    kernels = _kernels()
    kernels.register_kernel_mapping(mapping())


def unregister() -> None:
    """Empties the slots again; a model that is kernelized from then on gets its own forward back.

    Raises:
        ImportError: ``kernels`` is not installed.

    Examples:
        >>> rmsnorm.hub.unregister()
    """
    _kernels().register_kernel_mapping({name: {"cpu": {}} for name in _LAYERS})


def mapping() -> dict[str, dict[str, dict[Any, Any]]]:
    """What ``register()`` registers; for ``with kernels.use_kernel_mapping(rmsnorm.hub.mapping()):``.

    Returns:
        By name and device, the layer for each mode of ``kernels``.

    Raises:
        ImportError: ``kernels`` is not installed.

    Examples:
        >>> sorted(rmsnorm.hub.mapping())
        ['RMSNorm', 'RMSNormGated', 'RMSNormZeroCentered']
    """
    mode = _kernels().Mode
    modes = [kind | compiled for kind in (mode.INFERENCE, mode.TRAINING) for compiled in (mode(0), mode.TORCH_COMPILE)]
    return {name: {"cpu": dict.fromkeys(modes, _Repository(name))} for name in _LAYERS}


def _kernels() -> Any:
    try:
        import kernels
    except ImportError as error:
        raise ImportError(
            f"rmsnorm.hub needs the package kernels, which is not installed: {extra_line('hub')}, or the version that "
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
        return _forward(self, hidden_states)


class RMSNormZeroCentered(torch.nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _forward(self, hidden_states)


class RMSNormGated(torch.nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return _forward(self, hidden_states, gate)


_LAYERS: dict[str, type[torch.nn.Module]] = {
    layer.__name__: layer for layer in (RMSNorm, RMSNormZeroCentered, RMSNormGated)
}


def _forward(module: Any, *inputs: Any) -> Any:
    which = _meaning(type(module), getattr(module, "activation", None))
    output = None if which is None else binding.attempt(module, _BINDINGS[which], *inputs)
    return type(module).forward(module, *inputs) if output is None else output


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # the compiler asks, and doesn't trace it
def _meaning(cls: Any, activation: str | None) -> int | None:
    return _examined(cls, activation)


_BINDINGS: list[binding.Binding] = []


@functools.cache
def _examined(cls: Any, activation: str | None) -> int | None:
    """Which of the bindings reproduces a class (with an activation, if it has that attribute), or None."""
    try:
        with torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.enable_grad():
            module = cls(64)
            if activation is not None:
                module.activation = activation
            _BINDINGS.append(probe.examine(module, layer_norm=False, verify=True).binding)
    except (probe.Refused, TypeError) as reason:
        warnings.warn(
            f"rmsnorm.hub: {cls.__module__}.{cls.__name__} keeps its own forward: {reason}",
            stacklevel=4,
        )
        return None
    return len(_BINDINGS) - 1
