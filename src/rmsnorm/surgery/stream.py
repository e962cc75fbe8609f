"""The only file that knows residual streams: what writes into each, which norms read it, and who else does.

From a norm's input one walks back: a sum leads to both of its sides, a product with a number to its other side, and so
on to the weights that wrote: embeddings, linear layers, convolutions, tokens that are parameters. Norms whose ways meet
read the same stream, and so do those that one weight writes for. Then everybody who reads what was passed is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from .norms import Norm
from .readers import MOVES, PRODUCTS, WHAT, Untraceable, back, located
from .trace import NORM, Graph, Node, Value

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
    """The operators that only add it up."""
    writes: dict[Write, None] = field(default_factory=dict)
    odd: dict[Value, str] = field(default_factory=dict)
    """What comes into it otherwise, and what it is."""
    refused: str = ""
    entry: tuple[str, int | str] | None = None
    """A module and its argument, where the stream begins behind what no weight writes."""

    def join(self, other: Stream) -> None:
        self.norms += [name for name in other.norms if name not in self.norms]
        for mine, theirs in ((self.values, other.values), (self.writes, other.writes), (self.odd, other.odd)):
            mine.update(theirs)  # type: ignore[attr-defined]
        self.nodes |= other.nodes
        self.refused = self.refused or other.refused


def find(model: nn.Module, graph: Graph, norms: Mapping[str, Norm], through: Callable[[Norm], bool]) -> list[Stream]:
    """The streams that the norms read. ``through`` says of which norms the output may be a part of the stream of their
    input: it commutes with what is to be done."""
    walks = []
    for node in graph.nodes:
        if node.op == NORM and node.module in norms:
            value = node.inputs()[0]
            stream = Stream(value.tensor.shape[-1], [node.module])
            _Walk(model, norms, through, stream).back(value, value.tensor.dim() - 1)
            walks.append(stream)
    return _joined(walks)


def _joined(walks: list[Stream]) -> list[Stream]:
    """Those that have a norm, a value or a weight in common are one."""
    streams: list[Stream] = []
    for walk in walks:
        keys = _keys(walk)
        for other in [other for other in streams if keys & _keys(other)]:
            if other.width != walk.width:
                continue
            walk.join(other)
            streams.remove(other)
        streams.append(walk)
    return streams


def _keys(stream: Stream) -> set[object]:
    return {*stream.norms, *stream.values, *((one.weight, one.axis) for one in stream.writes)}


class _Walk:
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
                self.stream.odd[value] = str(reason)

    def before(self, value: Value, dim: int) -> list[tuple[Value, int]]:
        """What a value of the stream is made of: values of the stream. Weights that wrote it are written down."""
        if value.weight:
            self.write(None, value.weight, dim)
            return []
        node = value.producer
        if node is None:
            raise Untraceable("an input of the model itself")
        found = list(self.sources(node, value, dim))
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
            raise Untraceable(f"what {WHAT.get(name, name)} makes in {node.module}")

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
        while value.producer and value.producer.name in MOVES - {"cat", "stack"} and len(value.readers) == 1:
            before = value.producer.inputs()[0]
            self.stream.nodes.add(value.producer)
            value, dim = before, back(value.producer, before.tensor, value.tensor, dim)
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
                self.write(node, *located(self.model, one, along), scale)

    def write(self, node: Node | None, weight: str, axis: int, scale: str = "") -> None:
        size = self.model.get_parameter(weight).shape[axis] if _is_parameter(self.model, weight) else 0
        if not size:
            raise Untraceable(f"the buffer {weight}")
        if size != self.stream.width:
            raise Untraceable(f"a part of {weight}")
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


def enter(graph: Graph, stream: Stream) -> None:
    """Where something comes into a stream that no weight writes, but before its first norm, the stream may begin anew
    behind it: at an argument of a module through which all of that goes, and nothing past it."""
    if not stream.odd or len(stream.norms) < 2:
        return
    calls: dict[tuple[str, int | str], set[Value]] = {}
    for call in graph.calls:
        if call.value in stream.values:
            calls.setdefault((call.module, call.key), set()).add(call.value)
    for (module, key), gates in calls.items():
        behind = _behind(stream, gates)
        made = {value.producer for value in behind if value.producer}
        inside = (node.module == module or node.module.startswith(f"{module}.") for v in gates for node in v.readers)
        if not (set(stream.odd) <= behind and module and all(inside)):
            continue
        if any(node not in made for value in behind - gates if not value.weight for node in value.readers):
            continue
        stream.entry = module, key
        stream.odd = {}
        weights = {value.weight for value in behind if value.weight}
        stream.writes = {w: None for w in stream.writes if w.node not in made and (w.node or w.weight not in weights)}
        stream.values = {value: dim for value, dim in stream.values.items() if value not in behind - gates}
        stream.nodes -= made
        return


def _behind(stream: Stream, gates: set[Value]) -> set[Value]:
    """What of the stream these were made of, and they themselves."""
    behind: set[Value] = set()
    ahead = list(gates)
    while ahead:
        value = ahead.pop()
        if value not in behind and value in stream.values:
            behind.add(value)
            ahead += value.producer.inputs() if value.producer else []
    return behind


def ahead(graph: Graph, stream: Stream) -> None:
    """Refuses a stream that somebody reads who isn't one of its norms."""
    alive = _alive(graph)
    results = {value: name for name, value in graph.results.items()}
    waiting = list(stream.values)
    while waiting:
        value = waiting.pop()
        if value in results:
            stream.refused = stream.refused or f"the model returns it as {results[value]}"
        if value.weight:
            continue
        for node in value.readers:
            if node in stream.nodes or node not in alive or (node.op == NORM and node.module in stream.norms):
                continue
            if node.name in MOVES - {"cat", "stack"}:
                stream.nodes.add(node)
                dim = stream.values[value]
                for output in node.outputs:
                    try:
                        stream.values[output] = _after(node, value, output, dim)
                    except Untraceable as reason:
                        stream.refused = stream.refused or str(reason)
                    else:
                        waiting.append(output)
            else:
                what = WHAT.get(node.name, node.name) if node.op != NORM else f"the norm {node.module}"
                stream.refused = stream.refused or f"{what} in {node.module or 'the model'} reads it"


def _after(node: Node, before: Value, after: Value, dim: int) -> int:
    for own in range(after.tensor.dim()):
        if after.tensor.shape[own] == before.tensor.shape[dim] and back(node, before.tensor, after.tensor, own) == dim:
            return own
    raise Untraceable(f"{node.name} in {node.module} rearranges it")


def _alive(graph: Graph) -> set[Node]:
    """The operators that have a part in what the model returns."""
    alive: set[Node] = set()
    ahead = list(graph.results.values())
    while ahead:
        node = ahead.pop().producer
        if node is not None and node not in alive:
            alive.add(node)
            ahead += node.inputs()
    return alive
