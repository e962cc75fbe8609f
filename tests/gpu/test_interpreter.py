"""Proves that the interpreter, as hardware.py leaves it, rounds as GPUs do."""

from __future__ import annotations

import hardware
import numpy as np
import pytest
import torch
from triton.runtime import interpreter


@pytest.mark.usefixtures("on_triton")
def test_the_interpreter_rounds_as_gpus_do():
    """The multiply-add against exact integers, bf16 against torch, at every kind of number."""
    a = interpreter.TensorHandle(np.array([1 + 2**-23], np.float32), hardware.tl.float32)
    product = interpreter.TensorHandle(np.array([-(1 + 2**-22)], np.float32), hardware.tl.float32)
    assert interpreter.interpreter_builder.create_fma(a, a, product).data.tolist() == [2.0**-46]
    x = torch.arange(0, 2**32, 65521).to(torch.uint32).view(torch.float32)
    rounded = hardware._convert(x.numpy(), hardware.tl.float32, hardware.tl.bfloat16, None).view(np.uint16)
    back = torch.from_numpy(rounded.view(np.int16).copy()).view(torch.bfloat16)
    assert torch.equal(back.nan_to_num(5.0), x.bfloat16().nan_to_num(5.0))
