"""Rows of the table in test_home.py in eager mode: the plain call, modes, and kinds of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from home_compare import attempt, learn, loss, tensors_of
from home_norms import COLUMNS, FEW, Norm, row
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

# Warnings of torch's machinery about itself; the rows that need one name it.
MASKED = (".*MaskedTensors is in prototype stage", UserWarning)  # any use of masked tensors
MASKED_OPERATOR = (".* is not implemented in __torch_dispatch__ for MaskedTensor", UserWarning)  # before the error
NESTED = (".*nested tensors is in prototype stage", UserWarning)  # any use of nested tensors


@row("called")
def called(norm: Norm) -> Any:
    """Not a word of anything else: if this cell fails, so do the others."""
    return [learn(norm.module(columns), norm.args(2, 5, columns, grad=True)) for columns in COLUMNS]


@row("called with one column and three")
def few_columns(norm: Norm) -> Any:
    return [learn(norm.module(columns), norm.args(2, 5, columns, grad=True)) for columns in FEW]


class Log(TorchFunctionMode):
    """The names of the functions called; those of one name are given ``times`` the value."""

    def __init__(self, public: str = "", times: float = 1.0) -> None:
        super().__init__()
        self.names: list[str] = []
        self.public, self.times = public, times

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        self.names.append(name)
        result = func(*args, **kwargs or {})
        return tree_map(lambda t: t * self.times, result) if name == self.public else result


@row("TorchFunctionMode, passing through")
def function_mode(norm: Norm) -> Any:
    module, args = norm.module(), norm.args(grad=True)
    with Log():
        return learn(module, args)


@row("TorchFunctionMode, seen once by its public name")
def function_mode_name(norm: Norm) -> Any:
    module, args = norm.module(), norm.args()
    with torch.no_grad(), Log() as log:
        module(*args)
    return log.names.count(norm.public)


@row("TorchFunctionMode, its result is used")
def function_mode_result(norm: Norm) -> Any:
    module, args = norm.module(), norm.args()
    with torch.no_grad(), Log(norm.public, 2.0):
        return tensors_of(module(*args))[0]


class LogOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


@row("TorchDispatchMode")
def dispatch_mode(norm: Norm) -> Any:
    module, args = norm.module(), norm.args(grad=True)
    with LogOperators() as log:
        result = learn(module, args)
    return [result, bool(log.names)]


@row("FlopCounterMode")
def flop_counter(norm: Norm) -> Any:
    module, args = norm.module(), norm.args(grad=True)
    with FlopCounterMode(display=False) as counter:
        result = learn(module, args)
    return [result, counter.get_total_flops()]


class Tagged(Tensor):
    """A subclass with torch's own ``__torch_function__``, which keeps the type."""


class Named(Tensor):
    """A subclass that notes what it meets."""

    names: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.names.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs)


