"""The only file that rewrites attention: query and key are normed by head and turned in one call.

    q = self.q_norm(q_proj.view(shape)).transpose(1, 2)      q = q_proj.view(shape).transpose(1, 2)
    k = self.k_norm(k_proj.view(shape)).transpose(1, 2)  →   k = k_proj.view(shape).transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, k, cos, sin)              q, k = turned(apply_rotary_pos_emb, q, k, cos, sin, …)

or with the norms behind the transposition, or with none. The function that turns is proven by what it computes, as
norms are; which function the name means is asked at each call. ``fusion.py`` then compares the layer's whole output.
"""

from __future__ import annotations

import ast
import functools
from typing import Any

import torch
from torch import Tensor, nn

from .. import _foreign
from ..forms.heads import heads_rms_norm_rope, rope
from . import classes, rewrite, wrappers
from .binding import TYPES
from .neighbours import needs_no_call, ours
from .numbers import under_autocast
from .turns import Turn, turn_of

_TURN = "_rmsnorm_turned"
_PLAIN = "rotary embedding"


class Turned(rewrite.Remade):
    """The forward of a class whose heads are normed and turned in one call."""

    kind, what = "heads", _PLAIN

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls = cls
        self.function, found = _rewrite(cls.forward)
        self.norms = tuple(name for name in found if name != _PLAIN)

    def said(self, served: rewrite.Served) -> str:
        """What became one call, if it was served (``witness.py``)."""
        return ", ".join([*served[0][1], _PLAIN]) if served else ""


classes.READERS["heads"] = Turned


@functools.cache
def _rewrite(original: rewrite.Forward) -> tuple[rewrite.Forward, tuple[str, ...]]:
    names: list[str] = []

    def change(node: ast.AST, this: str) -> list[str]:
        return _turn(node, this, names)

    calls: dict[str, rewrite.Forward] = {}
    known: list[Any] = []

    def turned(rotate: Any, *arguments: Any) -> Any:
        return _turned(known[1] if rotate is known[0] and _is_itself(rotate) else None, rotate, *arguments)

    calls[_TURN] = turned
    function, found = rewrite.remade(original, change, calls, "turned heads")
    if len(names) != 1:
        raise ValueError("it turns heads more than once")
    innermost: Any = wrappers.links_of(original)[-1]
    rotate = innermost.__globals__.get(names[0])
    if not _is_itself(rotate):
        raise ValueError(f"{names[0]} was replaced, or somebody listens to it")
    turn = turn_of(rotate)
    if turn is None:
        raise ValueError(f"{names[0]} computes something else")
    known += rotate, turn
    return function, found


def _is_itself(rotate: Any) -> bool:
    """With ``kernels`` installed, transformers' function is a module, whose forward ``kernelize()`` exchanges."""
    return not isinstance(rotate, nn.Module) or needs_no_call(rotate)


def turns_heads(layer: nn.Module) -> bool:
    """Whether its source turns query and key."""
    return bool(_found(classes.original(type(layer)).forward))


@functools.cache
def _found(original: rewrite.Forward) -> tuple[str, ...]:
    return rewrite.found_by(lambda node, this: _turn(node, this, []), original, "rotary")


def _turned(
    turn: Turn | None,
    rotate: Any,
    query: Any,
    key: Any,
    cos: Any,
    sin: Any,
    query_norm: Any = None,
    key_norm: Any = None,
    transposed: bool = False,
) -> Any:
    """``rotate`` of the normed tensors; in one pass where that was proven and nobody listens to the norms.

    ``transposed``: theirs norms before it transposes.
    """
    served: dict[str, Any] | None = None
    if turn and _serves(turn, query, key, cos, sin):
        served = {"cos": turn.angle(cos), "sin": turn.angle(sin), "interleaved": turn.interleaved}
    if query_norm is not None:
        if served and (options := _options(query_norm, key_norm, query, key)):
            return heads_rms_norm_rope(query, key, **served, **options)
        if transposed:
            query = query_norm(query.transpose(1, 2)).transpose(1, 2)
            key = key_norm(key.transpose(1, 2)).transpose(1, 2)
        else:
            query, key = query_norm(query), key_norm(key)
    return rope(query, key, **served) if served else rotate(query, key, cos, sin)


