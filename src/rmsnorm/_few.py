"""The only file that rewrites graphs of forward and backward before Inductor splits them: what is kept of a few rows.

A tensor that is made, handed out, kept and read again takes 0.7 µs, 1/rms of a row of 4096 is found in 0.2: so of a row
or a few backward finds it again, as eager mode does (``_eager.py``), and has the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from . import _called, _followed, _handed, _nodes
from ._nodes import become, results

_ours = torch.ops.rmsnorm
_BACKWARD = _ours.rms_norm_backward.default
_KEPT: dict[Any, int] = {_ours.rms_norm_forward.default: 1, _ours.add_rms_norm_forward.default: 2}
"""Which result of these is 1/rms."""
_PLAIN = {
    _ours.rms_norm_forward.default: _ours.rms_norm.default,
    _ours.add_rms_norm_forward.default: _ours.add_rms_norm.default,
}


class Few(CustomGraphPass):
    """The pass."""

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target is _BACKWARD and not node.kwargs:
                _find_again(graph, node)
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in _KEPT and not node.kwargs:
                _keep_nothing(graph, node)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__, _nodes.__file__), str(_called.ready()))


def _find_again(graph: Graph, backward: Node) -> None:
    given: Any = backward.args
    grad, grad_sum, input, rstd, weight, dims, eps, *_ = given
    rows = [one for one in (grad, grad_sum, input) if one is not None]
    if _is_few(input) and _nodes.is_served(rows, weight, dims, eps) and _is_of(rstd, input):
        arguments = *given[:3], None, *given[4:]
        taken = results(backward, 0), results(backward, 1)
        become(graph, backward, _followed.few_rms_norm_backward, arguments, taken, backward)
        _nodes.erase(graph, [rstd])


def _is_few(rows: Node) -> bool:
    value = rows.meta["val"]
    known = all(isinstance(size, int) for size in value.shape)
    return value.device.type == "cpu" and known and value.numel() <= _handed.FEW


def _is_of(rstd: Node, input: Node) -> bool:
    """Whether forward kept it of these rows."""
    forward: Any = rstd.args[0] if rstd.args else None
    if rstd not in _kept(forward):
        return False
    return forward.args[0] is input if _KEPT[forward.target] == 1 else input in results(forward, 1)


def _kept(forward: Any) -> list[Node]:
    return results(forward, _KEPT[forward.target]) if getattr(forward, "target", None) in _KEPT else []


def _keep_nothing(graph: Graph, forward: Any) -> None:
    """Where nobody reads 1/rms, the operator without it."""
    if not any(one.users for one in _kept(forward)) and _is_few(forward.args[0]):
        taken = [results(forward, place) for place in range(_KEPT[forward.target])]
        become(graph, forward, _PLAIN[forward.target], forward.args, taken, forward)
