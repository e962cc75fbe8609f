"""The only file that speaks ONNX: what ``torch.onnx.export`` sees in place of our operators.

ONNX has had the operator ``RMSNormalization`` since opset 23, and torch's exporter has it for ``aten::rms_norm``. It
rounds to the input's type before the gain, and runtimes differ in what they do inside a half type. So it is given wide
inputs, and every rounding of ours is a ``Cast`` of its own: the graph has our meaning in any runtime. One thing is
lost: by default (``stash_type``) ONNX takes the mean square in float32 for a float64 input too.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import reference


def rms_norm(input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool) -> Tensor:
    """``reference.rms_norm`` around ``RMSNormalization``; below opset 23 torch takes it apart into older operators."""
    if eps < 0:  # a floor, which the operator doesn't have
        return reference.rms_norm(input, weight, dims, eps, offset, round_first)[0]
    shape = input.shape[-dims:]
    wide = input.to(reference.accumulation_dtype(input.dtype))
    # In a wide type both casting modes are one function, and what RMSNormalization means. Its weight has the sizes of
    # the normalised dimensions and no more.
    if weight is None or weight.dim() > dims or (round_first and not wide.dtype == input.dtype == weight.dtype):
        return reference.apply_gain(F.rms_norm(wide, shape, None, eps), input, weight, offset, round_first)
    return F.rms_norm(wide, shape, reference.gain(weight, wide, offset), eps).to(input.dtype)