def _serves(turn: Turn, query: Any, key: Any, cos: Any, sin: Any) -> bool:
    if not all(isinstance(t, Tensor) and type(t) in _foreign.COMPILERS for t in (query, key, cos, sin)):
        return False  # a subclass sees what its module calls
    return (
        query.dtype in TYPES
        and query.dtype is key.dtype
        and cos.dtype is sin.dtype
        and query.dim() == key.dim() == 4
        and cos.dim() == 3
        and cos.shape == sin.shape
        and turn.takes(cos, query)
        and not torch.compiler._is_exporting_flag
        and not under_autocast(query)
    )


def _options(query_norm: Any, key_norm: Any, query: Tensor, key: Tensor) -> dict[str, Any] | None:
    """The weights, eps and options of two norms that differ in their weights alone."""
    one, two = ours(query_norm, query), ours(key_norm, key)
    if one is None or two is None or (one.eps, one.options) != (two.eps, two.options):
        return None
    if any(own.weight is not None and own.weight.dim() != 1 for own in (one, two)):
        return None
    return {"query_weight": one.weight, "key_weight": two.weight, "eps": one.eps, **one.options}


def _turn(node: ast.AST, this: str, names: list[str]) -> list[str]:
    """Replaces the pattern in all blocks below; returns the norms' attributes and a word for what turns, whose name is
    added to ``names``."""
    found = [each for child in ast.iter_child_nodes(node) for each in _turn(child, this, names)]
    for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
        statements = block if isinstance(block, list) else []
        for i, statement in enumerate(statements):
            match statement:
                case ast.Assign(
                    targets=[ast.Tuple(elts=[ast.Name(id=q), ast.Name(id=k)])],
                    value=ast.Call(
                        func=ast.Name(id=rotate) as function,
                        args=[ast.Name(id=query), ast.Name(id=key), ast.Name(), ast.Name()] as arguments,
                        keywords=[],
                    ),
                ) if (q, k) == (query, key) and q != k and "rotary" in rotate:
                    norms = _take_norms(statements[:i], this, q, k)
                    statement.value = ast.Call(ast.Name(_TURN, ast.Load()), [function, *arguments, *norms], [])
                    found += [norm.attr for norm in norms if isinstance(norm, ast.Attribute)]
                    found.append(_PLAIN)
                    names.append(rotate)
    return found


def _take_norms(statements: list[ast.stmt], this: str, q: str, k: str) -> list[ast.expr]:
    """The two norms, and whether they stand before a transposition; what they norm takes their place."""
    last = [_last_use(statements, name) for name in (q, k)]
    norms = [_norm_in(statement, this, name) for statement, name in zip(last, (q, k), strict=True)]
    if norms[0] is None or norms[1] is None or norms[0][2] is not norms[1][2]:
        return []
    taken: list[ast.expr] = []
    for statement, (norm, rest, _) in zip(last, (norms[0], norms[1]), strict=True):
        assert isinstance(statement, ast.Assign)
        statement.value = rest
        taken.append(norm)
    return [*taken, ast.Constant(norms[0][2])]


def _last_use(statements: list[ast.stmt], name: str) -> ast.stmt | None:
    for statement in reversed(statements):
        if any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(statement)):
            return statement
    return None


def _norm_in(statement: ast.stmt | None, this: str, name: str) -> tuple[ast.expr, ast.expr, bool] | None:
    """The norm of ``name = self.norm(x).transpose(1, 2)`` or ``name = self.norm(name)``, what is left without it, and
    whether it is the former."""
    match statement:
        case ast.Assign(
            targets=[ast.Name(id=target)],
            value=ast.Call(
                func=ast.Attribute(
                    value=ast.Call(func=ast.Attribute(value=ast.Name(id=owner)) as norm, args=[x], keywords=[])
                ) as method,
                args=[ast.Constant(value=1), ast.Constant(value=2)],
                keywords=[],
            ) as whole,
        ) if target == name and owner == this and method.attr == "transpose" and _is_norm(norm):
            rest = ast.Call(ast.Attribute(x, "transpose", ast.Load()), whole.args, [])
            return norm, rest, True
        case ast.Assign(
            targets=[ast.Name(id=target)],
            value=ast.Call(
                func=ast.Attribute(value=ast.Name(id=owner)) as norm, args=[ast.Name(id=x_name) as x], keywords=[]
            ),
        ) if target == x_name == name and owner == this and _is_norm(norm):
            return norm, x, False
    return None


def _is_norm(called: ast.Attribute) -> bool:
    """By its name: a projection with dropout has to be called where it stands, or dice are rolled in another order."""
    return "norm" in called.attr.lower() or called.attr.lower().endswith("ln")
