"""The only file that walks a residual stream back, from a norm's input to the weights that wrote it.

A sum leads to both of its sides, a product with a number to its other side, what moves elements to what it moved; and
so on to embeddings, linear layers, convolutions, and tokens that are parameters. Anything else is written down as odd,
with the words for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from .graph import NORM, Node, Value
from .norms import Norm
from .readers import PRODUCTS, WHAT
from .views import MOVES, Untraceable, back, located

SUMS = frozenset({"add", "sub", "rsub"})
ZEROS = frozenset({"zeros", "new_zeros", "zeros_like", "full_zero"})


@dataclass(frozen=True)
class Write:
    """A weight that writes into a stream."""

    node: Node | None
    weight: str
    axis: int
    """Which of its axes lies along the stream."""
    scale: str = ""
    """A parameter that multiplies what it writes, channel by channel (layer scale)."""


@dataclass(eq=False)
class Stream:
    """One residual stream."""

    width: int
    norms: list[str] = field(default_factory=list)
    """Those that read it."""
    values: dict[Value, int] = field(default_factory=dict)
    """What was passed, and the dimension of each that channels run along."""
    nodes: set[Node] = field(default_factory=set)
    """The operators that only add it up,"""
    writers: set[Node] = field(default_factory=set)
    """and those that write into it: what else they read isn't in it."""
    writes: dict[Write, None] = field(default_factory=dict)
    odd: dict[Value, str] = field(default_factory=dict)
    """What comes into it otherwise, and what it is."""
    refused: str = ""
    entry: tuple[str, int | str] | None = None
    """A module and its argument, where the stream begins behind what no weight writes."""

    def join(self, other: Stream) -> None:
        self.norms += [name for name in other.norms if name not in self.norms]
        self.values |= other.values
        self.writes |= other.writes
        self.odd |= other.odd
        self.nodes |= other.nodes
        self.writers |= other.writers
        self.refused = self.refused or other.refused


