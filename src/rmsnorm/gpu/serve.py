"""The only file that makes a GPU's operators of rows: all of them, so that a new form needs no more than its row.

The norms of ``route.py`` come first. What else has a function of its name in ``forms.py``, ``general.py``, ``heads.py``
or ``neighbours.py`` is Triton's, where that runs and takes the tensors. The rest is the definition, with the norms of
``route.py`` in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import _form, _ops
from . import launcher, route


def rms_norm_add_backward(
    grad: Tensor, input: Tensor, rstd: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, *needs: bool
) -> tuple[Tensor, Tensor]:
    return route.rms_norm_backward(grad, None, input, rstd, weight, dims, eps, offset, *needs)


def sandwich_rms_norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    sum: Tensor,
    rstd: Tensor,
    next_rstd: Tensor,
    weight: Tensor | None,
    next_weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    next_eps: float | None,
    need_input: bool,
    need_residual: bool,
    need_weight: bool,
    need_next_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the two norms, one after the other: that of the sum is rounded, being the residual's."""
    first, last = need_input or need_weight, eps if next_eps is None else next_eps
    ds, dnext = route.rms_norm_backward(
        grad, grad_sum, sum, next_rstd, next_weight, dims, last, offset, first or need_residual, need_next_weight
    )
    if not first:
        return input.new_empty(0), ds, input.new_empty(0), dnext
    dx, dw = route.rms_norm_backward(ds, None, input, rstd, weight, dims, eps, offset, need_input, need_weight)
    return dx, ds if need_residual else input.new_empty(0), dw, dnext


def _normalised(
    input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    """What definitions call."""
    return route.rms_norm_forward(input, weight, dims, eps, offset, round_first)


def _launched(form: _form.Form, arguments: tuple[Any, ...], keep: bool | None) -> tuple[Any, ...] | None:
    """What Triton makes of a call, or None; ``keep`` is None for a backward pass."""
    from . import forms, general, heads, neighbours

    name = form.name if keep is not None else f"{form.name}_backward"
    launch: Any = next(filter(None, (getattr(room, name, None) for room in (forms, general, heads, neighbours))), None)
    if launch is None:
        return None
    if keep is None:
        grads, rows, weights, options = form.parts(arguments[: -len(form.learnt)])
        moving = form.shaped(grads, rows)
    else:
        count = len(form.rows)
        rows, weights, options = arguments[:count], arguments[count : form.tensors], arguments[form.tensors :]
        moving = [row for row, name in zip(rows, form.rows, strict=True) if name not in form.fixed]
    input = moving[0]
    dims = options[0] if form.options.startswith("int dims") else 1
    alike = all(_beside(form, row, input) for row in moving)
    if (
        not route.served(input)
        or not alike
        or not input.numel()
        or not all(route.fits(input, weight, dims) for weight in weights)
    ):
        return None
    with route.on(input.device):
        results: tuple[Any, ...] | None = launch(*arguments) if keep is None else launch(keep, *arguments)
    return results


def _beside(form: _form.Form, row: Tensor | None, input: Tensor) -> bool:
    """Whether kernels take them together. Types of their own, where a row has such, its function asks for."""
    if row is None or row is input:
        return True
    own = form.mixed or form.shared
    return row.device == input.device and (row.dtype in route._TYPES if own else row.dtype is input.dtype)


def serving(made: _form.Operators, end: str) -> Callable[..., Any]:
    """The operator of a row with that end to its name: Triton's, where ``forms.py`` and its like have a function of
    its name, else the definition, whose norms are those of ``route.py``."""
    form = made.form
    count = len(form.outputs) + (len(form.kept) if end else 0)

    def backward(*arguments: Any) -> Any:
        return _launched(form, arguments, None) or made.defaults["_backward"](*arguments)

    def forward(*arguments: Any) -> Any:
        arguments = form.filled(arguments)
        form.check(*arguments)
        results = _launched(form, arguments, bool(end))
        if results is None:
            assert form.define is not None
            results = form.define(*arguments, normalise=_normalised)
        return results[0] if count == 1 else tuple(results[:count])

    return backward if end == "_backward" else forward


def add_rms_norm_(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    round_sum: bool,
) -> None:
    """In place, or by the definition, which copies."""
    if route.served(input) and input.numel() and route.fits(input, weight, dims):
        from . import general

        _ops.check_in_place(input, residual)
        with route.on(input.device):
            if general.added_in_place(input, residual, weight, dims, eps, offset, round_first, round_sum):
                return
    _ops.add_rms_norm_by_copies(input, residual, weight, dims, eps, offset, round_first, round_sum)


_OURS = {
    operator.__name__: operator
    for operator in (
        *(route.rms_norm, route.rms_norm_forward, route.rms_norm_backward),
        *(rms_norm_add_backward, sandwich_rms_norm_backward),
    )
}


def register(key: str) -> None:
    """Serves the operators of all rows for a dispatch key from here on: C++ those that it has, where it can."""
    serving_now = served()
    taken = launcher.take_over(key, serving_now) if key == "CUDA" and launcher.available() else set()
    for name, operator in serving_now.items():
        if name not in taken:
            _form.library.impl(name, operator, key)


def served() -> dict[str, Callable[..., Any]]:
    """All of a GPU's operators in Python, by their names."""
    found: dict[str, Callable[..., Any]] = {"rms_norm_out": route.rms_norm_out, "add_rms_norm_": add_rms_norm_}
    for made in _form.registered:
        if made.form.define is not None:
            for end in made.schemas:
                name = made.form.name + end
                found[name] = _OURS.get(name) or serving(made, end)
    return found
