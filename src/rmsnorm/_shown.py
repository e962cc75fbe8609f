"""The only file that shows a wrong value in few words: a number of thousands of digits, which Python refuses to write,
a text of a page, sizes of a hundred thousand dimensions.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

_MOST = 64
"""Dimensions that a tensor may have."""


class _Short(reprlib.Repr):
    def repr_int(self, value: int, level: int) -> str:
        return f"<int of {value.bit_length()} bits>" if value.bit_length() > 64 else repr(value)


_short = _Short()
_short.maxstring = _short.maxother = 80
_short.maxlist = _short.maxtuple = 8
shown = _short.repr
"""A value as its ``repr`` has it, if that is short."""


def sizes(shape: Sequence[int]) -> str:
    """A shape as torch writes it in its errors, if it could be a tensor's."""
    if len(shape) <= _MOST and all(-(2**63) <= size < 2**63 for size in shape):
        return str(list(shape))
    more = f", and {len(shape) - 8} more" if len(shape) > 8 else ""
    return f"[{', '.join(map(shown, shape[:8]))}{more}]"


def described(value: object) -> str:
    """A value by its type, as a sentence needs it: ``a list``, ``None``, ``the class RMSNorm``."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    cls = type(value)
    if cls.__module__ != "builtins":
        return f"a {cls.__module__}.{cls.__qualname__}"
    return f"{'an' if cls.__name__[0] in 'aeiou' else 'a'} {cls.__name__}"
