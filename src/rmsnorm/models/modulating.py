"""The only file that knows how models write a modulated norm and a gated add, and what takes the place of such lines.

    x = self.norm(x) * (1 + scale[:, None]) + shift[:, None]  →  x = modulated(self.norm, x, scale[:, None], …)
    h = h + gate.unsqueeze(1) * y                             →  h = gated(h, gate.unsqueeze(1), y)

in one line or in two; where the second stands before the first, ``x, h = gated_modulated(self.norm, h, …)``. Operands
keep their order, and calls among them the order in which they roll dice. ``modulation.py`` has what is called.
"""

from __future__ import annotations

import ast
from typing import Any

from .patterns import orders

_MODULATED, _GATED, _BOTH = MODULATING = "_rmsnorm_modulated", "_rmsnorm_gated", "_rmsnorm_gated_modulated"
GATED_ADD = "gated add"
_SCOPES = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef | ast.GeneratorExp


def modulate(node: ast.AST, this: str) -> list[str]:
    """Replaces the lines of modulated norms; returns the attributes of ``this``, and a word for each gated add."""
    return _in_blocks(node, this, node)


def _in_blocks(node: ast.AST, this: str, whole: ast.AST) -> list[str]:
    found = [each for child in ast.iter_child_nodes(node) for each in _in_blocks(child, this, whole)]
    for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
        if isinstance(block, list):
            found += _gate_in(block, whole)
            found += _modulate_in(block, this)
            _join(block)
    return found


def _modulate_in(block: list[ast.stmt], this: str) -> list[str]:
    """``y = self.norm(x) * (1 + scale) + shift``, or ``y = self.norm(x)`` and then ``y = y * (1 + scale) + shift``."""
    found = []
    for statement in list(block):
        match statement:
            case ast.Assign(
                targets=[ast.Name(id=target)],
                value=ast.BinOp(left=ast.BinOp(left=a, op=ast.Mult(), right=b), op=ast.Add(), right=shift),
            ):
                pass
            case _:
                continue
        normed = a if _scale_in(b) else b
        scale = _scale_in(b) or _scale_in(a)
        if scale is None or (normed is b and _calls(scale) and any(map(_calls, getattr(b, "args", ())))):
            continue  # dice would be rolled in another order
        i = block.index(statement)
        call: ast.expr = normed
        if isinstance(normed, ast.Name) and normed.id == target and i:
            match block[i - 1]:
                case ast.Assign(targets=[ast.Name(id=same)], value=ast.Call() as own) if (
                    same == target and target not in _names(scale) | _names(shift)
                ):
                    call = own
                case _:
                    continue
        match call:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=name) as norm, args=[x], keywords=[]) if (
                owner == this and "norm" in name.lower()
            ):
                statement.value = ast.Call(ast.Name(_MODULATED, ast.Load()), [norm, x, scale, shift], [])
                found.append(name)
                if call is not normed:
                    del block[i - 1]
    return found


def _calls(node: ast.AST) -> bool:
    return any(isinstance(each, ast.Call) for each in ast.walk(node))


def _scale_in(factor: ast.expr) -> ast.expr | None:
    """The scale of ``1 + scale`` or ``(1 + scale)[:, None]``."""
    match factor:
        case ast.BinOp(left=ast.Constant(value=1 | 1.0), op=ast.Add(), right=scale):
            return scale
        case ast.Subscript(value=ast.BinOp() as inner) if found := _scale_in(inner):
            return ast.Subscript(found, factor.slice, ast.Load())
    return None


def _gate_in(block: list[ast.stmt], whole: ast.AST) -> list[str]:
    """``h = h + gate * y``, or ``y = gate * y`` and then ``h = h + y``, if y isn't read again."""
    found = []
    for statement in list(block):
        match statement:
            case ast.Assign(targets=[ast.Name()], value=ast.BinOp(left=a, op=ast.Add(), right=b)):
                pass
            case _:
                continue
        i = block.index(statement)
        for residual, added in ((a, b), (b, a)):
            product, first = added, False
            if isinstance(added, ast.Name) and isinstance(residual, ast.Name) and i:
                match block[i - 1]:
                    case ast.Assign(targets=[ast.Name(id=name)], value=ast.BinOp() as before) if (
                        name == added.id != residual.id and not _read_behind(whole, name, statement)
                    ):
                        first, product = True, before
            factors = _gated(product)
            if factors and isinstance(residual, ast.Name):
                order = orders("gate_last", factors[2]) + orders("product_first", added is a)
                statement.value = ast.Call(ast.Name(_GATED, ast.Load()), [residual, *factors[:2]], order)
                found.append(GATED_ADD)
                if first:
                    del block[i - 1]
                break
    return found


def _gated(product: ast.expr) -> tuple[ast.expr, ast.expr, bool] | None:
    """Of a product with a gate: the factors, which are evaluated in their order, and whether the last is the gate."""
    match product:
        case ast.BinOp(left=a, op=ast.Mult(), right=b):
            for gate in (a, b):
                fits = isinstance(gate, ast.Name | ast.Subscript | ast.Call)
                if fits and any("gate" in name for name in _names(gate)):
                    return a, b, gate is b
    return None


def _read_behind(whole: ast.AST, name: str, statement: Any) -> bool:
    """Whether what a statement reads of the name may be read again, or deleted: behind it, in a loop around it, or by a
    function that was made before."""
    nodes: list[Any] = list(ast.walk(whole))
    loops = [node for node in nodes if isinstance(node, ast.For | ast.While)]
    if any(node is statement for loop in loops for node in ast.walk(loop)):
        return True
    used = [n for n in nodes if isinstance(n, ast.Name) and n.id == name and not isinstance(n.ctx, ast.Store)]
    inner = (n for scope in nodes if isinstance(scope, _SCOPES) and scope is not whole for n in ast.walk(scope))
    if any(n in used for n in inner):
        return True
    end = statement.end_lineno, statement.end_col_offset
    return any((n.lineno, n.col_offset) >= end for n in used)


def _join(block: list[ast.stmt]) -> None:
    """A gated add whose sum is what is normed and modulated next."""
    for statement in list(block):
        i = block.index(statement)
        match block[i - 1 : i + 1]:
            case [
                ast.Assign(
                    targets=[ast.Name(id=total)], value=ast.Call(func=ast.Name(id=add), args=added, keywords=order)
                ),
                ast.Assign(
                    targets=[ast.Name(id=target)],
                    value=ast.Call(func=ast.Name(id=call), args=[norm, ast.Name(id=x), scale, shift]),
                ),
            ] if (add, call, x) == (_GATED, _MODULATED, total) and target != total:
                if total in _names(scale) | _names(shift):
                    continue
                names: list[ast.expr] = [ast.Name(target, ast.Store()), ast.Name(total, ast.Store())]
                value = ast.Call(ast.Name(_BOTH, ast.Load()), [norm, *added, scale, shift], order)
                block[i - 1 : i + 1] = [ast.Assign([ast.Tuple(names, ast.Store())], value)]


def _names(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
