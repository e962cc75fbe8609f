"""The only file that knows what stands beside a norm in a layer's source, and what takes its place.

    hidden_states = residual + hidden_states        normed, hidden_states = add_norm(self.norm, residual, hidden_states)
    residual = hidden_states                    →   residual = hidden_states
    hidden_states = self.norm(hidden_states)        hidden_states = normed

    h = self.post_norm(h)                       →   h = norm_add(self.post_norm, h, residual)
    h = residual + h

With a norm on either side it is ``normed, h = sandwich(self.post_norm, self.norm, h, residual)``. ``neighbours.py`` has
what is called; a layer of another kind than a norm is only called there as it was. Operands keep their order.
"""

from __future__ import annotations

import ast

_ADD, _NORM_ADD, _SANDWICH = CALLS = "_rmsnorm_add_norm", "_rmsnorm_norm_add", "_rmsnorm_sandwich"
_NORMED = "_rmsnorm_normed"
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
                    given = before[1:3] if before else (a, b)
                    order = orders("normed_first", before is not None and before[3])
                    add.value = ast.Call(ast.Name(call, ast.Load()), [*layers, *given], order)
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
) -> tuple[str, ast.expr, ast.expr, bool] | None:
    """Of ``total = self.norm(x)`` before ``total = residual + total``: the attribute, x, the residual, and whether the
    norm stands first in the sum."""
    match statement:
        case ast.Assign(targets=[ast.Name(id=normed)], value=ast.Call(args=[ast.Name(id=x)]) as call) if (
            normed == total
        ):
            norm = _called(call, this, x)
            others = [each for each in (a, b) if isinstance(each, ast.Name) and each.id != total]
            mine = [each for each in (a, b) if isinstance(each, ast.Name) and each.id == total]
            if norm and "norm" in norm.lower() and len(others) == len(mine) == 1:
                return norm, call.args[0], others[0], mine[0] is a
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


def orders(word: str, holds: bool) -> list[ast.keyword]:
    """Says that operands stand the other way round: what is no tensor may mind."""
    return [ast.keyword(word, ast.Constant(True))] if holds else []
