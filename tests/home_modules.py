"""Rows of the table in test_home.py about modules: copies, files, packages, parametrizations, ensembles."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from home_compare import learn, loss, tensors_of
from home_norms import Norm, row
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.package import PackageExporter, PackageImporter

# Warnings of torch's machinery about itself; the rows that need one name it.
STORAGE = ("TypedStorage is deprecated", UserWarning)  # torch.package's own use of it


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


def found(name: str) -> Any:
    """The class or function that a checkpoint calls so."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@row("torch.save, weights_only=True")
def saved_safely(norm: Norm) -> Any:
    """What has to be allowed is what the norm's own class has to be allowed without us: no name of ours but the class's
    comes with it."""
    plain = norm.make(16, torch.float32)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(saved(plain))
    kind = f"{type(plain).__module__}.{type(plain).__qualname__}"
    with torch.serialization.safe_globals([found(name) for name in names]):
        result = twins(norm, lambda module: torch.load(saved(module), weights_only=True))
    return [result, kind in names, sorted(set(names) - {kind})]


@row("torch.package", STORAGE)
def packaged(norm: Norm) -> Any:
    def there_and_back(module: nn.Module) -> nn.Module:
        file = io.BytesIO()
        with PackageExporter(file) as exporter:
            exporter.extern(["torch.**", "rmsnorm.**", "transformers.**", "home_norms"])
            exporter.save_pickle("model", "norm.pkl", module)
        file.seek(0)
        return PackageImporter(file).load_pickle("model", "norm.pkl")

    return twins(norm, there_and_back)


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
    shapes = [
        (t.shape, t.device.type) for t in tensors_of(module(*(t.to("meta") for t in norm.args(dtype=torch.float64))))
    ]
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


@row("hooks")
def hooks(norm: Norm) -> Any:
    """Each is called once, and what it returns is used."""
    module, counts = norm.module(), [0, 0, 0]

    def before(module: nn.Module, args: tuple[Any, ...]) -> Any:
        counts[0] += 1
        return tuple(t * 2 for t in args)

    def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        counts[1] += 1
        return tuple(t + 1 for t in result) if isinstance(result, tuple) else result + 1

    def backward(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        counts[2] += 1
        return tuple(t * 3 for t in grad_input)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)
    module.register_full_backward_hook(backward)
    return [learn(module, norm.args(grad=True)), counts]


@row("to another dtype, parameters swapped")
def swapped(norm: Norm) -> Any:
    """``module.to`` then puts new tensors into the old parameters, which optimizers hold."""
    module = norm.module()
    before = list(module.parameters())
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    same = [a is b for a, b in zip(before, module.parameters(), strict=True)]
    return [same, learn(module, norm.args(dtype=torch.float64, grad=True))]
