"""What Triton's interpreter computes otherwise than every GPU, put right; and what it does again and again, once.

Its multiply-add rounds twice, and its bf16 is cut off, not rounded (subnormals and overflow are wrong too): either
would hide, or invent, errors of the kernels. numpy has neither. So the fused one goes through the next wider type,
whose own rounding is 2^-29 (longdouble: 2^-11) of the last bit, and bf16 is that of ml_dtypes.

Whenever a kernel calls a function it puts its own members into triton.language anew, where they are since the launch:
that was half of its time.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_WIDER = {np.dtype(np.float32): np.float64, np.dtype(np.float64): np.longdouble}


def _fused(self, x, y, z):
    wide = _WIDER[x.data.dtype]
    exact = x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)
    return interpreter.TensorHandle(exact.astype(x.data.dtype), z.dtype.scalar)


def _convert(input, input_type, output_type, rounding_mode):
    """Between bf16, which is uint16 there, and the types of numpy; returns what the interpreter views as the output."""
    values = input.view(ml_dtypes.bfloat16) if input_type == tl.bfloat16 else input
    kind = ml_dtypes.bfloat16 if output_type == tl.bfloat16 else interpreter._get_np_dtype(output_type)
    return values.astype(kind)


def _patch_once(patch, restore):
    """A patch of the modules that a function sees, once a launch, which ends with a call of the second function."""
    done = set()

    def once(function):
        seen = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if seen in done:
            return None
        scope = patch(function)
        done.add(seen)
        return scope

    def ended(scope):
        done.clear()
        restore(scope)

    return once, ended


def _by_name(find):
    """numpy's type of one of Triton's, whose function makes a table of all of them whenever it is asked."""
    known = {}

    def found(kind):
        name = kind.scalar.name
        if name not in known:
            known[name] = find(kind)
        return known[name]

    return found


def correct_interpreter() -> None:
    interpreter.InterpreterBuilder.create_fma = _fused
    interpreter._convert_float = _convert
    scope = interpreter._LangPatchScope
    interpreter._patch_lang, scope.restore = _patch_once(interpreter._patch_lang, scope.restore)
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
