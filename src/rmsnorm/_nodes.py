"""The only file that knows nodes of a graph of Inductor's: who reads whom, what is in memory, who takes whose place."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import make_contiguous_strides_for
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.fx.node import map_arg

aten = torch.ops.aten
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of which there are kernels."""
HALF = torch.bfloat16, torch.float16
_CASTS = frozenset({aten._to_copy.default, torch.ops.prims.convert_element_type.default})
_VIEWS = frozenset(
    {getattr(aten, name).default for name in ("view", "_unsafe_view", "reshape", "permute", "t", "unsqueeze", "expand")}
    | {aten.squeeze.dim, aten.squeeze.dims, aten.transpose.int}
)
_WRITTEN = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default})
"""Operators of aten's whose results Inductor writes to memory; most others it computes where they are read."""


def filled(node: Node) -> list[Any]:
    """Its arguments, and the defaults of those that weren't given."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    return [*node.args, *(argument.default_value for argument in schema.arguments[len(node.args) :])]


def results(node: Node, place: int) -> list[Node]:
    """Where a result of an operator is taken from the tuple; the node itself, if there is only one."""
    if isinstance(node.meta.get("val"), Tensor):
        return [node] if place == 0 else []
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == place]


def producer(node: Any) -> Node | None:
    """The operator whose first result it is."""
    if isinstance(node, Node) and node.target is operator.getitem:
        return node.args[0] if node.args[1] == 0 else None  # type: ignore[return-value]
    return node if isinstance(node, Node) else None


def only_user(nodes: Sequence[Node]) -> Node | None:
    users = [user for node in nodes for user in node.users]
    return users[0] if len(nodes) == 1 and len(users) == 1 else None


def precede(node: Node, *others: Any) -> bool:
    return all(not isinstance(one, Node) or one < node for one in others)


def follow(node: Node, taken: Iterable[Node]) -> bool:
    """Whether nothing before it uses these."""
    return all(node < user for one in taken for user in one.users)


def is_own_type(norm: Node) -> bool:
    """Whether the output has the input's type."""
    first: Any = norm.args[0]
    value = norm.meta["val"]
    return (value if isinstance(value, Tensor) else value[0]).dtype is first.meta["val"].dtype


def known_equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and statically_known_true(sym_eq(tuple(a), tuple(b)))


def is_written(node: Node) -> bool:
    """Whether it lies in memory anyway: to write what Inductor would compute where it is read costs the pass over
    memory that joining saves. What a norm or a matrix product reads does: so are the sums of a residual stream."""
    while node.op == "call_function" and node.target in _VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    return not _is_computed(node) or any(reads_memory(user) for user in node.users)


def reads_memory(node: Node) -> bool:
    """Whether its arguments are written before, or, of a view, those of all that read it."""
    if node.op == "call_function" and node.target in _VIEWS:
        return all(map(reads_memory, node.users))
    return not _is_computed(node)


def _is_computed(node: Node) -> bool:
    """Whether Inductor may compute it in the loop that reads it, and what it reads in its own."""
    if node.op != "call_function" or node.target is operator.getitem or node.target in _WRITTEN:
        return False
    return getattr(node.target, "namespace", "aten") in ("aten", "prims")


def call(graph: Graph, target: Any, *arguments: Any) -> Node:
    """A node, with what it would compute, without data."""
    node = graph.call_function(target, arguments)
    node.meta["val"] = target(*map_arg(arguments, lambda one: one.meta["val"]))
    return node


def replace(graph: Graph, joined: Node, taken: Sequence[Sequence[Node]]) -> None:
    """Its results take the place of these nodes."""
    for place, old in enumerate(taken):
        if not old:
            continue
        new = joined
        if not isinstance(joined.meta["val"], Tensor):
            new = graph.call_function(operator.getitem, (joined, place))
            new.meta["val"] = joined.meta["val"][place]
        for node in old:
            node.replace_all_uses_with(new)


def erase(graph: Graph, nodes: Iterable[Node]) -> None:
    """Those of them that nobody uses."""
    for node in sorted(set(nodes), reverse=True):
        if not node.users:
            graph.erase_node(node)


def is_contiguous(value: Tensor) -> bool:
    return known_equal(value.stride(), make_contiguous_strides_for(value.shape))


def operands(node: Any, target: Any = aten.add.Tensor) -> tuple[Node, Node] | None:
    """Of a sum, or a product, of two tensors of one shape and type on the CPU, which is contiguous."""
    if not isinstance(node, Node) or node.target is not target or node.kwargs or len(node.args) != 2:
        return None
    values = [one.meta.get("val") if isinstance(one, Node) else None for one in (node, *node.args)]
    sum: Any = values[0]
    for value in values:
        if not isinstance(value, Tensor) or value.device.type != "cpu" or value.dtype not in TYPES:
            return None
        if value.dtype is not sum.dtype or not known_equal(value.shape, sum.shape):
            return None
    return node.args if is_contiguous(sum) else None  # type: ignore[return-value]


def partner(node: Node, one: Node, target: Any = aten.add.Tensor) -> Node | None:
    """What is added to it, or multiplied with it, if that is another tensor, and lies in memory."""
    if not (both := operands(node, target)) or both[0] is both[1]:
        return None
    other = both[both[0] is one]
    return other if is_written(other) else None


def scaled(node: Any) -> tuple[Node, float] | None:
    """Of a product with a number what is multiplied, and the number."""
    if not isinstance(node, Node) or node.target is not aten.mul.Tensor or node.kwargs:
        return None
    one, number = node.args
    if not isinstance(one, Node) or not isinstance(number, int | float):
        return None
    value, product = one.meta["val"], node.meta["val"]
    same = value.device.type == "cpu" and value.dtype is product.dtype
    return (one, float(number)) if same else None


def is_cast(node: Node) -> bool:
    """Whether it changes a type between float32 and a half type, and nothing else."""
    if node.target not in _CASTS or not set(node.kwargs) <= {"dtype"}:
        return False
    dtypes = node.args[0].meta["val"].dtype, node.meta["val"].dtype  # type: ignore[union-attr]
    return torch.float32 in dtypes and any(dtype in HALF for dtype in dtypes)


def is_served(rows: Sequence[Node], weight: Any, dims: Any, eps: Any) -> bool:
    """Whether _direct.py calls a kernel: contiguous rows, and a weight of one row, all of one type."""
    values = [one.meta["val"] for one in rows]
    gain: Any = None if weight is None else weight.meta["val"]
    dtypes = {value.dtype for value in values} | ({gain.dtype} if gain is not None else set())
    fits = gain is None or gain.dim() == dims
    return all(map(is_contiguous, values)) and fits and len(dtypes) == 1 and values[0].dtype in TYPES and eps >= 0


def become(
    graph: Graph, at: Node, target: Any, arguments: Sequence[Any], taken: Sequence[list[Node]], last: Node
) -> None:
    """An operator before ``at``: its results take the place of these nodes; ``last``, whose work it does, goes."""
    with graph.inserting_before(at):
        replace(graph, call(graph, target, *arguments), taken)
    gone = {node for old in taken for node in old}
    takers: set[Any] = {node.args[0] for node in gone if node.target is operator.getitem}
    erase(graph, gone | takers | {last, *last.users})