class Walk:
    """One walk; what it finds is in its stream."""

    def __init__(
        self, model: nn.Module, norms: Mapping[str, Norm], through: Callable[[Norm], bool], stream: Stream
    ) -> None:
        self.model, self.norms, self.through, self.stream = model, norms, through, stream

    def back(self, start: Value, dim: int) -> None:
        ahead = [(start, dim)]
        while ahead:
            value, dim = ahead.pop()
            if value in self.stream.values:
                continue
            self.stream.values[value] = dim
            try:
                ahead += self.before(value, dim)
            except Untraceable as reason:
                verb = str(reason).startswith(("is ", "meets "))  # of views.py, said of a value
                self.stream.odd[value] = f"something that {reason}" if verb else str(reason)

    def before(self, value: Value, dim: int) -> list[tuple[Value, int]]:
        """What a value of the stream is made of: values of the stream. Weights that wrote it are written down."""
        if value.weight:
            self.write(None, value.weight, dim)
            return []
        node = value.producer
        if node is None:
            raise Untraceable("an input of the model itself")
        found = list(self.sources(node, value, dim))
        if node not in self.stream.writers:
            self.stream.nodes.add(node)
        return found

    def sources(self, node: Node, value: Value, dim: int) -> Iterator[tuple[Value, int]]:
        name = node.name
        if name in PRODUCTS or name in ("embedding", "convolution"):
            self.linear(node, dim, value)
            return
        if name == NORM:
            norm = self.norms.get(node.module)
            if norm is None or not self.through(norm):
                raise Untraceable(f"the output of the norm {node.module} (post-norm)")
            yield node.inputs()[0], dim
        elif name in ZEROS:
            return
        elif name in MOVES or name in ("mean", "sum", "index_add", "index_put", "scatter_add", "copy"):
            yield from self.moved(node, value, dim)
        elif name in SUMS:
            numbers = [one for one in node.args[:2] if not isinstance(one, Value) and one]
            if numbers:
                raise Untraceable(f"the number {numbers[0]}, added in {node.module}")
            yield from self.aligned(node, value, dim, node.inputs())
        elif name in ("mul", "div"):
            yield from self.scaled(node, value, dim)
        elif name in ("where", "masked_fill") and self.same(node.args[0 if name == "where" else 1], value, dim):
            rest = [one for one in node.inputs() if one is not node.args[0 if name == "where" else 1]]
            if name == "masked_fill" and (len(rest) > 1 or node.args[2]):
                raise Untraceable(f"a number that masked_fill writes in {node.module}")
            yield from self.aligned(node, value, dim, rest)
        else:
            raise Untraceable(f"what {WHAT.get(name, name)} makes in {node.module or 'the model'}")

    def moved(self, node: Node, value: Value, dim: int) -> Iterator[tuple[Value, int]]:
        name = node.name
        parts = [one for one in node.inputs() if one.tensor.is_floating_point()]
        if name in ("cat", "stack"):
            along = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            if along % value.tensor.dim() == dim:
                raise Untraceable(f"channels side by side, joined in {node.module}")
            shift = int(name == "stack" and along % value.tensor.dim() < dim)
            yield from ((one, dim - shift) for one in parts)
        elif name in ("mean", "sum"):
            if value.tensor.dim() != parts[0].tensor.dim():
                dims = node.args[1] if len(node.args) > 1 and node.args[1] else range(parts[0].tensor.dim())
                left = [i for i in range(parts[0].tensor.dim()) if i not in {d % parts[0].tensor.dim() for d in dims}]
                dim = left[dim]
            if parts[0].tensor.shape[dim] != self.stream.width:
                raise Untraceable(f"what {name} makes in {node.module}")
            yield parts[0], dim
        elif name in ("index_add", "index_put", "scatter_add", "copy"):
            rows = [one for one in parts if one.tensor.dim() and one.tensor.shape[-1] == self.stream.width]
            if dim != value.tensor.dim() - 1 or len(rows) != len(parts):
                raise Untraceable(f"what {name} writes in {node.module}")
            yield from ((one, one.tensor.dim() - 1) for one in rows)
        else:
            yield parts[0], back(node, parts[0].tensor, value.tensor, dim)

    def aligned(self, node: Node, value: Value, dim: int, parts: list[Value]) -> Iterator[tuple[Value, int]]:
        """Operands of a broadcast: each has to have all channels."""
        for one in parts:
            own = dim - value.tensor.dim() + one.tensor.dim()
            if own < 0 or one.tensor.shape[own] != self.stream.width:
                raise Untraceable(f"a number for all channels, added in {node.module}")
            yield one, own

    def same(self, other: object, value: Value, dim: int) -> bool:
        """Whether a factor or a mask is the same for all channels."""
        if not isinstance(other, Value):
            return True
        own = dim - value.tensor.dim() + other.tensor.dim()
        return own < 0 or other.tensor.shape[own] == 1

    def scaled(self, node: Node, value: Value, dim: int) -> Iterator[tuple[Value, int]]:
        """A product: with what is the same for all channels, or with a parameter for each, behind a linear layer."""
        common = [self.same(one, value, dim) for one in node.args[:2]]
        if common == [False, True] or (common == [True, False] and node.name == "mul"):
            yield from self.aligned(node, value, dim, [node.args[common.index(False)]])
            return
        for one, other in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            if common == [False, False] and node.name == "mul" and (scale := _parameter(self.model, one)):
                self.layer_scale(other, dim - value.tensor.dim() + other.tensor.dim(), scale)
                return
        raise Untraceable(f"a product of two tensors, formed in {node.module}")

    def layer_scale(self, value: Value, dim: int, scale: str) -> None:
        """The scale goes into the linear layer before it, if nobody else reads what that makes."""
        node = value.producer
        while node and node.name in MOVES - {"cat", "stack"} and len(value.readers) == 1:
            before = node.inputs()[0]
            self.stream.nodes.add(node)
            value, dim = before, back(node, before.tensor, value.tensor, dim)
            node = value.producer
        if node is None or node.name not in PRODUCTS or len(value.readers) != 1:
            raise Untraceable(f"a residual scaled channel by channel with {scale}, and no linear layer before it")
        self.linear(node, dim, value, scale)
        self.stream.nodes.add(node)

    def linear(self, node: Node, dim: int, value: Value, scale: str = "") -> None:
        name = node.name
        at = PRODUCTS.get(name, 0)
        weight, bias = node.args[at + 1], node.args[0] if at else node.args[2] if len(node.args) > 2 else None
        last = value.tensor.dim() - 1
        if name == "embedding":
            weight, bias, axis = node.args[0], None, 1
        elif name == "convolution":
            axis, last = 0, 1
        else:
            axis = weight.tensor.dim() - (2 if name == "linear" else 1)
            bias = bias if at or name == "linear" else None
        if dim != last or (name == "convolution" and node.args[6]):
            raise Untraceable(f"the other axis of a product in {node.module}")
        for one, along in ((weight, axis), (bias, -1)):
            if isinstance(one, Value):
                self.stream.writers.add(node)
                self.write(node, *located(self.model, one, along), scale)

    def write(self, node: Node | None, weight: str, axis: int, scale: str = "") -> None:
        size = self.model.get_parameter(weight).shape[axis] if _is_parameter(self.model, weight) else 0
        if not size:
            raise Untraceable(f"the buffer {weight}")
        if size != self.stream.width:
            raise Untraceable(f"a part of what {weight} makes")
        self.stream.writes[Write(node, weight, axis, scale)] = None


def _is_parameter(model: nn.Module, name: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    return attribute in model.get_submodule(owner)._parameters


def _parameter(model: nn.Module, value: object) -> str:
    """The name of the parameter of one number for each channel that a value is."""
    if not isinstance(value, Value):
        return ""
    try:
        name, _ = located(model, value, -1)
    except Untraceable:
        return ""
    return name if value.tensor.numel() == value.tensor.shape[-1] and _is_parameter(model, name) else ""
