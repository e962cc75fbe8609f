"""Proves what Inductor makes of our operators: kernels of ours that its own code is written around, or called beside,
with the bits of eager mode.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import EPS, same_bits
from test_graphs import crossed, drawn, norm, results
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from rmsnorm import _called, _native, _nodes, _objects, _ops, _template, rms_norm, sandwich_rms_norm

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
    pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler"),
    pytest.mark.skipif(not _ops.native, reason="of kernels that aren't there"),
]


def wider(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.dtype is torch.float32 else torch.float32


def around(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
    """One step each behind a norm: with two, Inductor leaves out what eager mode rounds between them."""
    return (
        norm(x, w) * 0.3,
        norm(r, v, "llama") + 1,
        norm(x, v, "gemma").to(wider(x)),
        norm(r, None) * v,
        norm(x.view(2, -1, x.shape[-1]), w).abs(),
        norm(x.abs(), w).neg(),
    )


def read_again(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
    """The norm is written, too: another reads it, in another order."""
    n = norm(x, w)
    return n * r, n.sum(0), n


def transposed(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
    return norm(x, w).T * r.T, norm(r, w)[:, :1] * x


def two_steps(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
    return norm(x, w) * F.silu(r) + v


def sums(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
    """Each is an operator of its own."""
    s = x + r
    return (
        norm(s, w, "llama"),
        s,
        x + norm(r, v, "gemma"),
        *sandwich_rms_norm(r, x, x.shape[-1:], w, v, EPS, offset=1.0),
    )


def strided(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
    """Rows that don't lie one behind the other."""
    return norm(x[::2], w), rms_norm(x.T, x.shape[:1], None, EPS)


