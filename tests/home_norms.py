"""The columns of the table in test_home.py: nine norms beside torch's own counterpart of each, and what compares them.

Every norm is one ``torch.nn.Module`` with the parameter ``weight`` (LayerNorm's also ``bias``), functions included, so
that each row can be written once. Counterparts are in torch's operators alone: nothing of ours is an oracle here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import rmsnorm

EPS = 1e-5
COLUMNS = (3, 16, 129)  # a part of a vector, whole ones, and one more than whole ones


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
        module = self.make(columns, dtype)
        generator = torch.Generator().manual_seed(17 + seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(1 + 0.7 * torch.randn(columns, generator=generator))
        if self.patch:
            report = rmsnorm.patch(module)
            assert len(report.patched) == 1, str(report)
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


@dataclass(frozen=True)
class Either:
    """Where torch refuses what we can do: its error, or the right result."""

    error: Any
    result: Any


@dataclass(frozen=True)
class Failed:
    """An error in place of a result."""

    kind: type[BaseException]
    text: str


class Advice(str):
    """The text of an error of ours that says what to do instead: as good as the result."""


def attempt(function: Callable[[], Any]) -> Any:
    """The result, or the error."""
    try:
        return function()
    except Exception as error:  # whichever it is, it is compared
        return Failed(type(error), " ".join(str(error).split())[:2000])


def tensors_of(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]


def loss(result: Any) -> Tensor:
    """A number that every element has its own part in."""
    return sum(t.sin().sum() for t in tensors_of(result))


def learn(function: Callable[..., Any], args: tuple[Any, ...], module: nn.Module | None = None) -> dict[str, Any]:
    """Results, and the gradients that a backward pass leaves in the arguments and in the module's parameters."""
    module = function if module is None else module
    result = function(*args)
    loss(result).backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return {"result": result, "of inputs": [t.grad for t in args], "of weights": gradients}


TOLERANCES = {  # (relative, absolute): a few roundings of each type; gradients cancel
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 2e-5),
    torch.float16: (4e-3, 4e-3),
    torch.bfloat16: (3e-2, 3e-2),
}


def compare(ours: Any, theirs: Any, where: str = "result") -> None:
    """AssertionError unless both are the same structure: the same types and errors, values up to rounding."""
    if isinstance(ours, Advice):
        return
    if isinstance(theirs, Either):
        theirs = theirs.error if isinstance(ours, Failed) else theirs.result
    if isinstance(theirs, Failed):
        assert isinstance(ours, Failed), f"{where}: torch refuses ({theirs.kind.__name__}: {theirs.text}), ours doesn't"
        assert issubclass(ours.kind, theirs.kind), f"{where}: {ours}, but torch's is {theirs}"
        return
    assert not isinstance(ours, Failed), f"{where}: {ours.kind.__name__}: {ours.text}"
    assert type(ours) is type(theirs), f"{where}: {type(ours)}, torch's is {type(theirs)}"
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), f"{where}: {list(ours)}, torch's are {list(theirs)}"
        for key, value in theirs.items():
            compare(ours[key], value, f"{where}, {key}")
    elif isinstance(theirs, tuple | list):
        assert len(ours) == len(theirs), f"{where}: {ours}, torch's is {theirs}"
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            compare(*pair, f"{where}[{i}]")
    elif isinstance(theirs, Tensor):
        _compare_tensors(ours, theirs, where)
    else:
        assert ours == theirs, f"{where}: {ours}, torch's is {theirs}"


def _compare_tensors(ours: Tensor, theirs: Tensor, where: str) -> None:
    for what in ("dtype", "requires_grad", "is_nested"):
        mine, its = getattr(ours, what), getattr(theirs, what)
        assert mine == its, f"{where}: {what} {mine}, torch's is {its}"
    if theirs.is_nested:
        return compare(ours.values(), theirs.values(), where)
    assert ours.shape == theirs.shape, f"{where}: {ours.shape}, torch's is {theirs.shape}"
    if isinstance(theirs, FakeTensor):
        return None
    for inner in ("a", "b", "wrapped") if type(theirs) not in (Tensor, nn.Parameter) else ():
        if hasattr(theirs, inner):
            compare(getattr(ours, inner), getattr(theirs, inner), f"{where}.{inner}")
    if type(theirs).__torch_dispatch__ is Tensor.__torch_dispatch__:  # else it has no values but those inside
        plain = [t.detach().as_subclass(Tensor) for t in (ours, theirs)]
        relative, absolute = TOLERANCES[theirs.dtype]
        torch.testing.assert_close(*plain, rtol=relative, atol=absolute, equal_nan=True, msg=lambda m: f"{where}: {m}")
    return None
