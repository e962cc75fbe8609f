"""Proves what a compiled graph has of a norm: which neighbours are joined with it, that this changes no bit, that
nothing else changes, and what the mode says.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from oracle import EPS, gains, incoming, same_bits, sample
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.custom_graph_pass import CustomGraphPass

import rmsnorm
from rmsnorm import _graphs, add_rms_norm, rms_norm
from rmsnorm._few import Few
from rmsnorm._neighbours import Neighbours

# torch warns about its own code: inductor still uses TorchScript, and dynamo makes an autograd.Function.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]
OPTIONS = {"torch": {}, "llama": {"casting_mode": "llama"}, "gemma": {"offset": 1.0}}


def norm(x: Tensor, weight: Tensor | None, mode: str = "torch", eps: float = EPS) -> Tensor:
    return rms_norm(x, x.shape[-1:], weight, eps, **OPTIONS[mode])


def stream(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
    """Two layers of Llama, without what they compute."""
    first = x + r
    second = first + norm(first, w, "llama")
    return norm(second, v, "llama"), second


Function = Callable[[Tensor, Tensor, Tensor, Tensor], Any]
# Each with the operators of ours that a graph without gradients has.
JOINED: dict[str, tuple[Function, dict[str, int]]] = {
    "add, norm": (lambda x, r, w, v: norm(x + r, w), {"add_rms_norm": 1}),
    "add, norm, and the sum": (lambda x, r, w, v: (s := x + r, norm(s, w, "llama")), {"add_rms_norm": 1}),
    "add, two norms": (lambda x, r, w, v: (s := x + r, norm(s, w), norm(s, v)), {"add_rms_norm": 1, "rms_norm": 1}),
    "add, norm without a weight": (lambda x, r, w, v: norm(x + r, None), {"add_rms_norm": 1}),
    "norm, add": (lambda x, r, w, v: r + norm(x, w, "gemma"), {"rms_norm_add": 1}),
    "norm, add, the other way round": (lambda x, r, w, v: norm(x, w) + r, {"rms_norm_add": 1}),
    "norm, add, norm": (
        lambda x, r, w, v: (s := r + norm(x, w, "gemma"), norm(s, v, "gemma", 1e-3)),
        {"sandwich_rms_norm": 1},
    ),
    "norm, add, another kind of norm": (
        lambda x, r, w, v: (s := r + norm(x, w, "gemma"), norm(s, v)),
        {"rms_norm_add": 1, "rms_norm": 1},
    ),
    "two layers": (stream, {"add_rms_norm": 2}),
    "a linear layer before": (lambda x, r, w, v: norm(x @ r.T @ r + r, w), {"add_rms_norm": 1}),
    "a computed addend that is normed": (
        lambda x, r, w, v: norm((e := x.abs()) + norm(e, v) @ r.T @ r, w),
        {"add_rms_norm": 1, "rms_norm": 1},
    ),
    "a computed addend that is returned": (lambda x, r, w, v: (norm((e := x * 2) + r, w), e), {"add_rms_norm": 1}),
}
# The same, and those that it has with gradients: of what follows a norm, backward reads the norm itself.
PLAIN, RECORDED = {"rms_norm": 1}, {"rms_norm_forward": 1}
INFERRED: dict[str, tuple[Function, dict[str, int], dict[str, int]]] = {
    "norm, product": (lambda x, r, w, v: norm(x, w, "llama") * r, {"rms_norm_times": 1}, RECORDED),
    "norm, product, the other way round": (lambda x, r, w, v: r * norm(x, w, "gemma"), {"rms_norm_times": 1}, RECORDED),
    "norm, product without a weight": (lambda x, r, w, v: norm(x, None) * r, {"rms_norm_times": 1}, RECORDED),
    "norm, product, linear": (lambda x, r, w, v: (norm(x, w) * r) @ r.T @ r, {"rms_norm_times": 1}, RECORDED),
    "multiply, norm, multiply": (lambda x, r, w, v: norm(x * r, w) * r, {"rms_norm_times": 1}, RECORDED),
    "scale, norm": (
        lambda x, r, w, v: norm(s := x * 24.0, w, "gemma") + s,
        {"scale_rms_norm": 1},
        {"rms_norm_add_forward": 1},
    ),
    "scale, norm, and the product": (lambda x, r, w, v: (s := 0.1 * x, norm(s, w)), {"scale_rms_norm": 1}, RECORDED),
    "norm, product, and more in the loop": (lambda x, r, w, v: norm(x, w) * r + v, PLAIN, RECORDED),
    "norm, product with what is computed": (lambda x, r, w, v: norm(x, w) * r.sin(), PLAIN, RECORDED),
    "norm, product with a row": (lambda x, r, w, v: norm(x, w) * v, PLAIN, RECORDED),
    "norm, product, and the norm": (lambda x, r, w, v: ((y := norm(x, w)) * r, y), PLAIN, RECORDED),
    "scale by a tensor": (lambda x, r, w, v: norm(x * v, w), PLAIN, RECORDED),
    "scale what is computed": (lambda x, r, w, v: norm(x.sin() * 24.0, w), PLAIN, RECORDED),
}
# A multiplication, a cast and what is no sum of two tensors alike are Inductor's to place.
LEFT: dict[str, tuple[Function, dict[str, int]]] = {
    "add of a number": (lambda x, r, w, v: norm(x + 1, w) * v, {"rms_norm": 1}),
    "a product is added": (lambda x, r, w, v: norm(x * 2 + r, w), {"rms_norm": 1}),
    "cast": (lambda x, r, w, v: norm(x, w, "llama").double(), {"rms_norm": 1}),
    "a row is added": (lambda x, r, w, v: norm(x + v, w), {"rms_norm": 1}),
    "alpha": (lambda x, r, w, v: norm(torch.add(x, r, alpha=2), w), {"rms_norm": 1}),
    "twice itself": (lambda x, r, w, v: (n := norm(x, w)) + n, {"rms_norm": 1}),
    "another type": (lambda x, r, w, v: norm(x.double() + r, None), {"rms_norm": 1}),
    "a weight made of the sum": (lambda x, r, w, v: (s := x + r, norm(s, s.mean(0))), {"rms_norm": 1}),
    "a transposed sum": (lambda x, r, w, v: norm(x.T.contiguous().T + r.T.contiguous().T, w), {"rms_norm": 1}),
    "a view of the sum": (lambda x, r, w, v: norm((x + r).view(len(x), 1, -1).transpose(0, 1), w), {"rms_norm": 1}),
    "asked for already": (lambda x, r, w, v: add_rms_norm(x, r, x.shape[-1:], w, EPS), {"add_rms_norm": 1}),
}


def crossed(*axes: Iterable[Any], rare: Sequence[Any] = ()) -> list[Any]:
    """The cells of a table, those of a chessboard's white squares each day, the others and the ``rare`` values of the
    last axis in the heavy tests. Of three axes each value meets each of another. What a pass looks for knows no size,
    and that every size has the operators' bits in every type is proven without compiling."""
    *outer, last = map(list, axes)
    cells = []
    for places in product(*(range(len(axis)) for axis in (*outer, [*last, *rare]))):
        values = [axis[i] for axis, i in zip((*outer, [*last, *rare]), places, strict=True)]
        heavy = places[-1] >= len(last) or sum(places) % 2
        name = "-".join(getattr(value, "__name__", str(value)) for value in values)
        cells.append(pytest.param(*values, id=name, marks=[pytest.mark.heavy] if heavy else []))
    return cells


