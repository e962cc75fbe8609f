"""The only file with what a rewritten layer calls: a norm and the adds beside it, in one pass where that was proven."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import reference
from ..forms.sandwich import rms_norm_add, sandwich_rms_norm
from ..functional import add_rms_norm
from .binding import Binding, binding_of, is_foreign, serves
from .forwards import SAME
from .numbers import eps_of, fits, shape_of, weight_of


class Ours:
    """A norm that is patched, can stand beside an add, was proven for rows like these, and to which nobody listens."""

    __slots__ = "eps", "norm_options", "options", "shape", "weight"

    def __init__(self, norm: Any, binding: Binding, weight: Tensor | None, x: Tensor) -> None:
        self.weight, self.options, self.norm_options = weight, binding.options, binding.norm_options
        self.shape, self.eps = shape_of(norm, weight, x), eps_of(norm, binding)


def ours(norm: Any, x: Tensor) -> Ours | None:
    """The norm, if its forward needn't be called for such rows."""
    binding = binding_of(norm)
    return _passed_by(norm, binding, x) if binding is not None and binding.plainly else None


def unweighted(norm: Any, x: Tensor) -> Ours | None:
    """The same of an RMSNorm or a LayerNorm without weight and bias, whose output is modulated as models in eager mode
    do it."""
    binding = binding_of(norm)
    if binding is None or not (binding.plainly or binding.recipe.centred) or binding.group or binding.layout != "last":
        return None
    if any(getattr(norm, name) is not None for name in (binding.weight, binding.bias) if name):
        return None
    if own := _passed_by(norm, binding, x):
        own.options = {"statistic": "layer" if binding.recipe.centred else "rms", "casting_mode": "llama"}
    return own


def _is_bound(forward: Any, module: Any) -> bool:
    """Whether a forward that was set on a module is its class's own: accelerate's offloading sets another one, and
    ``kernelize()`` one where it has a kernel, and else the class's."""
    own: bool = getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module
    return own


def needs_no_call(module: Any) -> bool:
    """Whether a module's class says what it computes, and nobody listens to it."""
    own = module.__dict__
    return (
        ("forward" not in own or _is_bound(own["forward"], module))
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not _has_any_global_hook()
    )


def _is_as_proven(norm: Any) -> bool:
    """Whether a call would run the forward that was proven: no class around it has another, nor has its own by now."""
    same = getattr(type(norm).forward, SAME, None)
    return same is not None and same(norm) and type(norm).__call__ is nn.Module.__call__


def _passed_by(norm: Any, binding: Binding, x: Tensor) -> Ours | None:
    if needs_no_call(norm) and _is_as_proven(norm):
        weight = weight_of(norm, binding)
        if serves(norm, binding, weight, x) and (weight is None or fits(binding, weight, x)):
            return Ours(norm, binding, weight, x)
    return None


def _beside(norm: Any, x: Any, other: Any) -> Ours | None:
    """The same of a norm beside an add of ``other``."""
    if not isinstance(x, Tensor) or not isinstance(other, Tensor) or is_foreign(other):
        return None
    return ours(norm, x) if x.dtype is other.dtype and x.shape == other.shape else None


def add_norm(norm: Any, a: Any, b: Any) -> tuple[Any, Any]:
    """``norm(a + b)`` and ``a + b``."""
    if own := _beside(norm, a, b):
        return add_rms_norm(a, b, own.shape, own.weight, own.eps, **own.norm_options)
    total = a + b
    return norm(total), total


def norm_add(norm: Any, x: Any, residual: Any, normed_first: bool = False) -> Any:
    """``residual + norm(x)``; or the other way round, as lists are added, too."""
    if own := _beside(norm, x, residual):
        return rms_norm_add(x, residual, own.shape, own.weight, own.eps, **own.options)
    return norm(x) + residual if normed_first else residual + norm(x)


def sandwich(first: Any, second: Any, x: Any, residual: Any, normed_first: bool = False) -> tuple[Any, Any]:
    """``second(total)`` and ``total``, which is ``residual + first(x)``, or that the other way round."""
    one = _beside(first, x, residual)
    if (
        one
        and (two := ours(second, x))
        and two.norm_options is two.options  # not lean: the sandwich keeps the sum
        and (one.shape, one.options) == (two.shape, two.options)
        and (two.eps is not None or one.eps is None)
        # The sum is of the type for which the second norm was asked.
        and reference.result_dtype(x, one.weight, one.options["casting_mode"] == "llama") is x.dtype
    ):
        weights = one.weight, two.weight
        return sandwich_rms_norm(x, residual, one.shape, *weights, one.eps, next_eps=two.eps, **one.options)
    if one is not None:
        return _second(second, norm_add(first, x, residual))
    normed = first(x)
    return add_norm(second, normed, residual) if normed_first else add_norm(second, residual, normed)


def _second(norm: Any, total: Any) -> tuple[Any, Any]:
    return norm(total), total
