"""The only file that rewrites graphs of Inductor's: a norm and what stands beside it become one operator of ours.

Imported when ``torch.compile`` first meets a norm (``_graphs.py``). Inductor calls the pass once for each graph, those
of forward and those of backward, before it looks for what it can fuse itself. Only nodes beside our operators change.
What is joined has the bits of the steps one after the other:

    s = a + b;  y = norm(s)             add_rms_norm: a sum is written and normalised in one pass
    s = r + norm(x)                     rms_norm_add
    s = r + norm(x);  y = norm(s)       sandwich_rms_norm
    y = norm(a + b).to(other)           add_rms_norm_cast, between float32 and half types, without gradients
    y = norm(x) * r                     rms_norm_times, without gradients
    s = x * 24;  y = norm(s)            scale_rms_norm, without gradients

and their gradients (``_gradients.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from . import _called, _followed, _gradients, _nodes, _turned, _turned_back
from ._nodes import (
    aten,
    become,
    filled,
    follow,
    is_cast,
    is_own_type,
    is_served,
    is_written,
    only_user,
    operands,
    partner,
    precede,
    producer,
    reads_memory,
    results,
    scaled,
)

_ours = torch.ops.rmsnorm


class Neighbours(CustomGraphPass):
    """The pass."""

    def __call__(self, graph: Graph) -> None:
        _turned.join(graph)
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in _JOINS and not node.kwargs:
                join, end = _JOINS[node.target]
                join(graph, node, end)
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target is _operator("add_rms_norm", ""):
                _join_cast(graph, node)
        _gradients.join(graph)

    def uuid(self) -> bytes:
        written = [
            str(Path(__file__).with_name(f"{name}.py"))
            for name in ("_around", "_called", "_direct", "_followed", "_objects", "_template")
        ]
        rewritten = (one.__file__ for one in (_gradients, _nodes, _turned, _turned_back))
        return get_hash_for_files((__file__, *rewritten, *written), str(_called.ready()))


def _join_norm(graph: Graph, norm: Node, end: str) -> None:
    """``end`` is that of the operators' names: what backward reads is returned, too, or not."""
    input, weight, *options = filled(norm)
    output, rstd = results(norm, 0), results(norm, 1)
    add = only_user(output)
    if (first := producer(input)) is not None and first.target is _operator("rms_norm_add", end):
        x, residual, first_weight, *first_options = first.args
        (dims, eps, *more), (first_dims, _, *first_more) = options, first_options
        if dims == first_dims and more == first_more and precede(first, weight) and is_own_type(norm):
            arguments = x, residual, first_weight, weight, *first_options, eps
            taken = output, results(first, 0), results(first, 1), rstd
            become(graph, first, _operator("sandwich_rms_norm", end), arguments, taken, norm)
    elif (summands := operands(input)) and all(map(is_written, summands)) and precede(input, weight):
        arguments = *summands, weight, *options
        become(graph, input, _operator("add_rms_norm", end), arguments, (output, [input], rstd), norm)
    elif (
        not end
        and (product := scaled(input))
        and is_written(product[0])
        and precede(input, weight)
        and is_served(product[:1], weight, *options[:2])
    ):
        become(graph, input, _followed.scale_rms_norm, (*product, weight, *options), (output, [input]), norm)
    elif add and (residual := partner(add, output[0])) and is_own_type(norm) and follow(add, rstd):
        arguments = input, residual, weight, *options
        become(graph, add, _operator("rms_norm_add", end), arguments, ([add], rstd), norm)
    elif (
        add
        and not end
        and all(map(reads_memory, add.users))
        and (factor := partner(add, output[0], aten.mul.Tensor))
        and is_own_type(norm)
        and is_served((input, factor), weight, *options[:2])
    ):
        become(graph, add, _followed.rms_norm_times, (input, factor, weight, *options), ([add],), norm)


def _join_cast(graph: Graph, norm: Node) -> None:
    """The kernel, which has the output in float32, rounds it once more as it stores it."""
    input, residual, weight, dims, eps, *_ = norm.args
    output, sum = results(norm, 0), results(norm, 1)
    cast = only_user(output)
    if cast is None or not is_cast(cast) or not follow(cast, sum):
        return
    if is_own_type(norm) and is_served((input, residual), weight, dims, eps):  # type: ignore[arg-type]
        arguments = *norm.args, cast.meta["val"].dtype
        become(graph, cast, _followed.add_rms_norm_cast, arguments, ([cast], sum), norm)


def _operator(name: str, end: str) -> Any:
    return getattr(_ours, name + end).default


_JOINS: dict[Any, tuple[Callable[[Graph, Node, str], None], str]] = {
    _operator("rms_norm", ""): (_join_norm, ""),
    _operator("rms_norm", "_forward"): (_join_norm, "_forward"),
}