def inferred(function: Callable[..., Any], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found = function(*leaves)
    return found if isinstance(found, tuple) else (found,)


def code_of(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """And without comments."""
    found, code = run_and_get_code(function, *arguments)
    lines = "\n".join(code).splitlines()
    return found, "\n".join(line for line in lines if not line.lstrip().startswith("#"))


@pytest.mark.parametrize(
    ("dtype", "columns"), crossed((torch.float32, torch.bfloat16), (127, 576), rare=(1, 1027, 4096))
)
def test_what_follows_a_norm_is_done_in_its_loop_with_the_same_bits(dtype, columns):
    torch.compiler.reset()
    leaves = drawn(
        _template._FEW // columns // 2 * 2 + 6, columns, dtype
    )  # up to which a norm is sooner a kernel alone
    mine, code = code_of(inferred, torch.compile(around, fullgraph=True, dynamic=False), leaves)
    eager = inferred(around, leaves)
    assert all(map(same_bits, mine, eager))
    assert [y.dtype for y in mine] == [y.dtype for y in eager]
    assert "torch.ops.rmsnorm" not in code
    assert code.count(f'"{_called.ROWS.symbol}"') == len(eager)
    assert code.count("auto rest = ") == len(eager)


@pytest.mark.parametrize("rows", [3, 6, 70])
def test_rows_are_done_a_few_at_a_time_by_threads(rows):
    """70 rows of 4096 are blocks of 4, in parts of 8 for each thread, and the last one is shorter. Where there is a
    next block, its rows are asked for: of the norm's input, the gate and the output, but not the row that is added.
    """
    torch.compiler.reset()
    leaves = drawn(rows, 4096, torch.float32)
    compiled = torch.compile(two_steps, fullgraph=True, dynamic=False)
    mine, code = code_of(inferred, compiled, leaves)
    assert code.count("rmsnorm::ask(") == (3 if rows > 4 else 0)
    x, r, w, v = leaves
    with torch.no_grad():
        torch.testing.assert_close(mine[0], norm(x, w) * F.silu(r) + v)
        plain = torch.compile(lambda n, r, v: n * F.silu(r) + v, fullgraph=True, dynamic=False)
        assert same_bits(mine[0], plain(norm(x, w), r, v))  # Inductor's own steps are what they are elsewhere


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("function", [read_again, transposed, sums, strided])
def test_what_cannot_be_done_there_has_the_same_bits(function, dtype):
    torch.compiler.reset()
    leaves = drawn(20, 576, dtype)
    mine = inferred(torch.compile(function, fullgraph=True, dynamic=False), leaves)
    for a, b in zip(mine, inferred(function, leaves), strict=True):
        if function is read_again and a.dim() == 1:
            torch.testing.assert_close(a, b)  # a sum, in Inductor's order
        else:
            assert same_bits(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_operators_are_called_without_torchs_dispatcher(dtype):
    """Those that record what backward needs, too; the others past the Python of OpOverload."""
    torch.compiler.reset()
    leaves = drawn(6, 576, dtype)
    mine, code = code_of(results, torch.compile(sums, fullgraph=True, dynamic=False), leaves, 6, 576)
    eager = results(sums, leaves, 6, 576)
    outputs = len(inferred(sums, leaves)) * 2  # Inductor adds gradients of half types up without rounding in between
    assert all(map(same_bits, *((mine, eager) if dtype is torch.float32 else (mine[:outputs], eager[:outputs]))))
    assert "torch.ops.rmsnorm" not in code
    assert f'"{_called.ROWS.symbol}"' in code
    assert f'"{_called.GRADIENTS.symbol}"' in code


def test_what_no_kernel_is_called_for_is_called_without_the_python_of_torchs_operators():
    """A weight of another type, here."""
    torch.compiler.reset()
    leaves = drawn(6, 576, torch.bfloat16)
    leaves[2] = leaves[2].detach().float().requires_grad_()

    def function(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
        return norm(x + r, w)

    mine, code = code_of(results, torch.compile(function, fullgraph=True, dynamic=False), leaves, 6, 576)
    assert all(map(same_bits, mine, results(function, leaves, 6, 576)))
    lines = [line.strip() for line in code.splitlines() if "torch.ops.rmsnorm" in line and "assert_" not in line]
    assert lines
    assert all(line.endswith(".default._op") for line in lines)


def beside(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
    """Steps that are done in a norm's kernel, with each rounding and kind of gain that kernels know."""
    scaled, halved = x * 24.0, r * 0.5
    sums = x + r, r + x, x + x
    return (
        *(norm(x, w) * r, norm(x, w, "llama") * r, norm(r, v, "gemma") * x, norm(r, None) * x),
        *(norm(scaled, w, "gemma"), scaled, norm(halved, v, "llama"), halved),
        *(norm(sums[0], w, "llama").to(wider(x)), sums[0], norm(sums[1], v).to(wider(x)), sums[1]),
        *(norm(sums[2], w, "gemma").to(wider(x)), sums[2]),
    )


def uneven(rows: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
    """With rows whose squares overflow or vanish, and of zeros."""
    leaves = drawn(rows, columns, dtype)
    with torch.no_grad():
        for i, scale in enumerate((1e2, 1e-5, 0.0) if dtype is torch.float16 else (1e30, 1e-30, 0.0)):
            leaves[0][i::7] *= scale
            leaves[1][i::7] *= scale
    return leaves


@pytest.mark.parametrize(("dtype", "shape"), crossed(_nodes.TYPES[:3], ((40, 127), (6, 576)), rare=((70, 1027),)))
def test_a_step_beside_a_norm_is_done_in_its_kernel_with_the_same_bits(dtype, shape):
    rows, columns = shape
    torch.compiler.reset()
    leaves = uneven(rows, columns, dtype)
    mine, code = code_of(inferred, torch.compile(beside, fullgraph=True, dynamic=False), leaves)
    eager = inferred(beside, leaves)
    assert all(map(same_bits, mine, eager))
    assert [y.dtype for y in mine] == [y.dtype for y in eager]
    assert "torch.ops.rmsnorm" not in code
    assert "auto rest = " not in code


def add_norm(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
    return norm(s := x + r, w), s


def sandwich(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
    s = r + norm(x, w, "gemma")
    return norm(s, v, "gemma", 1e-3), s


@pytest.mark.parametrize(
    ("function", "dtype", "shape"),
    crossed((add_norm, sandwich), _nodes.TYPES, ((1, 576), (40, 127)), rare=((70, 1027),)),
)
def test_gradients_have_the_bits_of_eager_mode(function, dtype, shape):
    """Of up to 32 rows, whose weights' gradients are a single sum, and of more. What arrives at the sum is added in the
    kernel: there is none of Inductor's, neither forward, with gradients and without, nor backward."""
    rows, columns = shape
    torch.compiler.reset()
    leaves = uneven(rows, columns, dtype)
    mine, code = code_of(results, torch.compile(function, fullgraph=True, dynamic=False), leaves, rows, columns)
    assert all(map(same_bits, mine, results(function, leaves, rows, columns)))
    assert "torch.ops.rmsnorm" not in code
    assert code.count(f"{_objects.COMPILED}(async_compile") == 3
    assert "async_compile.cpp_pybinding" not in code


def test_shapes_may_change():
    torch.compiler.reset()
    compiled = torch.compile(lambda *leaves: (*around(*leaves), *sums(*leaves)), fullgraph=True, dynamic=True)
    for rows in (6, 18, 2):
        leaves = drawn(rows, 127, torch.float32)
        mine = inferred(compiled, leaves)
        assert all(map(same_bits, mine, (*inferred(around, leaves), *inferred(sums, leaves))))


def test_a_library_without_the_entry_leaves_operators(monkeypatch):
    """One that was built before, or none."""
    assert not _native.publish("rmsnorm_no_such_function")
    monkeypatch.setattr(_native, "_library", None)
    assert not _called.ready()


def test_numbers_of_a_call_are_written_exactly():
    values = {
        "eps": 1e-5,
        "offset": 1,
        "round_first": True,
        "input_type": torch.bfloat16,
        "weight_type": None,
        "input": "p",
    }
    text = _called.ROWS.statement(values)
    fields = ".input_type = 3, .weight_type = 0, .round_first = 1, .eps = 1e-05, .offset = 1.0, .input = p"
    assert text == f"rmsnorm::run({{{fields}}});"