def ours(graph: torch.fx.Graph) -> Counter[str]:
    """How often each of our operators is in it."""
    names = (str(node.target) for node in graph.nodes if getattr(node.target, "namespace", "") == "rmsnorm")
    return Counter(name.split(".")[1] for name in names)


def joining(seen: list[Counter[str]]) -> Any:
    """A backend that only joins, and runs the graph's operators one by one."""

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        Neighbours()(graph.graph)
        graph.graph.lint()
        graph.graph.eliminate_dead_code()
        graph.recompile()
        seen.append(ours(graph.graph))
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)


def results(function: Function, leaves: list[Tensor], rows: int, columns: int) -> list[Tensor]:
    """Without gradients, and with them: outputs, then gradients."""
    with torch.no_grad():
        inferred = function(*leaves)
    outputs = function(*leaves)
    inferred, outputs = (one if isinstance(one, tuple) else (one,) for one in (inferred, outputs))
    grads = [incoming(rows, columns, y.dtype).reshape(y.shape) * (1 + i) for i, y in enumerate(outputs)]
    found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    return [*inferred, *(y.detach() for y in outputs), *(g for g in found if g is not None)]


def drawn(rows: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
    tensors = sample(rows, columns, dtype), sample(rows, columns, dtype, seed=1), gains(columns, dtype=dtype)
    return [t.clone().requires_grad_() for t in (*tensors, gains(columns, dtype=dtype) * 0.5)]


@pytest.mark.parametrize(
    ("name", "dtype", "columns"),
    crossed(JOINED | INFERRED | LEFT, (torch.float32, torch.bfloat16), (127, 1027), rare=(1, 3, 576)),
)
def test_joined_graphs_have_the_bits_of_eager_mode(name, dtype, columns):
    function, expected, *recorded = (JOINED | INFERRED | LEFT)[name]
    torch.compiler.reset()
    seen: list[Counter[str]] = []
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=joining(seen))
    mine, eager = (results(f, drawn(6, columns, dtype), 6, columns) for f in (compiled, function))
    assert len(mine) == len(eager)
    assert all(map(same_bits, mine, eager))
    if name == "a transposed sum" and columns == 1:
        expected = {"add_rms_norm": 1}  # that is contiguous
    assert seen[0] == expected
    assert seen[1] == (*recorded, {f"{operator}_forward": count for operator, count in expected.items()})[0]


