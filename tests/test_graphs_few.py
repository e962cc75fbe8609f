"""Proves what backward of a compiled graph gets from forward, and what it finds again; how heads are turned back there;
and how an activation of half types is computed behind a norm.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import test_graphs_heads as heads
import torch
import torch.nn.functional as F
from oracle import EPS, same_bits
from test_graphs import drawn, norm, results, rewritten
from test_graphs_code import add_norm, code_of, inferred, sandwich, uneven
from test_graphs_gradients import product
from torch import Tensor

from rmsnorm import _called, _handed, _ops, add_rms_norm, rms_norm

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
    pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler"),
    pytest.mark.skipif(not _ops.native, reason="of kernels that aren't there"),
]
WIDE = torch.float32, torch.float64, torch.float16


def alone(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
    return norm(x, None), norm(r, w, "llama")


def asked_for(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
    return add_rms_norm(x, r, x.shape[-1:], w, EPS)


@pytest.mark.parametrize(("rows", "columns"), [(21, 127), (64, 513)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, *(pytest.param(t, marks=pytest.mark.heavy) for t in WIDE)], ids=str)
@pytest.mark.parametrize("function", [alone, sandwich, product, asked_for])
def test_a_few_rows_keep_no_statistic(
    function: Callable[..., Any], dtype: torch.dtype, rows: int, columns: int
) -> None:
    """Rows that overflow, vanish or are zeros among them. 64 of 513 columns are more than a few."""
    torch.compiler.reset()
    leaves = uneven(rows, columns, dtype)
    mine, code = code_of(results, torch.compile(function, fullgraph=True, dynamic=False), leaves, rows, columns)
    assert all(map(same_bits, mine, results(function, leaves, rows, columns)))
    assert f'"{_called.GRADIENTS.symbol}"' in code
    assert (".rstd = " in code) == (rows * columns > _handed.FEW)


def test_sizes_that_may_change_keep_it() -> None:
    torch.compiler.reset()
    compiled, codes = torch.compile(add_norm, fullgraph=True, dynamic=True), []
    for rows in (6, 70, 2):
        leaves = drawn(rows, 127, torch.bfloat16)
        mine, code = code_of(results, compiled, leaves, rows, 127)
        assert all(map(same_bits, mine, results(add_norm, leaves, rows, 127)))
        codes.append(code)
    assert ".rstd = " in codes[0]


def test_what_else_reads_it_gets_it() -> None:
    """A gradient of other rows, a weight of another type: the operator is called as it was."""
    torch.compiler.reset()
    leaves = drawn(6, 127, torch.bfloat16)
    leaves[2] = leaves[2].detach().float().requires_grad_()
    mine, code = code_of(results, torch.compile(add_norm, fullgraph=True, dynamic=False), leaves, 6, 127)
    assert all(map(same_bits, mine, results(add_norm, leaves, 6, 127)))
    assert "few_rms_norm_backward" not in code


@pytest.mark.parametrize("size", [80, *(pytest.param(n, marks=pytest.mark.heavy) for n in (6, 64))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
def test_heads_are_turned_back_around_the_kernel(tokens: int, dtype: torch.dtype, size: int) -> None:
    """With the bits of eager mode, in backward alone one kernel, which is called for query and for key."""
    torch.compiler.reset()
    leaves = heads.drawn(size, dtype, tokens=tokens)
    mine, code = code_of(heads.results, torch.compile(heads.chunks, fullgraph=True, dynamic=False), leaves)
    assert all(map(same_bits, mine, heads.results(heads.chunks, leaves)))
    backward = code[code.rindex("AsyncCompile()") :]
    assert "cpp_fused" not in backward
    assert backward.count("rmsnorm::turn_back(") == 2  # heads of query and of key differ in their number
    assert "torch.ops.rmsnorm" not in code


@pytest.mark.parametrize("name", ["angles of two dimensions", "two layers"])
def test_what_is_turned_back_has_the_bits_of_eager_mode(name: str) -> None:
    function, dtype = heads.TURNED[name][0], torch.float32
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    mine, eager = (heads.results(one, heads.drawn(64, dtype)) for one in (compiled, function))
    assert all(map(same_bits, mine, eager))


def gate(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
    return norm(x, w, "llama") * F.silu(r)


def gate_alone(n: Tensor, r: Tensor) -> Tensor:
    return n * F.silu(r)


@pytest.mark.parametrize("columns", [576, 100, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_activation_of_half_types_has_a_loop_of_its_own(dtype: torch.dtype, columns: int) -> None:
    """Where whole vectors make a row that L1 holds; with the bits that Inductor's own loop has."""
    torch.compiler.reset()
    x, r, w, v = drawn(40, columns, dtype)
    (mine,), code = code_of(inferred, torch.compile(gate, fullgraph=True, dynamic=False), [x, r, w, v])
    split = dtype is not torch.float32 and columns == 576
    assert ("float exps[" in code) == split
    assert code.count(".exp()") >= 1
    plain = torch.compile(gate_alone, fullgraph=True, dynamic=False)
    with torch.no_grad():
        assert same_bits(mine, plain(norm(x, w, "llama"), r))


def test_only_backward_of_known_rows_is_rewritten() -> None:
    """Other backends see the operators as they were recorded."""
    _, found = rewritten(add_norm, drawn(6, 127, torch.float32))
    assert [str(node.target) for node in found] == ["rmsnorm.rounded_rms_norm_backward.default"]
    assert found[0].args[3] is not None


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_numbers_that_cpp_has_no_word_for(number: float) -> None:
    """As a factor before the norm and behind it, and as its eps."""
    x, w = torch.randn(5, 64), torch.ones(64)
    for function in (
        lambda x, w: F.rms_norm(x * number, (64,), w, EPS),
        lambda x, w: rms_norm(x * number, 64, w, EPS),
        lambda x, w: rms_norm(x, 64, w, EPS) * number,
        lambda x, w: rms_norm(x, 64, w, number if number > 0 else EPS),
    ):
        torch._dynamo.reset()
        ours, wanted = torch.compile(function)(x, w), function(x, w)
        assert torch.equal(ours.isnan(), wanted.isnan())
        assert torch.equal(ours.nan_to_num(), wanted.nan_to_num())
