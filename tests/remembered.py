"""What an oracle found for the same numbers, once a process: the targets of a test share one truth, which was four
fifths of the time of test_forward.py's widest combinations.

The key is what was given, by content: 128 bits of the bytes of a tensor or an array, so that a truth is never that of
other numbers. What is kept can't be written to, and is at most 256 MiB; what was asked for longest ago goes first.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

MOST = 2**28
_found: OrderedDict[Any, tuple[int, Any]] = OrderedDict()
_held = 0


def key(value: Any) -> Any:
    """What tells a value from others; of an object with a key of its own, that, and of numbers, their text: 1.0 and
    True, or 0.0 and -0.0, are not the same."""
    if isinstance(value, torch.Tensor):
        # A clone: contiguous() leaves one number as it is, with any stride, which can't be seen as bytes.
        flat = value.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).numpy()
        return value.dtype, tuple(value.shape), blake2b(flat, digest_size=16).digest()
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, blake2b(np.ascontiguousarray(value), digest_size=16).digest()
    return getattr(value, "key", None) or repr(value)


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def once(*given: Any, **named: Any) -> Any:
        global _held
        name = function.__module__, function.__qualname__
        asked = (*name, *map(key, given), *((option, key(value)) for option, value in sorted(named.items())))
        if asked in _found:
            _found.move_to_end(asked)
            return _found[asked][1]
        result = function(*given, **named)
        size = sum(map(_closed, result)) if isinstance(result, tuple) else _closed(result)
        _found[asked], _held = (size, result), _held + size
        while _held > MOST:
            _held -= _found.popitem(last=False)[1][0]
        return result

    return once


def _closed(result: Any) -> int:
    """The arrays in it may be written to no more; their bytes."""
    arrays = [result] if isinstance(result, np.ndarray) else list(getattr(result, "__dict__", {}).values())
    size = 64
    for array in arrays:
        if isinstance(array, np.ndarray):
            array.setflags(write=False)
            size += array.nbytes
    return size
