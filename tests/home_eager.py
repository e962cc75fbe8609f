"""Rows of the table in test_home.py without a graph: kinds of tensors and modes, what is done to modules, autograd."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from home_norms import COLUMNS, Norm, attempt, learn, loss, tensors_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

Row = Callable[[Norm], Any]
Filter = tuple[str, type[Warning]]  # a pattern and a kind of the warnings to ignore
ROWS: dict[str, Row] = {}
FILTERS: dict[str, tuple[Filter, ...]] = {}

# Warnings of torch's machinery about itself; the rows that need one name it.
MISMATCH = ("Mismatch dtype between input and weight", UserWarning)  # F.rms_norm's of a wider weight
MASKED = (".*MaskedTensors is in prototype stage", UserWarning)  # any use of masked tensors
MASKED_OPERATOR = (".* is not implemented in __torch_dispatch__ for MaskedTensor", UserWarning)  # before the error
ANOMALY = ("Anomaly Detection has been enabled", UserWarning)  # any use of detect_anomaly
NAN_FOUND = ("Error detected in", UserWarning)  # detect_anomaly's, before the error that it is for
NESTED = (".*nested tensors is in prototype stage", UserWarning)  # any use of nested tensors


def row(name: str, *filters: Filter) -> Callable[[Row], Row]:
    def register(function: Row) -> Row:
        assert name not in ROWS
        ROWS[name], FILTERS[name] = function, filters
        return function

    return register


@row("called")
def called(norm: Norm) -> Any:
    """Not a word of anything else: if this cell fails, so do the others."""
    return [learn(norm.module(columns), norm.args(2, 5, columns, grad=True)) for columns in COLUMNS]


@row("one column")
def one_column(norm: Norm) -> Any:
    return learn(norm.module(1), norm.args(2, 5, 1, grad=True))


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

    names: list[str] = []

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
    for mask in (lambda t: t > 0, lambda t: t == t):
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


@row("replica of DataParallel")
def replica(norm: Norm) -> Any:
    """As torch.nn.parallel.replicate does it: a shallow copy, which is given copies of the parameters as attributes."""
    module = norm.module()
    shallow = module._replicate_for_data_parallel()
    for name, parameter in norm.module(seed=1).named_parameters():
        setattr(shallow, name, parameter.detach().clone())
    return [module(*norm.args()), shallow(*norm.args())]


@row("copy.copy with another weight")
def copied(norm: Norm) -> Any:
    module = norm.module()
    shallow = copy.copy(module)
    shallow._parameters = dict(norm.module(seed=1)._parameters)
    return [learn(m, norm.args(grad=True)) for m in (module, shallow)]


@row("copy.copy that is assigned a weight")
def copied_assigned(norm: Norm) -> Any:
    """A shallow copy shares its dict of parameters: assigned to the one, it is assigned to both."""
    module = norm.module()
    copy.copy(module).weight = norm.module(seed=1).weight
    return learn(module, norm.args(grad=True))


def twins(norm: Norm, duplicate: Callable[[nn.Module], nn.Module]) -> Any:
    """The duplicate computes with a weight of its own, and so does the original afterwards."""
    module = norm.module()
    twin = duplicate(module)
    with torch.no_grad():
        twin.weight.mul_(3)
    return [type(twin) is type(module), *(learn(m, norm.args(grad=True)) for m in (module, twin))]


@row("copy.deepcopy")
def deep(norm: Norm) -> Any:
    return twins(norm, copy.deepcopy)


@row("pickle")
def pickled(norm: Norm) -> Any:
    return twins(norm, lambda module: pickle.loads(pickle.dumps(module)))


def saved(thing: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


@row("torch.save, weights_only=False")
def saved_whole(norm: Norm) -> Any:
    return twins(norm, lambda module: torch.load(saved(module), weights_only=False))


@row("share_memory")
def shared(norm: Norm) -> Any:
    module = norm.module().share_memory()
    return [[p.is_shared() for p in module.parameters()], learn(module, norm.args(grad=True))]


@row("state_dict of torch's, both ways")
def state(norm: Norm) -> Any:
    module, other = norm.module(), norm.module(seed=1)
    other.load_state_dict(module.state_dict())
    return [list(module.state_dict()), learn(other, norm.args(grad=True))]


@row("to another dtype and back, by meta")
def moved(norm: Norm) -> Any:
    module = norm.module()
    state = {name: t.double() for name, t in module.state_dict().items()}
    module = module.double().to("meta")
    shapes = [(t.shape, t.device.type) for t in tensors_of(module(*(t.to("meta") for t in norm.args(dtype=torch.float64))))]
    module.load_state_dict(state, assign=True)
    return [shapes, learn(module, norm.args(dtype=torch.float64, grad=True))]


class Double(nn.Module):
    def forward(self, weight):
        return weight * 2


@row("parametrization of the weight")
def parametrized(norm: Norm) -> Any:
    module = norm.module()
    parametrize.register_parametrization(module, "weight", Double())
    results = [learn(module, norm.args(grad=True))]
    parametrize.remove_parametrizations(module, "weight")
    return [*results, learn(module, norm.args(grad=True))]


@row("prune")
def pruned(norm: Norm) -> Any:
    module = norm.module()
    prune.l1_unstructured(module, "weight", 0.5)
    results = [learn(module, norm.args(grad=True))]
    prune.remove(module, "weight")
    return [*results, learn(module, norm.args(grad=True))]


@row("torch.func.functional_call")
def functional_call(norm: Norm) -> Any:
    module = norm.module()
    weights = {name: p.detach().clone().requires_grad_() for name, p in norm.module(seed=1).named_parameters()}
    args = norm.args(grad=True)
    result = torch.func.functional_call(module, weights, args)
    return [result, torch.autograd.grad(loss(result), (*args, *weights.values()))]


@row("ensemble: stack_module_state and vmap")
def ensemble(norm: Norm) -> Any:
    modules, args = [norm.module(seed=seed) for seed in range(3)], norm.args()
    weights, buffers = torch.func.stack_module_state(modules)
    call = lambda w, b, *a: torch.func.functional_call(modules[0], (w, b), a)  # noqa: E731
    number = lambda w, b, *a: loss(call(w, b, *a))  # noqa: E731
    over, each = (0, 0, *[None] * norm.arity), tuple(torch.stack([t, -t, 2 * t]) for t in args)
    result = torch.func.vmap(call, over)(weights, buffers, *args)
    gradients = torch.autograd.grad(loss(result), list(weights.values()))
    return [
        result,
        gradients,
        torch.func.vmap(call)(weights, buffers, *each),
        torch.func.vmap(torch.func.grad(number), over)(weights, buffers, *args),
        torch.func.vmap(torch.func.grad(number, 2))(weights, buffers, *each),
    ]


def autocast(norm: Norm, dtype: torch.dtype) -> Any:
    results = {}
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        module, args = norm.module(), norm.args(dtype=kind, grad=True)
        with torch.autocast("cpu", dtype):
            result = tensors_of(module(*args))
        gradients = torch.autograd.grad(loss([t.float() for t in result]), (*args, *module.parameters()))
        results[str(kind)] = [result, gradients]
    return results


@row("autocast to bfloat16", MISMATCH)
def autocast_bfloat16(norm: Norm) -> Any:
    return autocast(norm, torch.bfloat16)


@row("autocast to float16", MISMATCH)
def autocast_float16(norm: Norm) -> Any:
    return autocast(norm, torch.float16)


@row("checkpoint")
def checkpointed(norm: Norm) -> Any:
    results = []
    for reentrant in (True, False):
        module = norm.module()
        results.append(learn(lambda *a: checkpoint(module, *a, use_reentrant=reentrant), norm.args(grad=True), module))  # noqa: B023
    return results


@row("saved_tensors_hooks")
def saved_tensors(norm: Norm) -> Any:
    """What is kept passes through the hooks, and backward uses what they give back."""
    counts = [0, 0]

    def pack(t: Tensor) -> Tensor:
        counts[0] += 1
        return t.clone()

    def unpack(t: Tensor) -> Tensor:
        counts[1] += 1
        return t

    module = norm.module()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        result = learn(module, norm.args(grad=True))
    with torch.autograd.graph.save_on_cpu():
        offloaded = learn(norm.module(), norm.args(grad=True))
    return [result, offloaded, [count > 0 for count in counts]]


@row("a change to what was saved is an error")
def changed(norm: Norm) -> Any:
    module = norm.module()
    args = tuple(t * 1 for t in norm.args(grad=True))
    result = module(*args)
    with torch.no_grad():
        module.weight.add_(1)
    return attempt(lambda: loss(result).backward())


@row("detect_anomaly", ANOMALY, NAN_FOUND)
def anomaly(norm: Norm) -> Any:
    module, args = norm.module(), norm.args(grad=True)
    with torch.autograd.detect_anomaly():
        result = learn(module, args)
        args = [t.detach().mul(torch.nan).requires_grad_() for t in args]
        broken = sum(t.sum() for t in tensors_of(module(*args)))  # the first backward that makes a NaN is the norm's
        return [result, attempt(broken.backward)]


@row("profiler")
def profiler(norm: Norm) -> Any:
    """An event that is called after the norm; transformers' formula has none of its own, and isn't asked for one."""
    module, args = norm.module(), norm.args(grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = learn(module, args)
    names = {event.key for event in profile.key_averages()}
    called = any("rms_norm" in name or "layer_norm" in name for name in names)
    return [result, called or (not norm.ours and norm.public == "rsqrt")]
