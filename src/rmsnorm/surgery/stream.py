"""The only file that knows residual streams: which norms read each, and who else does.

Norms whose walks meet read the same stream, and so do those that one weight writes for. Then everybody who reads what
was passed is asked: a stream that anything but its norms reads can't be changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from .graph import NORM, Graph, Node, Value
from .norms import Norm
from .readers import WHAT
from .views import MOVES, SHAPES, Untraceable, back
from .walk import Stream, Walk, Write


def find(model: nn.Module, graph: Graph, norms: Mapping[str, Norm], through: Callable[[Norm], bool]) -> list[Stream]:
    """The streams that the norms read. ``through`` says of which norms the output may be a part of the stream of their
    input: it commutes with what is to be done."""
    walks = []
    for node in graph.nodes:
        if node.op == NORM and node.module in norms:
            value = node.inputs()[0]
            stream = Stream(value.tensor.shape[-1], [node.module])
            Walk(model, norms, through, stream).back(value, value.tensor.dim() - 1)
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


def tokens(model: nn.Module, graph: Graph, stream: Stream) -> list[str]:
    """Adds tokens that never ran, beside others that did: a mask's, which only some calls ask for. They write into the
    stream, too, where they do. Returns their names."""
    beside = {one.weight.rpartition(".")[0] for one in stream.writes if one.node is None}
    found = []
    for name, one in model.named_parameters():
        token = one.dim() and one.numel() == one.shape[-1] == stream.width
        if token and name not in graph.used and name.rpartition(".")[0] in beside:
            stream.writes[Write(None, name, one.dim() - 1)] = None
            found.append(name)
    return found


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
        stream.writers -= made
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
            if (
                node in stream.nodes
                or node not in alive
                or node.name in SHAPES
                or (node.op == NORM and node.module in stream.norms)
            ):
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
