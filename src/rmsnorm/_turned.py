"""The only file that finds rotary embedding behind the norms of query and key, in graphs of Inductor's.

    y = norm(head);  y·cos + rotate(y)·sin        heads_rms_norm_rope: query and key in one call, one pass over memory

as Llama's descendants write it: ``rotate`` is the second half of the columns, negated, and the first. Both norms have
one eps and one rounding, and one cosine and one sine turn both. In half types the products and their sum are rounded,
as in eager mode, where Inductor leaves that out: the bits are those of the steps one after the other.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ._nodes import TYPES, aten, call, erase, filled, is_own_type, known_equal, only_user, replace, results

_ours = torch.ops.rmsnorm
_JOINED = {
    _ours.rms_norm.default: _ours.heads_rms_norm_rope.default,
    _ours.rms_norm_forward.default: _ours.heads_rms_norm_rope_forward.default,
}
_BY_TOKENS = [0, 2, 1, 3]
"""The dimensions of what a projection wrote, [batch, tokens, heads, head_dim], in the order that attention wants."""


@dataclass(frozen=True)
class _Turn:
    """One norm, and the rotation behind it."""

    norm: Node
    moved: bool
    """Whether heads and tokens change places between the two."""
    cos: Node
    sin: Node
    turned: Node
    between: tuple[Node, ...]

    @property
    def options(self) -> tuple[Any, ...]:
        """What two must have in common."""
        return self.norm.target, self.moved, _bare(self.cos), _bare(self.sin), *filled(self.norm)[3:]


def join(graph: Graph) -> None:
    """Joins what can be, in pairs."""
    waiting: dict[tuple[Any, ...], _Turn] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _JOINED and not node.kwargs and (turn := _behind(node)):
            first = waiting.pop(turn.options, None)
            if first is None or not _fit(first, turn):
                waiting[turn.options] = turn
            else:
                _join(graph, first, turn)


def _behind(norm: Node) -> _Turn | None:  # noqa: PLR0911 - each way out is something else that stands there
    """The rotation behind a norm."""
    input, weight, dims, eps, *_ = filled(norm)
    output = results(norm, 0)
    value = input.meta["val"]
    plain = value.dim() == 4 and value.device.type == "cpu" and value.dtype in TYPES and is_own_type(norm)
    if not plain or dims != 1 or eps < 0 or len(output) != 1:
        return None
    if weight is not None and weight.meta["val"].dim() != 1:
        return None
    heads, move = output[0], only_user(output)
    if moved := move is not None and moves(move):
        assert move is not None
        heads = move
    by_cos = [user for user in heads.users if user.target is aten.mul.Tensor]
    turned = only_user(by_cos)
    if turned is None or turned.target is not aten.add.Tensor or turned.kwargs or len(turned.args) != 2:
        return None
    by_sin, cos = _other(turned, by_cos[0]), _other(by_cos[0], heads)
    quarter = next((one for one in _factors(by_sin) if one.target is aten.cat.default), None)
    if quarter is None or cos is None or by_sin is None or only_user([by_sin]) is not turned:
        return None
    sin, halves = _other(by_sin, quarter), _halves(quarter, heads)
    if sin is None or halves is None or {*heads.users} - {*halves, *by_cos} or only_user([quarter]) is not by_sin:
        return None
    if not (is_angle(cos, heads) and is_angle(sin, heads)):
        return None
    if not known_equal(turned.meta["val"].shape, heads.meta["val"].shape):
        return None
    between = (*output, heads, *by_cos, by_sin, quarter, *halves, turned)
    return _Turn(norm, moved, cos, sin, turned, between)


def moves(node: Any) -> bool:
    """Whether it lets heads and tokens change places."""
    if node.target is aten.transpose.int:
        return {dim % 4 for dim in node.args[1:]} == {1, 2}
    return node.target is aten.permute.default and [*node.args[1]] == _BY_TOKENS


def _factors(node: Any) -> Iterator[Node]:
    if isinstance(node, Node) and node.target is aten.mul.Tensor:
        yield from (one for one in node.args if isinstance(one, Node))


def _other(node: Node, one: Node) -> Node | None:
    """The other of two operands."""
    first, second = node.args[:2]
    other = second if first is one else first
    return other if isinstance(other, Node) and other is not one else None


def _halves(quarter: Any, heads: Node) -> set[Node] | None:
    """The nodes that make ``quarter``, which is (-b, a), of the halves a and b of the columns; None where others do."""
    parts, dim = quarter.args[0], quarter.args[1] if len(quarter.args) > 1 else 0
    columns = heads.meta["val"].shape[-1]
    if dim not in (3, -1) or not isinstance(columns, int) or columns % 2 or len(parts) != 2:
        return None
    negated, first = parts
    if negated.target is not aten.neg.default:
        return None
    second = negated.args[0]
    made, half = {negated, first, second}, columns // 2
    if first.target is operator.getitem and second.target is operator.getitem:
        split = first.args[0]
        right = split.target is aten.split.Tensor and [*split.args] in ([heads, half, 3], [heads, half, -1])
        right = right and first.args[1] == 0 and second.args == (split, 1) and len(split.users) == 2
        made.add(split)
    else:
        right = is_slice(first, heads, 0, half, columns) and is_slice(second, heads, half, columns, columns)
    alone = all(only_user([one]) is not None for one in (negated, first, second))
    return made if right and alone else None


def is_slice(node: Any, heads: Node, begin: int, end: int, columns: int) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    of, dim, first, last, step = filled(node)
    last = columns if last is None or last > columns else last
    return of is heads and dim in (3, -1) and (first or 0, last, step) == (begin, end, 1)


def _bare(angle: Node) -> Node:
    """Without the dimension of heads that was put there for the product."""
    dims = angle.meta["val"].dim()
    made = angle.target is aten.unsqueeze.default and angle.args[1] in (dims - 3, -3)
    return angle.args[0] if made else angle  # type: ignore[return-value]


def is_angle(angle: Node, heads: Node) -> bool:
    """Of the same type, and one for all heads."""
    value, given = angle.meta["val"], heads.meta["val"]
    if value.dtype is not given.dtype or value.device != given.device or not 2 <= value.dim() <= 4:
        return False
    one = value.dim() < 3 or statically_known_true(value.shape[-3] == 1)
    return one and known_equal(value.shape[-1:], given.shape[-1:])


def _fit(first: _Turn, last: _Turn) -> bool:
    """Whether both can be done where the last one was."""
    a, b = (turn.turned.meta["val"] for turn in (first, last))
    same = a.dtype is b.dtype and known_equal([a.shape[0], *a.shape[2:]], [b.shape[0], *b.shape[2:]])
    # Of each of its rows, forward keeps what heads_rms_norm_rope keeps by tokens.
    kept = any(results(turn.norm, 1) for turn in (first, last))
    return same and (last.moved or not kept) and _between(first, last) is not None


def _between(first: _Turn, last: _Turn) -> list[Node] | None:
    """What reads the first one's results before the last one is done: Inductor puts it there, for locality. None if the
    last one needs it, or if its place in the graph may matter."""
    found: list[Node] = []
    made, node = {first.turned, *results(first.norm, 1)}, first.norm
    while (node := node.next) is not last.turned:
        if node not in made and made & {*node.all_input_nodes}:
            if node.op != "call_function" or node.is_impure():
                return None
            made.add(node)
            found.append(node)
    return None if made & {*last.turned.all_input_nodes} or made & {*last.between} else found


def _laid_alike(one: Tensor, other: Tensor) -> bool:
    """Whether both have their elements in the same places; the stride of a single token says nothing."""
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(statically_known_true(size == 1) or known_equal([a], [b]) for size, a, b in strides)


def _join(graph: Graph, first: _Turn, last: _Turn) -> None:
    both = first, last
    with graph.inserting_before(last.turned):
        given = [turn.norm.args[0] for turn in both]
        if last.moved:
            given = [call(graph, aten.permute.default, one, _BY_TOKENS) for one in given]
        angles = []
        for one in (last.cos, last.sin):
            bare = _bare(one)
            squeezed = bare.meta["val"].dim() > 2 and bare is one
            angles.append(call(graph, aten.squeeze.dim, one, -3) if squeezed else bare)
        weights, options = [filled(turn.norm)[1] for turn in both], filled(last.norm)[3:]
        joined = call(
            graph,
            _JOINED[last.norm.target],  # type: ignore[index]
            *given,
            *angles,
            *weights,
            *options,
            False,
        )
        taken = [[turn.turned] for turn in both] + [results(turn.norm, 1) for turn in both]
        new: tuple[Tensor, ...] = joined.meta["val"]
        laid = all(
            _laid_alike(node.meta["val"], value) or not any(user.op == "output" for user in node.users)
            for nodes, value in zip(taken, new, strict=False)
            for node in nodes
        )
        if not laid:
            erase(graph, [joined, *given, *angles])  # type: ignore[list-item]
            return
        waiting, place = _between(first, last), last.turned
        replace(graph, joined, taken[: len(new)])
        for node in waiting or ():
            place.append(node)
            place = node
    erase(graph, (node for turn in both for node in (*turn.between, *results(turn.norm, 1), turn.norm)))
