"""The only file that knows what stands beside a norm in a layer's source, and what takes its place.

    hidden_states = residual + hidden_states        normed, hidden_states = add_norm(self.norm, residual, hidden_states)
    residual = hidden_states                    →   residual = hidden_states
    hidden_states = self.norm(hidden_states)        hidden_states = normed

    h = self.post_norm(h)                       →   h = norm_add(self.post_norm, h, residual)
    h = residual + h

With a norm on either side it is ``normed, h = sandwich(self.post_norm, self.norm, h, residual)``. ``neighbours.py`` has
what is called; a layer of another kind than a norm is only called there as it was. And, for ``modulation.py``:

    x = self.norm(x) * (1 + scale[:, None]) + shift[:, None]  →  x = modulated(self.norm, x, scale[:, None], …)
    h = h + gate.unsqueeze(1) * y                             →  h = gated(h, gate.unsqueeze(1), y)

in one line or in two; where the second stands before the first, ``x, h = gated_modulated(self.norm, h, …)``.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence

_ADD, _NORM_ADD, _SANDWICH = CALLS = "_rmsnorm_add_norm", "_rmsnorm_norm_add", "_rmsnorm_sandwich"
_NORMED = "_rmsnorm_normed"
_MODULATED, _GATED, _BOTH = MODULATING = "_rmsnorm_modulated", "_rmsnorm_gated", "_rmsnorm_gated_modulated"
GATED_ADD = "gated add"
Fused = tuple[str | None, str | None]
"""The attributes of the norms before an add and behind it."""


def fuse(node: ast.AST, this: str) -> list[Fused]:
    """Replaces the patterns in all blocks of statements below; returns the attributes of ``this`` that are called."""
    fused = [found for child in ast.iter_child_nodes(node) for found in fuse(child, this)]
    for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
        statements = block if isinstance(block, list) else []
        for add in list(statements):
            match add:
                case ast.Assign(targets=[ast.Name(id=total)], value=ast.BinOp(left=a, op=ast.Add(), right=b)):
                    i = statements.index(add)
                    use = _after_copies(statements[i + 1 :], total)
                    after = _called(use.value, this, total) if use else None
                    before = _normed(statements[i - 1], this, total, a, b) if i else None
                    if before and after and "norm" not in after.lower():  # OLMo 2 has its mlp there
                        after = None
                    if not (before or after):
                        continue
                    norms = [before[0] if before else None, after]
                    layers: list[ast.expr] = [
                        ast.Attribute(ast.Name(this, ast.Load()), norm, ast.Load()) for norm in norms if norm
                    ]
                    call = _ADD if not before else _SANDWICH if after else _NORM_ADD
                    add.value = ast.Call(ast.Name(call, ast.Load()), [*layers, *(before[1:] if before else (a, b))], [])
                    if before:
                        del statements[i - 1]
                    if use and after:
                        names: list[ast.expr] = [ast.Name(_NORMED, ast.Store()), ast.Name(total, ast.Store())]
                        add.targets = [ast.Tuple(names, ast.Store())]
                        use.value = ast.Name(_NORMED, ast.Load())
                    fused.append((norms[0], after))
    return fused


def _normed(
    statement: ast.stmt, this: str, total: str, a: ast.expr, b: ast.expr
) -> tuple[str, ast.expr, ast.expr] | None:
    """Of ``total = self.norm(x)`` before ``total = residual + total``: the attribute, x and the residual."""
    match statement:
        case ast.Assign(targets=[ast.Name(id=normed)], value=ast.Call(args=[ast.Name(id=x)]) as call) if (
            normed == total
        ):
            norm = _called(call, this, x)
            others = [each for each in (a, b) if isinstance(each, ast.Name) and each.id != total]
            mine = [each for each in (a, b) if isinstance(each, ast.Name) and each.id == total]
            if norm and "norm" in norm.lower() and len(others) == len(mine) == 1:
                return norm, call.args[0], others[0]
    return None


def _after_copies(statements: list[ast.stmt], total: str) -> ast.Assign | None:
    """The first assignment that isn't ``other = name``, if only such copies stand before it."""
    for statement in statements:
        match statement:
            case ast.Assign(targets=[ast.Name(id=other)], value=ast.Name()) if other != total:
                continue
            case ast.Assign():
                return statement
        return None
    return None


def _called(value: ast.expr, this: str, argument: str) -> str | None:
    """``self.norm(argument)``: the attribute."""
    match value:
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id=owner), attr=name), args=[ast.Name(id=only)], keywords=[]
        ) if (owner, only) == (this, argument):
            return name
    return None


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
        if scale is None:
            continue
        i = block.index(statement)
        call: ast.expr = normed
        if isinstance(normed, ast.Name) and normed.id == target and i:
            before = block[i - 1]
            if _names(scale) & {target} or _names(shift) & {target}:
                continue
            match before:
                case ast.Assign(targets=[ast.Name(id=same)], value=ast.Call() as own) if same == target:
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
                statement.value = ast.Call(ast.Name(_GATED, ast.Load()), [residual, *factors], [])
                found.append(GATED_ADD)
                if first:
                    del block[i - 1]
                break
    return found


def _gated(product: ast.expr) -> Sequence[ast.expr] | None:
    """Of a product with a gate: the gate, and the other factor."""
    match product:
        case ast.BinOp(left=a, op=ast.Mult(), right=b):
            for gate, other in ((a, b), (b, a)):
                if any("gate" in name for name in _names(gate)) and isinstance(
                    gate, ast.Name | ast.Subscript | ast.Call
                ):
                    return gate, other
    return None


def _read_behind(whole: ast.AST, name: str, statement: ast.stmt) -> bool:
    """Whether what a statement reads of the name may be read again: behind it, or in a loop around it."""
    for node in ast.walk(whole):
        if isinstance(node, ast.For | ast.While) and any(each is statement for each in ast.walk(node)):
            return True
        read = isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)
        if read and node.lineno > (statement.end_lineno or statement.lineno):  # type: ignore[attr-defined]
            return True
    return False


def _join(block: list[ast.stmt]) -> None:
    """A gated add whose sum is what is normed and modulated next."""
    for statement in list(block):
        i = block.index(statement)
        match block[i - 1 : i + 1]:
            case [
                ast.Assign(targets=[ast.Name(id=total)], value=ast.Call(func=ast.Name(id=add), args=added)),
                ast.Assign(
                    targets=[ast.Name(id=target)],
                    value=ast.Call(func=ast.Name(id=call), args=[norm, ast.Name(id=x), scale, shift]),
                ),
            ] if (add, call, x) == (_GATED, _MODULATED, total) and target != total:
                if total in _names(scale) | _names(shift):
                    continue
                names: list[ast.expr] = [ast.Name(target, ast.Store()), ast.Name(total, ast.Store())]
                value = ast.Call(ast.Name(_BOTH, ast.Load()), [norm, *added, scale, shift], [])
                block[i - 1 : i + 1] = [ast.Assign([ast.Tuple(names, ast.Store())], value)]


def _names(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
