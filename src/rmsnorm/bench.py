"""The only file that knows what is raced against what: cases, contenders, and the check before the clock.

Forward makes a fresh output in inference mode. Backward computes the gradients of input and weight from a given
contiguous gradient, on a graph that is kept, so that nothing but backward is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _peers, _timing
from ._layer_norm import layer_norm
from .functional import rms_norm

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-13}
"""Largest difference to torch's result, relative to its largest element: a few roundings of the type."""
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}

Forward = Callable[[], Any]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One race: a shape, a type, and forward or backward."""

    rows: int
    cols: int
    dtype: torch.dtype
    backward: bool

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def direction(self) -> str:
        return "backward" if self.backward else "forward"

    def __str__(self) -> str:
        return f"{self.rows}×{self.cols} {self.dtype_name} {self.direction}"


@dataclass(frozen=True)
class Contender:
    """A name, and how to bind it to an input and a weight."""

    name: str
    bind: Callable[[Tensor, nn.Parameter], Forward]
    is_rms_norm: bool = True
    """It must agree with the others; if not, it is there to give the times a scale."""
    has_backward: bool = True
    may_fail: bool = False
    """It depends on more than torch: left out, with its reason, where that is missing."""
    bind_backward: Callable[[Tensor, nn.Parameter, Tensor], Call] | None = None
    """How to bind its backward, if torch's autograd doesn't know it."""


@dataclass
class Result:
    """What one case gave."""

    case: Case
    timings: dict[str, _timing.Timing] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def ratios(self) -> dict[str, float]:
        """The time of the first contender, which is ours, ÷ each other's."""
        ours, *_ = self.timings.values()
        return {name: ours.ratio(timing) for name, timing in self.timings.items() if timing is not ours}


def _torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight)


def _compiled(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Forward]:
    def bind(x: Tensor, weight: Tensor) -> Forward:
        import torch._functorch.config as aot

        torch._dynamo.reset()  # otherwise the eighth shape would hit the recompilation limit and time eager code
        compiled = torch.compile(function, dynamic=False)
        with aot.patch(donated_buffer=False):  # compiled so that backward can run twice on one graph
            compiled(x, weight)
        return lambda: compiled(x, weight)

    return bind


def _bind_copy(x: Tensor, weight: Tensor) -> Forward:
    buffer = x.clone()
    return lambda: buffer.copy_(x)


# Ours first, then torch's, which is the oracle.
CONTENDERS = (
    Contender("rmsnorm", lambda x, weight: lambda: rms_norm(x, weight.shape, weight)),
    Contender("F.rms_norm", lambda x, weight: lambda: _torch_rms_norm(x, weight)),
    Contender("torch.compile", _compiled(_torch_rms_norm), may_fail=True),
    Contender("F.layer_norm", lambda x, weight: lambda: F.layer_norm(x, weight.shape, weight), is_rms_norm=False),
    Contender("copy_ (floor)", _bind_copy, is_rms_norm=False, has_backward=False),
)

# Also raced when asked for: our own LayerNorm, which has the same engine and one statistic more, and other libraries.
PEERS = (
    Contender("rmsnorm.layer_norm", lambda x, w: lambda: layer_norm(x, w.shape, w), is_rms_norm=False),
    Contender("transformers", _peers.transformers, may_fail=True),
    Contender("onnxruntime", _peers.onnxruntime, has_backward=False, may_fail=True),
    Contender("openvino", _peers.openvino, has_backward=False, may_fail=True),
    Contender("jax", _peers.jax, may_fail=True, bind_backward=_peers.jax_backward),
    Contender("mlx", _peers.mlx, may_fail=True, bind_backward=_peers.mlx_backward),
)

# Inside one compiled graph: our operator, which Inductor calls, against Inductor's own code for the formula, which it
# can fuse with its neighbours. Each form has the add before, and the multiply after, in the graph or not.
IN_GRAPH = {
    "alone": (
        Contender("our operator", _compiled(lambda x, w: rms_norm(x, w.shape, w))),
        Contender("Inductor's code", _compiled(_torch_rms_norm)),
    ),
    "between an add and a multiply": (
        Contender("our operator", _compiled(lambda x, w: rms_norm(x + 1, w.shape, w) * x)),
        Contender("Inductor's code", _compiled(lambda x, w: _torch_rms_norm(x + 1, w) * x)),
    ),
}


def grid(rows: Iterable[int], cols: Iterable[int], dtypes: Iterable[str]) -> list[Case]:
    """Every shape in every type, forward and backward."""
    return [Case(r, c, DTYPES[dtype], backward) for r, c, dtype, backward in product(rows, cols, dtypes, (False, True))]


def race(case: Case, contenders: Sequence[Contender], seconds: float) -> Result:
    """Checks that the contenders agree with the first, which is ours, then times them.

    Raises:
        ArithmeticError: they don't agree; a faster wrong answer is not a result.
    """
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, case.rows, case.cols, generator=generator).to(case.dtype)
    gain = 1 + 0.1 * torch.randn(case.cols, generator=generator)
    weight = nn.Parameter(gain.to(case.dtype), requires_grad=case.backward)
    x.requires_grad_(case.backward)
    result = Result(case)
    calls: dict[str, Call] = {}
    values: dict[str, tuple[Tensor, ...]] = {}
    with torch.inference_mode(not case.backward):
        for contender in contenders:
            if case.backward and not contender.has_backward:
                continue
            try:
                call = _bind(contender, x, weight, grad if case.backward else None)
                value = call()
            except Exception as error:
                if not contender.may_fail:
                    raise
                result.skipped[contender.name] = next(iter(str(error).splitlines()), type(error).__name__)
                continue
            calls[contender.name] = call
            if contender.is_rms_norm:
                several = isinstance(value, (tuple, list))
                values[contender.name] = tuple(map(_peers.to_torch, value if several else (value,)))
            del value
        _check(case, values)
        values.clear()
        result.timings = _timing.measure(calls, seconds)
    return result


def _bind(contender: Contender, x: Tensor, weight: nn.Parameter, grad: Tensor | None) -> Call:
    if grad is not None and contender.bind_backward:
        return contender.bind_backward(x, weight, grad)
    forward = contender.bind(x, weight)
    if grad is None:
        return forward
    output = forward()
    return lambda: torch.autograd.grad(output, (x, weight), grad, retain_graph=True)


def _check(case: Case, values: dict[str, tuple[Tensor, ...]]) -> None:
    ours, *others = values.items()
    for name, tensors in others:
        for mine, theirs in zip(ours[1], tensors, strict=True):
            difference = (mine - theirs).abs().max() / theirs.abs().max()
            if not difference <= TOLERANCE[case.dtype]:
                raise ArithmeticError(
                    f"{ours[0]} and {name} disagree at {case} by {difference:.1e} of the largest "
                    f"element ({TOLERANCE[case.dtype]:.0e} allowed), so they were not timed"
                )
