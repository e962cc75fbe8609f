"""Proves what stands around the gradients of a norm in compiled graphs: what is done in the loop of their kernel, with
the bits of eager mode, and what is not.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import same_bits
from test_graphs import crossed, drawn, norm, results, rewritten
from test_graphs_code import code_of, uneven, wider
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table

from rmsnorm import _called, _objects, _ops

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]


def cast(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
    return norm(s := x + r, w, "llama").to(wider(x)), s


def product(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
    return norm(x, w, "llama") * r


def scale(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
    return norm(s := x * 0.3, w, "gemma"), s


def all_of_them(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
    return r * norm(s := x * 24.0, w), s


FUNCTIONS = cast, product, scale, all_of_them
SHAPES = (1, 576), (70, 127), (70, 4096)
# Which of the steps are done there: what arrives is multiplied, twice, and what leaves is.
AROUND: dict[str, tuple[Callable[..., Any], tuple[bool, bool, bool]]] = {
    "cast": (cast, (False, False, False)),
    "product": (product, (True, True, False)),
    "product with what has no gradient": (lambda x, r, w, v: product(x, r.detach(), w, v), (True, False, False)),
    "scale": (scale, (False, False, True)),
    "scale, product": (all_of_them, (True, True, True)),
}
LEFT: dict[str, Callable[..., Any]] = {
    "product of what is computed": lambda x, r, w, v: (norm(x, w) * r).sin(),
    "product with a row": lambda x, r, w, v: norm(x, w) * v,
    "cast for two": lambda x, r, w, v: (norm(x, w) + norm(r, v)).to(wider(x)),
    "cast to another type": lambda x, r, w, v: norm(x, w).double(),
    "scale by a tensor": lambda x, r, w, v: norm(x * v, w),
    "nothing": lambda x, r, w, v: norm(x, w),
}


def joined(function: Callable[..., Any], leaves: list[Tensor]) -> tuple[list[Tensor], list[torch.fx.Node]]:
    """With the decompositions that Inductor has: casts are ``convert_element_type`` then."""
    return rewritten(function, leaves, select_decomp_table())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", AROUND)
def test_a_step_before_or_behind_gradients_is_joined_with_them(name, dtype):
    function, steps = AROUND[name]
    mine, operators = joined(function, drawn(6, 127, dtype))
    assert all(map(same_bits, mine, results(function, drawn(6, 127, dtype), 6, 127)))
    (found,) = operators
    assert found.target is torch.ops.rmsnorm.around_rms_norm_backward.default
    assert tuple(argument is not None for argument in found.args[1:4]) == steps
    grad, input = (found.args[i].meta["val"] for i in (0, 5))
    assert grad.dtype is (wider(input) if name == "cast" else dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LEFT)
def test_what_else_stands_there_is_left(name, dtype):
    mine, operators = joined(LEFT[name], drawn(6, 127, dtype))
    assert all(map(same_bits, mine, results(LEFT[name], drawn(6, 127, dtype), 6, 127)))
    assert operators
    assert all("around" not in str(node.target) for node in operators)


def test_float64_has_no_steps_around_its_kernel():
    mine, (found,) = joined(all_of_them, drawn(6, 127, torch.float64))
    assert all(map(same_bits, mine, results(all_of_them, drawn(6, 127, torch.float64), 6, 127)))
    assert "around" not in str(found.target)


@pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler")
@pytest.mark.skipif(not _ops.native, reason="of kernels that aren't there")
@pytest.mark.parametrize(
    ("function", "dtype", "shape"),
    [
        *crossed(FUNCTIONS, (torch.float32, torch.bfloat16), SHAPES[:2], rare=SHAPES[2:]),
        *crossed(FUNCTIONS, (torch.float16,), (), rare=SHAPES),
    ],
)
def test_backward_is_one_kernel_with_the_bits_of_eager_mode(function, dtype, shape):
    """Of rows that are one block, and of many, the last of them shorter; with columns behind the last whole vector."""
    rows, columns = shape
    torch.compiler.reset()
    leaves = uneven(rows, columns, dtype)
    mine, code = code_of(results, torch.compile(function, fullgraph=True, dynamic=False), leaves, rows, columns)
    assert all(map(same_bits, mine, results(function, leaves, rows, columns)))
    backward = code[code.rindex("AsyncCompile()") :]
    assert f'"{_called.GRADIENTS.symbol}"' in backward
    assert backward.count(f"{_objects.COMPILED}(async_compile") == 1
    assert "async_compile.cpp_pybinding" not in backward
    assert ("auto before = " in backward) == (function is not scale)
    assert ("auto after = " in backward) == (function in (scale, all_of_them))
    assert ("rmsnorm::ask(" in backward) == (rows > 2)  # the next rows, if any come
    assert "((0, )" not in backward  # no room for a gradient that nobody has


@pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler")
@pytest.mark.skipif(not _ops.native, reason="of kernels that aren't there")
def test_rows_may_change():
    torch.compiler.reset()
    compiled = torch.compile(all_of_them, fullgraph=True, dynamic=True)
    for rows in (6, 70, 2):
        leaves = drawn(rows, 127, torch.bfloat16)
        mine = results(compiled, leaves, rows, 127)
        assert all(map(same_bits, mine, results(all_of_them, leaves, rows, 127)))
