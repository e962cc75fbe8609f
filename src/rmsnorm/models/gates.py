"""The only file that rewrites a gated MLP: with ``memory="lean"`` two tensors are kept of its product, not three.

    self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

        →  self.down_proj(gated(self.act_fn, self.gate_proj(x), self.up_proj(x)))

The activation keeps its input for backward, and the product both factors, one of which is the activation's output: it
is computed again from its input, by the same operators, so that no bit of a gradient changes. ``fusion.py`` compares.
"""

from __future__ import annotations

import ast
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from .. import _foreign
from . import classes, rewrite
from .numbers import under_autocast

_GATED = "_rmsnorm_gated_product"
KEPT = "two tensors of three"
_HOMES = ("torch.nn.modules.activation", "transformers.activations")


class Gated(rewrite.Remade):
    """The forward of a class whose gated product keeps less."""

    kind, what = "gate", "gated product"
    norms: tuple[str, ...] = ()

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls = cls
        self.function, found = _rewrite(cls.forward)
        self.meaning = ", ".join(f"{name}, product" for name in found)

    def said(self, _: rewrite.Served) -> str:
        """``is_gated`` has asked the activations."""
        return self.meaning


classes.READERS["gate"] = Gated


@functools.cache
def _rewrite(original: rewrite.Forward) -> tuple[rewrite.Forward, tuple[str, ...]]:
    return rewrite.remade(original, _change, {_GATED: gated}, "lean products")


def is_gated(layer: nn.Module) -> bool:
    """Whether its source multiplies with an activation of its own, which keeps its input."""
    found = _found(classes.original(type(layer)).forward)
    return bool(found) and all(_keeps_input(getattr(layer, name, None)) for name in found)


@functools.cache
def _found(original: rewrite.Forward) -> tuple[str, ...]:
    return rewrite.found_by(_change, original, "act")


def _change(node: ast.AST, this: str) -> list[str]:
    """Replaces ``self.act(a) * b``; returns the attributes."""
    found: list[str] = []

    class Products(ast.NodeTransformer):
        def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
            self.generic_visit(node)
            for product, other in ((node.left, node.right), (node.right, node.left)):
                match product:
                    case ast.Call(
                        func=ast.Attribute(value=ast.Name(id=owner), attr=name) as activation, args=[x], keywords=[]
                    ) if isinstance(node.op, ast.Mult) and owner == this and "act" in name:
                        found.append(name)
                        return ast.Call(ast.Name(_GATED, ast.Load()), [activation, x, other], [])
            return node

    Products().visit(node)
    return found


def gated(activation: Any, x: Any, other: Any) -> Any:
    """``activation(x) * other``."""
    if torch.is_grad_enabled() and _is_lean(activation, x, other):
        return _product(x, other, activation)
    return activation(x) * other


def _is_lean(activation: Any, x: Any, other: Any) -> bool:
    """Whether these are ordinary tensors, and nobody listens to the activation."""
    return (
        _keeps_input(activation)
        and not (activation._forward_hooks or activation._forward_pre_hooks)
        and not (activation._backward_hooks or activation._backward_pre_hooks)
        and not _has_any_global_hook()
        and type(x) is Tensor
        and type(other) is Tensor
        and (x.requires_grad or other.requires_grad)
        and x.shape == other.shape
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
        and not _foreign.wanted_by(x, other)
        and not under_autocast(x)
    )


def _keeps_input(activation: Any) -> bool:
    """Whether it is SiLU or a GELU, torch's or transformers': ReLU and others keep their output, as a product does."""
    name, home = type(activation).__name__, type(activation).__module__
    return home in _HOMES and ("SiLU" in name or "GELU" in name) and not getattr(activation, "inplace", False)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor, activation: Any) -> Any:
        ctx.activation = activation
        ctx.save_for_backward(x, other)
        ctx.set_materialize_grads(False)
        return activation(x) * other

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None
        (x, other), again = ctx.saved_tensors, torch.is_grad_enabled()  # whether a graph of the gradient is wanted
        with torch.enable_grad():
            x = x if again and x.requires_grad else x.detach().requires_grad_()
            y = ctx.activation(x)
        dx = None
        if ctx.needs_input_grad[0]:
            (dx,) = torch.autograd.grad(y, x, grad * other, create_graph=again)
        return dx, grad * (y if again else y.detach()) if ctx.needs_input_grad[1] else None, None


_product: Any = _Product.apply
