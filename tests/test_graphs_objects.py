"""Proves how a compiled graph comes to our kernels where sizes are known: a kernel looks at what it is given, and makes
room for what it writes, in one call, and refuses what it was not compiled for.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import EPS, ULPS, Truth, same_bits
from test_graphs import drawn, norm, results
from test_graphs_code import add_norm, code_of, inferred
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile

from rmsnorm import _objects, _ops

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
    pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler"),
    pytest.mark.skipif(not _ops.native, reason="of kernels that aren't there"),
    pytest.mark.skipif(not hasattr(Tensor, "__dlpack_c_exchange_api__"), reason="torch shows no tensors there"),
]
ASKED = re.compile(r"^ +(assert_size_stride|buf\d+ = empty_strided)\w*\(", re.MULTILINE)
"""What Inductor's wrapper asks, and makes, by itself."""


def alone(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
    return norm(x, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_kernel_looks_and_makes_room_by_itself(dtype: torch.dtype) -> None:
    """Forward, and backward: the wrapper asks nothing. The outputs are held to the formula in fp64, too."""
    torch.compiler.reset()
    leaves = drawn(40, 127, dtype)
    mine, code = code_of(results, torch.compile(add_norm, fullgraph=True, dynamic=False), leaves, 40, 127)
    assert all(map(same_bits, mine, results(add_norm, leaves, 40, 127)))
    assert code.count(f"{_objects.COMPILED}(async_compile") == 3  # inference, forward and backward
    assert not ASKED.search(code)
    x, r, w, _ = (one.detach() for one in leaves)
    Truth(x + r, EPS).forward(w, 0.0, "torch", ULPS[dtype]).check(mine[0], "output")


@pytest.mark.parametrize("why", ["sizes that may change", "a torch that shows no tensors"])
def test_else_the_wrapper_does(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    if why.startswith("a torch"):
        monkeypatch.setattr(_objects, "serves", lambda _: False)
        monkeypatch.setattr("torch._inductor.config.fx_graph_cache", False)
        monkeypatch.setattr("torch._functorch.config.enable_autograd_cache", False)
    leaves = drawn(40, 127, torch.float32)
    compiled = torch.compile(add_norm, fullgraph=True, dynamic=why.startswith("sizes"))
    mine, code = code_of(results, compiled, leaves, 40, 127)
    assert all(map(same_bits, mine, results(add_norm, leaves, 40, 127)))
    assert _objects.COMPILED not in code
    assert code.count("async_compile.cpp_pybinding") == 3
    assert len(ASKED.findall(code)) > 3


@pytest.mark.parametrize(("rows", "template"), [(2, False), (3, True)])
def test_a_row_or_two_are_normed_before_what_follows(rows: int, template: bool) -> None:
    torch.compiler.reset()
    leaves = drawn(rows, 4096, torch.float32)

    def function(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
        return norm(x, w).neg()

    (mine,), code = code_of(inferred, torch.compile(function, fullgraph=True, dynamic=False), leaves)
    assert same_bits(mine, inferred(function, leaves)[0])
    assert ("auto rest = " in code) == template
    assert (f"{_objects.COMPILED}(async_compile" in code) != template


@pytest.fixture(scope="module")
def add() -> Callable[..., Any]:
    """A kernel of two tensors of 2 × 3, the second transposed, which returns the first element's sum, and a product."""
    statement = (
        "((float*)sum)[0] = ((const float*)x)[0] + ((const float*)y)[1];"
        "\n  ((float*)product)[0] = ((const float*)x)[0] * ((const float*)y)[1];"
    )
    code = _objects.code("", statement, {"x": ([2, 3], [3, 1]), "y": ([2, 3], [1, 2])}, ["sum", "product"])
    wrapper = AsyncCompile()
    scope = {"made": _objects.compiled(wrapper, 3, code)}
    wrapper.wait(scope)
    return scope["made"]


ROOMS = torch._C._dynamo.guards._empty_strided_cpu, *[((1,), (1,), torch.float32)] * 2


def test_what_a_kernel_was_not_compiled_for_is_refused(add: Callable[..., Any]) -> None:
    x, y = torch.arange(6.0).view(2, 3) + 2, torch.arange(6.0).view(3, 2).T + 5
    assert [one.item() for one in add(ROOMS, x, y)] == [8.0, 12.0]
    assert [one.item() for one in add(ROOMS, torch.nn.Parameter(x[:].clone()), y)] == [8.0, 12.0]
    for wrong in (x.T.contiguous(), x[:1], x[None], y, x.flatten()):
        with pytest.raises(RuntimeError, match="other sizes or strides of x"):
            add(ROOMS, wrong, y)
    with pytest.raises(RuntimeError, match="other sizes or strides of y"):
        add(ROOMS, x, x)
    with pytest.raises(RuntimeError, match="show"):
        add(ROOMS, x.to("meta"), y)
    with pytest.raises(RuntimeError, match="3 args"):
        add(ROOMS, x)


def test_room_that_there_is_not_is_an_error_of_its_own(add: Callable[..., Any]) -> None:
    def none(*_: Any) -> Tensor:
        raise MemoryError("no room")

    x, y = torch.ones(2, 3), torch.ones(3, 2).T
    with pytest.raises(MemoryError, match="no room"):
        add((none, *ROOMS[1:]), x, y)
