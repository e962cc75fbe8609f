"""The columns of the table in test_home.py, nine norms beside torch's own counterpart of each; its register of rows.

Every norm is one ``torch.nn.Module`` with the parameter ``weight`` (LayerNorm's also ``bias``), functions included, so
that each row can be written once. Counterparts are in torch's operators alone: nothing of ours is an oracle here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rmsnorm

EPS = 1e-5
COLUMNS = (5, 16, 129)  # a part of a vector, whole ones, and one more than whole ones
FEW = (1, 3)  # so few that the weights don't show what a norm means


class Weighted(nn.Module):
    """What owns the weight of a function."""

    def __init__(self, columns: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(columns, dtype=dtype))
        self.shape, self.eps = (columns,), EPS


class OurFunction(Weighted):
    def forward(self, x):
        return rmsnorm.rms_norm(x, self.shape, self.weight, self.eps)


class TorchFunction(Weighted):
    def forward(self, x):
        return F.rms_norm(x, self.shape, self.weight, self.eps)


class OurAdd(Weighted):
    def forward(self, x, residual):
        return rmsnorm.add_rms_norm(x, residual, self.shape, self.weight, self.eps)


class TorchAdd(Weighted):
    def forward(self, x, residual):
        sum = x + residual
        return F.rms_norm(sum, self.shape, self.weight, self.eps), sum


class OurGated(Weighted):
    def forward(self, x, gate):
        return rmsnorm.gated_rms_norm(x, gate, self.shape, self.weight, self.eps)


class TorchGated(Weighted):
    def forward(self, x, gate):
        return F.rms_norm(x, self.shape, self.weight, self.eps) * F.silu(gate)


def llama(columns: int, dtype: torch.dtype) -> nn.Module:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    return modeling.LlamaRMSNorm(columns, EPS).to(dtype)


def of(cls: type[nn.Module]) -> Callable[[int, torch.dtype], nn.Module]:
    return lambda columns, dtype: cls(columns, eps=EPS, dtype=dtype)


@cache
def _patched(make: Callable[[int, torch.dtype], nn.Module], columns: int, dtype: torch.dtype) -> nn.Module:
    """Proven once; a proof takes longer than most rows. Cells get copies, which are patched and independent."""
    module = make(columns, dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.linspace(-1, 1, columns) + 1.3)  # none of them alike
    report = rmsnorm.patch(module)
    assert len(report.patched) == 1, str(report)
    return module


@dataclass(frozen=True)
class Norm:
    """One norm, ours or torch's. ``public`` is what a TorchFunctionMode has to see it as; of a counterpart that has
    several operators, the one that scales the rows."""

    name: str
    make: Callable[[int, torch.dtype], nn.Module]
    public: str = "rms_norm"
    arity: int = 1
    ours: bool = True
    patch: bool = False
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    live: Callable[..., Any] | None = None  # the function, of a norm that is one: of (x, [other,] weight)

    def module(self, columns: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """Fresh, with weights around 1 of both signs."""
        module = copy.deepcopy(_patched(self.make, columns, dtype)) if self.patch else self.make(columns, dtype)
        generator = torch.Generator().manual_seed(17 + seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(1 + 0.7 * torch.randn(columns, generator=generator))
        return module

    def args(
        self, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = False, seed: int = 0
    ) -> tuple[Tensor, ...]:
        shape = shape or (2, 5, 16)
        generator = torch.Generator().manual_seed(5 + seed)
        tensors = [torch.randn(*shape, generator=generator).to(dtype) for _ in range(self.arity)]
        return tuple(t.requires_grad_(grad) for t in tensors)


class Chain(nn.Module):
    """Several norms, each after the one before; ``first`` alone, of the second kind of result, goes on."""

    def __init__(self, *norms: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norms)

    def forward(self, x, other=None):
        for norm in self.norms:
            x = norm(x) if other is None else norm(x, other)
            if isinstance(x, tuple):
                x, other = x
            x = x * 1.5
        return x


def torch_add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return F.rms_norm(x + residual, x.shape[-1:], weight, EPS), x + residual


_rms = Norm("torch.nn.RMSNorm", of(nn.RMSNorm), ours=False)
_function = Norm("F.rms_norm", TorchFunction, ours=False, live=lambda x, w: F.rms_norm(x, x.shape[-1:], w, EPS))
_gated = Norm(
    "F.rms_norm * F.silu",
    TorchGated,
    arity=2,
    ours=False,
    live=lambda x, g, w: F.rms_norm(x, x.shape[-1:], w, EPS) * F.silu(g),
)
# The layer of it has a constant size.
_gated_layer = Norm("F.rms_norm * F.silu, as a layer", TorchGated, arity=2, ours=False)
_add = Norm("F.rms_norm of a sum", TorchAdd, arity=2, ours=False, live=torch_add)
_llama = Norm("transformers' LlamaRMSNorm", llama, "rsqrt", ours=False)
_layer = Norm("torch.nn.LayerNorm", of(nn.LayerNorm), "layer_norm", ours=False)


def _of(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *tensors: function(*tensors[:-1], tensors[0].shape[-1:], tensors[-1], EPS)


# Column -> (ours, torch's counterpart)
NORMS: dict[str, tuple[Norm, Norm]] = {
    norm.name: (norm, theirs)
    for norm, theirs in (
        (Norm("rms_norm", OurFunction, live=_of(rmsnorm.rms_norm)), _function),
        (Norm("add_rms_norm", OurAdd, "add_rms_norm", arity=2, live=_of(rmsnorm.add_rms_norm)), _add),
        (Norm("gated_rms_norm", OurGated, "gated_rms_norm", arity=2, live=_of(rmsnorm.gated_rms_norm)), _gated),
        (Norm("RMSNorm", of(rmsnorm.RMSNorm)), _rms),
        (Norm("LayerNorm", of(rmsnorm.LayerNorm), "layer_norm"), _layer),
        (Norm("GatedRMSNorm", of(rmsnorm.GatedRMSNorm), "gated_rms_norm", arity=2), _gated_layer),
        (Norm("patched nn.RMSNorm", of(nn.RMSNorm), patch=True), _rms),
        (Norm("patched LlamaRMSNorm", llama, patch=True), _llama),
        (Norm("installed", of(nn.RMSNorm), context=rmsnorm.installed), _rms),
    )
}


Row = Callable[[Norm], Any]
Filter = tuple[str, type[Warning]]  # a pattern and a kind of the warnings to ignore

ROWS: dict[str, Row] = {}
FILTERS: dict[str, tuple[Filter, ...]] = {}  # the warnings of torch's own machinery; all others are errors


def row(name: str, *filters: Filter) -> Callable[[Row], Row]:
    """Registers a row under its name. It gets a norm, ours or torch's, and returns what the two are compared by."""

    def register(function: Row) -> Row:
        assert name not in ROWS
        ROWS[name], FILTERS[name] = function, filters
        return function

    return register
