"""What torch's own description of the norms (OpInfo, ModuleInfo) says to try, for torch's function and layer on our
kernels after ``install()``, and for ours in their place.

torch's LayerNorm isn't among them: ``install()`` leaves it alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_utils import TestCase

import rmsnorm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's, about itself
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPERATORS = {op.name: op for op in op_db if op.name in {"nn.functional.rms_norm", "nn.functional.layer_norm"}}
MODULES = {info.module_cls: info for info in module_db if info.module_cls in {nn.RMSNorm, nn.LayerNorm}}
RMS, LAYER = OPERATORS["nn.functional.rms_norm"], OPERATORS["nn.functional.layer_norm"]


@dataclass(frozen=True)
class Case:
    """An operator of torch, its function before, and what stands in its place."""

    name: str
    info: Any
    torchs: Callable[..., Tensor]
    function: Callable[..., Tensor]
    installs: bool = False

    def __str__(self) -> str:
        return self.name

    def samples(self, dtype: torch.dtype, requires_grad: bool = False) -> list[Any]:
        torch.manual_seed(0)  # torch draws its samples from the global generator
        found = list(self.info.sample_inputs("cpu", dtype, requires_grad=requires_grad))
        assert len(found) == 6, "torch's own number of samples; a change is worth a look"
        return found

    def here(self) -> AbstractContextManager[None]:
        return rmsnorm.installed() if self.installs else nullcontext()


@dataclass(frozen=True)
class Layer:
    """A layer of torch, and what stands in its place."""

    name: str
    info: Any
    build: type[nn.Module]
    installs: bool = False

    def __str__(self) -> str:
        return self.name

    def inputs(self, dtype: torch.dtype, training: bool = True) -> list[Any]:
        torch.manual_seed(0)
        return self.info.module_inputs_func(self.info, device="cpu", dtype=dtype, requires_grad=True, training=training)

    def made(self, dtype: torch.dtype, training: bool = True) -> Iterator[tuple[nn.Module, nn.Module, Tensor, Any]]:
        """The layer, torch's with the same weights, an input, and torch's description."""
        for one in self.inputs(dtype, training):
            args, kwargs = one.constructor_input.args, one.constructor_input.kwargs
            theirs = self.info.module_cls(*args, **kwargs, device="cpu", dtype=dtype)
            for parameter in theirs.parameters():
                nn.init.uniform_(parameter, 0.5, 1.5)  # ones would hide a weight that is not read
            layer = self.build(*args, **kwargs, device="cpu", dtype=dtype)
            layer.load_state_dict(theirs.state_dict())
            yield layer.train(training), theirs.train(training), one.forward_input.args[0], one

    def here(self) -> AbstractContextManager[None]:
        return rmsnorm.installed() if self.installs else nullcontext()


_native = pytest.mark.skipif(not rmsnorm.info().native, reason="without the native library nothing is installed")
CASES = [
    pytest.param(Case("torch's rms_norm", RMS, nn.functional.rms_norm, nn.functional.rms_norm, True), marks=_native),
    Case("our rms_norm", RMS, nn.functional.rms_norm, rmsnorm.rms_norm),
    Case("our layer_norm", LAYER, nn.functional.layer_norm, rmsnorm.layer_norm),
]
LAYERS = [
    pytest.param(Layer("torch's RMSNorm", MODULES[nn.RMSNorm], nn.RMSNorm, True), marks=_native),
    Layer("our RMSNorm", MODULES[nn.RMSNorm], rmsnorm.RMSNorm),
    Layer("our LayerNorm", MODULES[nn.LayerNorm], rmsnorm.LayerNorm),
]


def close(got: Any, wanted: Any, **options: Any) -> None:
    TestCase().assertEqual(got, wanted, **options)  # noqa: PT009  torch's tolerances by dtype


def call(function: Callable[..., Tensor], sample: Any) -> Tensor:
    return function(sample.input, *sample.args, **sample.kwargs)


def is_noise(case: Case, sample: Any) -> bool:
    """LayerNorm of a row of one number, whose gradients are 0 in our kernels and up to 2e-5 in torch's, which serve
    subclasses and graphs: where one is compared with the other, it is torch's rounding that is compared."""
    return case.info is LAYER and sample.input.numel() == 1


def leaves(sample: Any) -> list[Tensor]:
    return [t for t in (sample.input, *sample.args, *sample.kwargs.values()) if isinstance(t, Tensor)]


def function_of(function: Callable[..., Tensor], sample: Any) -> Callable[..., Tensor]:
    return lambda x, *weights: function(x, sample.args[0], *weights, **sample.kwargs)