class AtenOnly(Tensor):
    """A wrapper that knows aten's operators, and those by unwrapping; it refuses others, as quantised tensors do."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Tensor:
        wrapper = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, requires_grad=inner.requires_grad
        )
        wrapper.wrapped = inner.detach()
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.namespace not in ("aten", "prim"):
            raise NotImplementedError(f"AtenOnly has no {func}")
        unwrap = lambda t: t.wrapped if isinstance(t, cls) else t  # noqa: E731
        result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return tree_map(lambda t: cls(t) if isinstance(t, Tensor) else t, result)


SUBCLASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "__torch_function__": lambda t: t.detach().as_subclass(Tagged).requires_grad_(t.requires_grad),
    "TwoTensor": lambda t: TwoTensor(t.detach(), 2 * t.detach()).requires_grad_(t.requires_grad),
    "aten only": lambda t: AtenOnly(t.detach()).requires_grad_(t.requires_grad),
}


def of_subclass(name: str, wrap: Callable[[Tensor], Tensor]) -> None:
    @row(f"subclass {name}, as input")
    def as_input(norm: Norm) -> Any:
        return learn(norm.module(), tuple(wrap(t) for t in norm.args(grad=True)))

    @row(f"subclass {name}, as weight")
    def as_weight(norm: Norm) -> Any:
        module = norm.module()
        for key, parameter in list(module.named_parameters()):
            module.register_parameter(key, nn.Parameter(wrap(parameter)))
        return learn(module, norm.args(grad=True))

    @row(f"subclass {name}, as both")
    def as_both(norm: Norm) -> Any:
        module = norm.module()
        for key, parameter in list(module.named_parameters()):
            module.register_parameter(key, nn.Parameter(wrap(parameter)))
        with torch.no_grad():
            inferred = module(*(wrap(t) for t in norm.args()))
        return [inferred, learn(module, tuple(wrap(t) for t in norm.args(grad=True)))]


for _name, _wrap in SUBCLASSES.items():
    of_subclass(_name, _wrap)


@row("subclass that logs, seen once by its public name")
def logging_subclass(norm: Norm) -> Any:
    module, args = norm.module(), [t.as_subclass(Named) for t in norm.args()]
    Named.names.clear()
    with torch.no_grad():
        kinds = [type(t) for t in tensors_of(module(*args))]
    return [kinds, Named.names.count(norm.public)]


@row("MaskedTensor", MASKED, MASKED_OPERATOR)
def masked(norm: Norm) -> Any:
    """torch takes those without a hole, and refuses others, as a row's mean has a mask of its own."""
    module, results = norm.module().requires_grad_(False), []
    for mask in (lambda t: t > 0, torch.isfinite):
        args = [torch.masked.masked_tensor(t, mask(norm.args()[0])) for t in norm.args()]
        results.append(attempt(lambda: [(type(t), t.get_data(), t.get_mask()) for t in tensors_of(module(*args))]))  # noqa: B023
    return results


def jagged(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """[7, columns] as rows of 2, 4 and 1, with the same offsets in every tensor."""
    offsets = torch.tensor([0, 2, 6, 7])
    return tuple(torch.nested.nested_tensor_from_jagged(t, offsets) for t in tensors)


def learn_jagged(function: Callable[..., Any], norm: Norm, module: nn.Module, columns: int) -> Any:
    leaves = norm.args(7, columns, grad=True)
    result = tensors_of(function(*jagged(leaves)))
    loss([t.values() for t in result]).backward()
    return [result, [t.grad for t in leaves], [p.grad for p in module.parameters()]]


@row("jagged NestedTensor", NESTED)
def nested(norm: Norm) -> Any:
    results = []
    for columns in COLUMNS:
        module = norm.module(columns)
        with torch.no_grad():
            results.append(attempt(lambda: module(*jagged(norm.args(7, columns)))))  # noqa: B023
        results.append(attempt(lambda: learn_jagged(module, norm, module, columns)))  # noqa: B023
    return results


@row("inputs of inference_mode, inside it")
def inference_inside(norm: Norm) -> Any:
    module = norm.module()
    with torch.inference_mode():
        result = tensors_of(module(*norm.args()))
        return [[t.is_inference() for t in result], [t.requires_grad for t in result], result]


@row("inputs of inference_mode, outside it")
def inference_outside(norm: Norm) -> Any:
    """Nothing can be recorded of such a tensor, and a trained weight asks for it."""
    module = norm.module()
    with torch.inference_mode():
        args = norm.args()
    recorded = attempt(lambda: module(*args))
    with torch.no_grad():
        return [recorded, attempt(lambda: module(*args)), attempt(lambda: module.requires_grad_(False)(*args))]


@row("FakeTensorMode")
def fake(norm: Norm) -> Any:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        module, mode = norm.module(dtype=dtype), FakeTensorMode()
        weights = {name: mode.from_tensor(p) for name, p in module.named_parameters()}
        args = tuple(mode.from_tensor(t) for t in norm.args(dtype=dtype, grad=True))
        outside = torch.func.functional_call(module, weights, args)
        with mode:
            inside = torch.func.functional_call(module, weights, args)
            gradients = torch.autograd.grad(loss(inside), (*args, *weights.values()))
        with torch.no_grad(), mode:
            results.append([outside, inside, gradients, torch.func.functional_call(module, weights, args)])
    return results


@row("torch.func.functionalize")
def functionalize(norm: Norm) -> Any:
    module = norm.module()
    with torch.no_grad():
        frozen = torch.func.functionalize(module)(*norm.args())
    return [frozen, learn(torch.func.functionalize(module), norm.args(grad=True), module)]
