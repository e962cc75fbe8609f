"""The only file with operators of few arguments for everyday calls of the norm in general, and of add + norm in place.

As in ``_ops.py``: an argument takes 0.1 µs on its way from Python, given or not, and a tensor that is returned 0.5.
There is a weight, without an offset, and rounded once; all but the CPU's kernels see the operators of the forms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _form, _handed

_ops = torch.ops.rmsnorm


def _general_rms_norm_weighted(input: Tensor, weight: Tensor, bias: Any, eps: float, out_dtype: Any) -> Tensor:
    options = weight.dim(), eps, 0.0, False, -1, True, True, out_dtype
    output: Tensor = _ops.general_rms_norm(input, weight, bias, *options)[0]
    return output


def _general_add_rms_norm_weighted(
    input: Tensor, residual: Tensor, weight: Tensor, bias: Any, eps: float, round_sum: bool, out_dtype: Any
) -> tuple[Tensor, Tensor]:
    options = weight.dim(), eps, 0.0, False, -1, round_sum, out_dtype
    output, sum, _ = _ops.general_add_rms_norm(input, residual, weight, bias, *options)
    return output, sum


def _add_rms_norm_weighted_(input: Tensor, residual: Tensor, weight: Tensor, eps: float, round_sum: bool) -> None:
    _ops.add_rms_norm_(input, residual, weight, weight.dim(), eps, 0.0, False, round_sum)


_SCHEMAS = {
    "general_rms_norm_weighted": "(Tensor input, Tensor weight, Tensor? bias, float eps, ScalarType? out_dtype) "
    "-> Tensor",
    "general_add_rms_norm_weighted": "(Tensor input, Tensor residual, Tensor weight, Tensor? bias, float eps, "
    "bool round_sum, ScalarType? out_dtype) -> (Tensor output, Tensor sum)",
    "add_rms_norm_weighted_": "(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps, bool round_sum) -> ()",
}
for _name, _schema in _SCHEMAS.items():
    _form.library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
    _form.library.impl(_name, globals()[f"_{_name}"], "CompositeImplicitAutograd")

# OpOverload.__call__ adds 0.5 µs to what it calls.
add_rms_norm_: Any = _ops.add_rms_norm_weighted_.default._op
# The kernels of the first two, past the dispatcher.
straight, add_straight = (_handed.straight(_name, _SCHEMAS[_name], weight="W") for _name in [*_SCHEMAS][:2])
