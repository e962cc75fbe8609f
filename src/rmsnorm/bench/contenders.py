"""The only file that knows who takes part: ours, torch's, the floor, and how each is bound to a problem.

Binding is done before the clock starts and leaves one call without arguments. A contender has a call for each task that
it knows (``cases.Case.task``); nobody is timed at a task by a detour that nobody would take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._install import installed
from ..forms.layer_norm import layer_norm
from ..functional import add_rms_norm, rms_norm
from ..module import RMSNorm
from . import operators, peers
from .cases import DTYPES, Case
from .timing import Around
from .worker import unbound

EPS = peers.EPS
Call = Callable[[], Any]


class Problem:
    """What a case is given: numbers from a fixed seed, made when they are first asked for."""

    def __init__(self, case: Case) -> None:
        self.case, self.shape, self.dtype = case, (case.cols,), DTYPES[case.dtype]
        self.records = case.direction in ("backward", "recorded")
        self.x = self._noise(0).requires_grad_(self.records)
        self.weight = self._parameter(1)
        self.bias = self._parameter(0)  # LayerNorm's

    def _noise(self, seed: int, *size: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randn(size or (self.case.rows, self.case.cols), generator=generator)
        return numbers.to(self.case.device, self.dtype)

    def _parameter(self, mean: float) -> nn.Parameter:
        return nn.Parameter(mean + 0.1 * self._noise(1, self.case.cols), requires_grad=self.records)

    @cached_property
    def grad(self) -> Tensor:
        return self._noise(2)

    @cached_property
    def residual(self) -> Tensor:
        return self._noise(3)

    @cached_property
    def out(self) -> Tensor:
        return torch.zeros_like(self.x)


Bind = Callable[[Problem], Call]
Arguments = Callable[[Problem], tuple[Any, ...]]


@dataclass(frozen=True)
class Contender:
    """A name, and how it is bound to a problem, by task."""

    name: str
    tasks: Mapping[str, Bind]
    is_rms_norm: bool = True
    """It must agree with the others; if not, it is there to give the times a scale."""
    may_fail: bool = False
    """It depends on more than torch: left out, with its reason, where that is missing or computes something else."""
    around: Around = nullcontext
    """What its calls run inside of."""
    own_threads: bool = False
    """It doesn't use torch's threads: both may spin for a while when they have nothing to do."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """What it can't do, by task, in a few words: it is left out there with that as the reason."""


def _rms_arguments(p: Problem) -> tuple[Any, ...]:
    return p.x, p.shape, p.weight, EPS


def _layer_norm_arguments(p: Problem) -> tuple[Any, ...]:
    return p.x, p.shape, p.weight, p.bias, EPS


def of(make: Callable[[Problem], Callable[..., Tensor]], arguments: Arguments = _rms_arguments) -> dict[str, Bind]:
    """The tasks of what torch can differentiate: `make` gives the function, whose first argument is the input."""

    def forward(p: Problem) -> Call:
        return partial(make(p), *arguments(p))

    def backward(p: Problem) -> Call:
        given = arguments(p)
        leaves = [p.x, p.weight, *(one for one in given if one is p.bias)]
        return partial(torch.autograd.grad, make(p)(*given), leaves, p.grad, retain_graph=True)

    def add(p: Problem) -> Call:
        (x, *more), function, residual = arguments(p), make(p), p.residual

        def call() -> tuple[Tensor, Tensor]:
            sum = x + residual
            return function(sum, *more), sum

        return call

    return {"forward": forward, "recorded": forward, "backward": backward, "add": add}


def of_layer(kind: Callable[..., nn.Module]) -> dict[str, Bind]:
    """The tasks of a layer: what it adds to the function is the call of a module."""

    def make(p: Problem) -> nn.Module:
        layer = kind(p.shape, EPS, dtype=p.dtype)
        layer.weight = p.weight
        return layer

    return of(make, lambda p: (p.x,))


def compiled(function: Callable[..., Any], arguments: Arguments = lambda p: (p.x, p.weight)) -> dict[str, Bind]:
    """The tasks of a function under ``torch.compile``, for one shape."""

    def make(p: Problem) -> Callable[..., Any]:
        import torch._functorch.config as aot

        torch._dynamo.reset()  # otherwise the eighth shape would hit the recompilation limit and time eager code
        made = torch.compile(function, dynamic=False)
        with aot.patch(donated_buffer=False):  # compiled so that backward can run twice on one graph
            made(*arguments(p))
        return made

    return of(make, arguments)


