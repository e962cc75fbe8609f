"""The only file that watches a model compute: which tensor flows into which operator, from which weight, and where.

Names prove nothing here either: an ``input_layernorm`` may feed a router, a residual may be scaled. So the model runs
once on real inputs while a dispatch mode writes down every operator of torch. A norm is one node, whatever it is made
of. Weights are leaves, known by their storage, so a slice or a transposed view of a weight is that weight.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..models.rehearsal import rehearsing
from .graph import NORM, STALE, Call, Graph, Node, Value, mapped, outline


def trace(model: nn.Module, norms: Mapping[str, Any], inputs: Iterable[Any]) -> Graph:
    """Runs the model on each of the inputs, and writes down what it does.

    Args:
        model: in the state in which it is called; it is run in evaluation mode.
        norms: names of the modules that are one node.
        inputs: for each run the keyword arguments, or a tuple of positional ones.
    """
    graph = Graph()
    for given in inputs:
        _Tracer(model, frozenset(norms), graph).run(given)
    return graph


def call(model: nn.Module, given: Any) -> Any:
    """The model's output for keyword arguments, a tuple of arguments, or one tensor."""
    if isinstance(given, Mapping):
        return model(**given)
    return model(*given) if isinstance(given, tuple) else model(given)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no fused attention of ``nn.MultiheadAttention``, which hides its linear layers;
    then each module's own mode and state again."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(False), torch.no_grad(), rehearsing(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Tracer(TorchDispatchMode):
    def __init__(self, model: nn.Module, norms: frozenset[str], graph: Graph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.norms, self.graph = model, norms, graph
        self.values: dict[int, Value] = {}
        """Of each tensor that exists, by its id;"""
        self.ends: dict[int, weakref.ref[Tensor]] = {}
        """and what forgets it when it ends: another may get its id."""
        self.storages: dict[int, set[int]] = {}
        """Of each memory the tensors that lie in it."""
        self.path: list[str] = [""]
        self.inside = 0
        """How deep in a norm: nothing is written down there."""
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self._new(tensor, weight=name)

    def run(self, given: Any) -> None:
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                before = module.register_forward_pre_hook(self._enters(name), with_kwargs=True)
                after = module.register_forward_hook(self._leaves(name), prepend=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            with evaluating(self.model), self:
                output = call(self.model, given)
        for name, tensor in results(output).items():
            self.graph.results[name] = self._value(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        written = [i for i, one in enumerate(func._schema.arguments) if one.alias_info and one.alias_info.is_write]
        given = mapped((args, kwargs), Tensor, self._value)
        output = func(*args, **kwargs)
        node = Node(func.__name__, self.path[-1], func, *given)
        self._add(node)
        seen = set()
        for i in written:
            target = args[i] if i < len(args) else kwargs.get(func._schema.arguments[i].name)
            for one in (one for one in tree_leaves(target) if isinstance(one, Tensor)):
                self._overwritten(one, node)
                seen.add(id(one))
        for one in tree_leaves(output):
            if isinstance(one, Tensor) and id(one) not in seen:
                node.outputs.append(self._new(one, node))
        return output

    def _add(self, node: Node) -> None:
        self.graph.nodes.append(node)
        for value in node.inputs():
            value.readers.append(node)
            if value.weight:
                self.graph.used.add(value.weight)

    def _value(self, tensor: Tensor) -> Value:
        found = self.values.get(id(tensor))
        return self._new(tensor) if found is None else found

    def _new(self, tensor: Tensor, producer: Node | None = None, weight: str = "") -> Value:
        key = id(tensor)
        value = Value(tensor if weight else outline(tensor), tensor.device, producer, weight)
        if key not in self.values and tensor.layout is torch.strided:
            place = _storage(tensor)
            self.storages.setdefault(place, set()).add(key)
            self.ends[key] = weakref.ref(tensor, lambda _: self._forget(key, place))
        self.values[key] = value
        return value

    def _forget(self, key: int, place: int) -> None:
        self.values.pop(key, None)
        self.ends.pop(key, None)
        self.storages[place].discard(key)

    def _overwritten(self, tensor: Tensor, node: Node) -> None:
        """Gives it a new value. Who reads another view of its memory afterwards reads what nobody followed."""
        for key in tuple(self.storages.get(_storage(tensor), ())):
            if key != id(tensor) and (other := self.values.get(key)):
                self.values[key] = Value(other.tensor, other.device, Node(STALE, self.path[-1]))
        node.outputs.append(self._new(tensor, node))

    def _enters(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.inside:
                self.inside += 1
                return
            self.path.append(name)
            given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            for key, one in given:
                if isinstance(one, Tensor):
                    self.graph.calls.append(Call(name, key, self._value(one)))
            if name in self.norms:
                self.inside = 1
                self._measured(name, [one for _, one in given if isinstance(one, Tensor)][0 if args else -1])

        return hook

    def _leaves(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self.inside > 1:
                self.inside -= 1
                return
            if self.inside:
                self._norm(name, args, output)
                self.inside = 0
            self.path.pop()

        return hook

    def _norm(self, name: str, args: tuple[Any, ...], output: Tensor) -> None:
        called = [one.value for one in self.graph.calls[-4:] if one.module == name]
        values = [self._value(one) for one in args if isinstance(one, Tensor)] or called[-1:]
        node = Node(NORM, name, args=tuple(values))
        self._add(node)
        node.outputs.append(self._new(output, node))
        owner = self.model.get_submodule(name)
        self.graph.used |= {f"{name}.{own}".lstrip(".") for own, _ in owner.named_parameters()}

    def _measured(self, name: str, given: Tensor) -> None:
        x = given.double()
        if x.numel():
            least, largest = float(x.square().mean(-1).min()), float(x.abs().max())
            self.graph.least[name] = min(least, self.graph.least.get(name, least))
            self.graph.largest[name] = max(largest, self.graph.largest.get(name, largest))


DEPTH = 9
"""How many holders, one in the other, an output is looked for in: an object may hold itself."""


def results(output: Any) -> dict[str, Tensor]:
    """What counts of a model's output: its floating-point tensors at the top. What lies deeper, or is the ``encoder_…``
    of a model with a decoder, are states on the way, which surgery may change; unless nothing lies at the top.

    Raises:
        ValueError: there is nothing that could be compared.
    """
    if isinstance(output, Tensor):
        return {"output": output}
    level, found = [("", output)], dict[str, Tensor]()
    for _ in range(DEPTH):
        level = [(f"{name}.{key}".lstrip("."), one) for name, holder in level for key, one in _held(holder)]
        found = {n: t for n, t in level if isinstance(t, Tensor) and t.is_floating_point() and n[:8] != "encoder_"}
        if found:
            break
    if not found:
        raise ValueError(f"nothing to compare: the model's {type(output).__name__} holds no floating-point tensors")
    return found


def _held(holder: Any) -> list[tuple[Any, Any]]:
    """What an output holds, by name or number; of an object its attributes."""
    if isinstance(holder, tuple | list):
        return [*enumerate(holder)]
    if hasattr(holder, "items"):
        return [*holder.items()]
    return [*getattr(holder, "__dict__", {}).items()] if not isinstance(holder, Tensor) else []


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a subclass without memory of its own: quantised weights
        return id(tensor)
