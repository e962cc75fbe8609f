"""Proves how rows are handed to code around a norm (csrc/graph_ops.cpp, called as Inductor's code calls it): in blocks
of the bytes that Python is told, one behind the other, each row once.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from oracle import same_bits

import rmsnorm
from rmsnorm import _called, _native

pytestmark = pytest.mark.skipif(not _native.cpu_targets(), reason="the native library is off")

REST = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)


def handed(rows: int, columns: int, dtype: torch.dtype) -> tuple[list[tuple[int, int]], torch.Tensor, torch.Tensor]:
    """The blocks, what was in them, and what eager mode has for it."""
    torch.manual_seed(0)
    x, w = torch.randn(rows, columns).to(dtype), torch.randn(columns).to(dtype)
    seen, found = [], torch.zeros(rows, columns, dtype=dtype)

    def rest(context: int, begin: int, end: int, done: int) -> None:
        seen.append((begin, end))
        ctypes.memmove(found[begin].data_ptr(), done, (end - begin) * columns * dtype.itemsize)

    kept = REST(rest)
    values = dict.fromkeys(_called.ROWS.fields, 0) | {
        "rows": rows,
        "columns": columns,
        "eps": 1e-6,
        "input": x.data_ptr(),
        "weight": w.data_ptr(),
        **dict.fromkeys(("input_type", "output_type", "weight_type"), _called._TYPES[dtype]),
        "rest": ctypes.cast(kept, ctypes.c_void_p).value,
    }
    kinds = [(name, ctypes.c_double if name in _called.ROWS.floats else ctypes.c_int64) for name in values]
    call = type("Call", (ctypes.Structure,), {"_fields_": kinds})(*values.values())
    library = ctypes.CDLL(str(_native.LIBRARY))
    library[_called.ROWS.symbol](ctypes.byref(call))
    return seen, found, rmsnorm.rms_norm(x, columns, w, 1e-6)


@pytest.mark.parametrize(("columns", "dtype"), [(4096, torch.float32), (1000, torch.bfloat16), (16384, torch.float32)])
def test_blocks_are_of_the_bytes_that_python_is_told(threads, columns, dtype):
    """Code for an output of no more asks for no rows ahead, as it never has a next block; all of it is one block."""
    threads(1)
    each = _native.ask("local_bytes") // (columns * dtype.itemsize)
    assert each >= 1
    for rows in (1, each, each + 1, 3 * each + 1):
        seen, found, expected = handed(rows, columns, dtype)
        assert seen == [(first, min(first + each, rows)) for first in range(0, rows, each)]
        assert same_bits(found, expected)


def test_a_row_beyond_those_bytes_is_a_block(threads):
    threads(1)
    columns = 2 * _native.ask("local_bytes") // 4
    seen, found, expected = handed(3, columns, torch.float32)
    assert seen == [(0, 1), (1, 2), (2, 3)]
    assert same_bits(found, expected)
