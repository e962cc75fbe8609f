"""The only file that makes the operators which a graph of ``torch.compile`` has: with a derivative that torch knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._form import Operators, define, library


def recorded(made: Operators, end: str, apply: Callable[..., Any]) -> torch._ops.OpOverload:
    """The operator with that end to its name, so made.

    dynamo traces one node and never looks into an ``autograd.Function``, which it can't do with two norms of changing
    size in one graph (torch 2.13). Eager calls don't come here: what torch asks at an operator with a derivative costs
    them 2 to 4 µs. ``apply`` calls the operator in turn, and that is the node which is left in the compiled graph.
    """
    name = f"{made.form.name}_recorded"
    operator = define(name, made.schemas[end], made.forward if end else made.plain, made.fakes[end])
    library.impl(name, apply, "Autograd")
    return operator