def rewritten(
    function: Callable[..., Any], leaves: list[Tensor], decompositions: dict[Any, Any] | None = None
) -> tuple[list[Tensor], list[torch.fx.Node]]:
    """Results of the rewritten graphs, and our operators of that of backward."""
    graphs: list[torch.fx.Graph] = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        Neighbours()(graph.graph)
        graph.graph.lint()
        graph.recompile()
        graphs.append(graph.graph)
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler, decompositions=decompositions)
    found = results(torch.compile(function, fullgraph=True, backend=backend), leaves, *leaves[0].shape)
    return found, [node for node in graphs[-1].nodes if getattr(node.target, "namespace", "") == "rmsnorm"]


def of_stream(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
    s = x + r
    return s + norm(s, w) @ r.T @ r


def of_sandwich(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
    """Two norms and the sum between them, as Gemma has them."""
    s = r + norm(x, w, "gemma")
    return s + norm(s, v, "gemma", 1e-3) @ r.T @ r


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("function", "joined"),
    [(of_stream, "rounded_rms_norm_backward"), (of_sandwich, "rounded_sandwich_rms_norm_backward")],
)
def test_the_gradient_of_a_residual_stream_is_added_as_eager_mode_adds_it(function, joined, dtype):
    mine, (found,) = rewritten(function, drawn(6, 127, dtype))
    assert all(map(same_bits, mine, results(function, drawn(6, 127, dtype), 6, 127)))
    assert found.target is getattr(torch.ops.rmsnorm, joined).default
    assert found.args[1] is not None


CASTS = {
    (torch.float32, torch.bfloat16): True,
    (torch.float32, torch.float16): True,
    (torch.bfloat16, torch.float32): True,
    (torch.float16, torch.float32): True,
    (torch.float32, torch.float64): False,
    (torch.bfloat16, torch.float16): False,
}


@pytest.mark.parametrize(("mode", "types", "columns"), crossed(OPTIONS, CASTS, (127, 1027)))
def test_a_cast_is_done_where_the_sum_is_normed(mode, types, columns):
    """Rows whose squares overflow or vanish are rounded twice, too."""
    (dtype, low), joined = types, CASTS[types]

    def function(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
        return norm(s := x + r, w, mode).to(low), s

    def read_twice(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
        return (y := norm(x + r, w, mode)).to(low), y

    for one, names in ((function, {"add_rms_norm_cast": 1}), (read_twice, {"add_rms_norm": 1})):
        torch.compiler.reset()
        seen: list[Counter[str]] = []
        compiled = torch.compile(one, fullgraph=True, dynamic=False, backend=joining(seen))
        leaves = [leaf.detach() for leaf in drawn(40, columns, dtype)]
        for i, scale in enumerate((1e4, 1e-4, 0.0) if dtype is torch.float16 else (1e30, 1e-30, 0.0)):
            leaves[0][i::8] *= scale
            leaves[1][i::8] *= scale
        assert all(map(same_bits, compiled(*leaves), one(*leaves)))
        assert seen == [names if joined else {"add_rms_norm": 1}]
        leaves = drawn(6, columns, dtype)
        mine, eager = (results(f, leaves, 6, columns) for f in (compiled, one))
        assert all(map(same_bits, mine, eager))
        assert {"add_rms_norm_forward": 1} in seen


def test_a_graph_without_our_operators_is_left_as_it_is():
    def function(x: Tensor, r: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x + r, x.shape[-1:]) + r

    graph = torch.fx.experimental.proxy_tensor.make_fx(function)(torch.randn(2, 4), torch.randn(2, 4)).graph
    before = [(node, node.args, node.target) for node in graph.nodes]
    Neighbours()(graph)
    assert [(node, node.args, node.target) for node in graph.nodes] == before


class Kept(CustomGraphPass):
    """Remembers our operators in the graphs that Inductor is about to compile."""

    def __init__(self) -> None:
        self.seen: list[Counter[str]] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        graph.lint()  # nobody is read before it is made: Inductor sorts graphs later
        self.seen.append(ours(graph))

    def uuid(self) -> None:
        return None  # so that nothing comes from a cache


@pytest.fixture
def exact_after():
    yield
    rmsnorm.set_compile_mode("exact")


@pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_inductor_joins_and_hands_over_as_the_mode_says(dynamic, exact_after):
    """In mode exact with the bits of eager mode; in the other there is none of our operators, and the numbers are near.
    A graph is made anew when the mode has changed."""
    kept = Kept()
    torch.compiler.reset()
    with torch._inductor.config.patch(post_grad_custom_post_pass=kept):
        compiled = torch.compile(stream, fullgraph=True, dynamic=dynamic)
        for rows in (6, 17) if dynamic else (6,):
            mine, eager = (results(f, drawn(rows, 576, torch.float32), rows, 576) for f in (compiled, stream))
            assert all(map(same_bits, mine, eager))
        assert kept.seen[0] == {"add_rms_norm": 2}
        # Of a few rows 1/rms isn't kept.
        assert kept.seen[1] == {"add_rms_norm_forward" if dynamic else "add_rms_norm": 2}
        kept.seen.clear()
        rmsnorm.set_compile_mode("inductor")
        near = results(compiled, drawn(6, 576, torch.float32), 6, 576)
        assert kept.seen
        assert not any(kept.seen)
        for a, b in zip(near, results(stream, drawn(6, 576, torch.float32), 6, 576), strict=True):
            torch.testing.assert_close(a, b)


def test_a_mode_that_there_is_not():
    with pytest.raises(ValueError, match="unknown mode 'fast'; choose one of 'exact', 'inductor'"):
        rmsnorm.set_compile_mode("fast")


@pytest.mark.parametrize(("when", "kind"), [("post_grad", Neighbours), ("joint", Few)])
def test_places_that_others_use_are_left_to_them(when, kind):
    theirs, pair = Kept(), [f"{when}_custom_{end}" for end in ("pre_pass", "post_pass")]
    for taken in (pair[:1], pair):
        with torch._inductor.config.patch(dict.fromkeys(pair) | dict.fromkeys(taken, theirs)):
            _graphs.prepare()
            now = {place: getattr(torch._inductor.config, place) for place in pair}
        assert all(now[place] is theirs for place in taken)
        assert [type(one) for place, one in now.items() if place not in taken] == [kind] * (2 - len(taken))