def _torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def _torch_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    sum = x + residual
    return _torch_rms_norm(sum, weight), sum


def _copy(p: Problem) -> Call:
    x = p.x.detach()
    return partial(x.clone().copy_, x)


def _apart(name: str, tasks: Mapping[str, Bind], lacks: Mapping[str, str]) -> Contender:
    """A library with threads of its own."""
    return Contender(name, tasks, may_fail=True, around=unbound, own_threads=True, lacks=lacks)


OURS = Contender(
    "rmsnorm",
    of(lambda p: rms_norm)
    | {
        "warm": lambda p: partial(rms_norm, *_rms_arguments(p), out=p.out),
        "add": lambda p: partial(add_rms_norm, p.x, p.residual, p.shape, p.weight, EPS),
    },
)
# Two tensors over the same bus as everybody's, into memory that was written before.
FLOOR = Contender("copy_", dict.fromkeys(("forward", "warm", "backward", "add", "recorded"), _copy), is_rms_norm=False)
# The same into a fresh output: what that costs whoever makes one.
FRESH_FLOOR = Contender("torch.neg", {"forward": lambda p: partial(torch.neg, p.x)}, is_rms_norm=False)

_fused_add = compiled(_torch_add_rms_norm, lambda p: (p.x, p.residual, p.weight))["forward"]
TORCH = (
    Contender("F.rms_norm", of(lambda p: F.rms_norm)),
    Contender("torch.compile", compiled(_torch_rms_norm) | {"add": _fused_add}, may_fail=True),
    Contender("F.layer_norm", of(lambda p: F.layer_norm, _layer_norm_arguments), is_rms_norm=False),
)
NO_OUT, NO_GRADIENTS = {"warm": "no output that is given"}, {"backward": "no gradients", "recorded": "no gradients"}
PEERS = (
    # Our own LayerNorm has the same engine and one statistic more.
    Contender("rmsnorm.layer_norm", of(lambda p: layer_norm, _layer_norm_arguments), is_rms_norm=False),
    Contender("transformers", of_layer(peers.llama_layer), may_fail=True, lacks=NO_OUT),
    Contender("zentorch", operators.ZENTORCH, may_fail=True, lacks=NO_OUT | NO_GRADIENTS),
    Contender("vllm", operators.VLLM, may_fail=True, lacks=NO_GRADIENTS),
    _apart("onnxruntime", peers.ONNXRUNTIME, NO_GRADIENTS),
    _apart("openvino", peers.OPENVINO, {"forward": "its output is given, always"} | NO_GRADIENTS),
    _apart("jax", peers.JAX, NO_OUT),
    _apart("mlx", peers.MLX, NO_OUT),
)
GROUPS = {"torch": TORCH, "peers": PEERS, "all": TORCH + PEERS}
CHOICES = GROUPS | {one.name: (one,) for one in (*TORCH, *PEERS, FRESH_FLOOR)}

# For the performance contract (bars.py) alone.
REFERENCES = (
    Contender(
        "F.layer_norm, no bias", of(lambda p: F.layer_norm, lambda p: (p.x, p.shape, p.weight, None, EPS)), False
    ),
    Contender("add, then rmsnorm", {"add": of(lambda p: rms_norm)["add"]}),
    Contender("rmsnorm.RMSNorm", of_layer(RMSNorm)),
    Contender("nn.RMSNorm", of_layer(nn.RMSNorm)),
    Contender("nn.RMSNorm, installed", of_layer(nn.RMSNorm), around=installed),
)
BY_NAME = {one.name: one for one in (OURS, *TORCH, *PEERS, FLOOR, FRESH_FLOOR, *REFERENCES)}


def named(names: str) -> list[Contender]:
    """Ours, those of a comma-separated list of names and groups, and the floor.

    Raises:
        ValueError: a name that nobody has; lists those that somebody has.
    """
    chosen = [OURS]
    for name in filter(None, names.split(",")):
        if name not in CHOICES:
            raise ValueError(f"{name!r} is not one of {', '.join(CHOICES)}")
        chosen += CHOICES[name]
    return list({one.name: one for one in (*chosen, FLOOR)}.values())
