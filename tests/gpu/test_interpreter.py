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


def test_a_launch_changes_the_language_once_for_all_functions_that_see_as_much_of_it():
    patched, restored = [], []
    once, ended = hardware._patch_once(lambda function: patched.append(function) or "scope", restored.append)
    sees = [eval("lambda: 0", {"tl": hardware.tl, "other": i}) for i in (1, 2)]
    more = eval("lambda: 0", {"tl": hardware.tl, "core": hardware.tl.core})
    assert [once(function) for function in (*sees, more, more, sees[0])] == ["scope", None, "scope", None, None]
    assert patched == [sees[0], more]
    ended("scope")
    assert restored == ["scope"]
    assert once(sees[1]) == "scope"


def test_types_are_found_by_name():
    tl, table = hardware.tl, interpreter._get_np_dtype
    kinds = [tl.float32, tl.bfloat16, tl.float64, tl.int1, tl.int64, tl.uint8]
    wanted = [np.float32, np.uint16, np.float64, bool, np.int64, np.uint8]
    for _ in range(2):
        assert [table(kind) for kind in kinds] == wanted
        assert [table(tl.block_type(kind, [4])) for kind in kinds] == wanted
        pointers = [tl.pointer_type(kind) for kind in kinds]
        assert {table(kind) for kind in (*pointers, *(tl.block_type(one, [4]) for one in pointers))} == {np.dtype("u8")}
