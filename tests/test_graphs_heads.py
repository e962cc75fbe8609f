"""Proves that rotary embedding behind the norms of query and key becomes one operator in graphs, where that changes no
bit, and nowhere else.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import EPS, gains, incoming, same_bits, sample
from test_graphs import OPTIONS, Kept, crossed, joining
from torch import Tensor

from rmsnorm import rms_norm

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]
BATCH, TOKENS = 2, 5
JOINED = "heads_rms_norm_rope"


def norm(x: Tensor, weight: Tensor | None, mode: str = "llama", eps: float = EPS) -> Tensor:
    return rms_norm(x, x.shape[-1:], weight, eps, **OPTIONS[mode])


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers has it."""
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def quarter(x: Tensor, halves: Callable[[Tensor], Any] = halves) -> Tensor:
    a, b = halves(x)
    return torch.cat((-b, a), -1)


def turn(x: Tensor, cos: Tensor, sin: Tensor, quarter: Callable[[Tensor], Tensor] = quarter) -> Tensor:
    return x * cos + quarter(x) * sin


def layer(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, w: Tensor, v: Tensor, turn: Any = turn, mode: str = "llama"
) -> Any:
    """Qwen3: what a projection wrote, normed by head, [batch, heads, tokens, head_dim], turned."""
    q, k = norm(q, w, mode).transpose(1, 2), norm(k, v, mode).transpose(1, 2)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return turn(q, cos, sin), turn(k, cos, sin)


def chunks(q, k, cos, sin, w, v):
    return layer(q, k, cos, sin, w, v, lambda x, c, s: turn(x, c, s, lambda x: quarter(x, lambda x: x.chunk(2, -1))))


def the_other_way_round(q, k, cos, sin, w, v):
    return layer(q, k, cos, sin, w, v, lambda x, cos, sin: cos * x + sin * quarter(x))


def sines_first(q, k, cos, sin, w, v):
    """A graph's results have the strides of eager mode, and these are others."""
    return layer(q, k, cos, sin, w, v, lambda x, cos, sin: sin * quarter(x) + cos * x)


def two_dimensions(q, k, cos, sin, w, v):
    q, k = norm(q, w).transpose(1, 2), norm(k, v).transpose(1, 2)
    cos, sin = cos[0], sin[0]
    return turn(q, cos, sin), turn(k, cos, sin)


def moved_first(q, k, cos, sin, w, v, outside=False):
    """Gemma 3, in front of a product with the heads, or as a graph's own results."""
    q, k = norm(q.transpose(1, 2), w, "gemma"), norm(k.transpose(1, 2), v, "gemma")
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q, k = turn(q, cos, sin), turn(k, cos, sin)
    return (q, k) if outside else q @ k.transpose(-1, -2)[:, :1]


def two_layers(q, k, cos, sin, w, v):
    first = layer(q, k, cos, sin, w, v)
    return *first, *layer(*(x.transpose(1, 2) for x in first), cos, sin, v, w)


Function = Callable[..., Any]
TURNED: dict[str, tuple[Function, dict[str, int]]] = {
    "Qwen3": (layer, {JOINED: 1}),
    "torch's rounding": (lambda *a: layer(*a, mode="torch"), {JOINED: 1}),
    "Gemma's gain": (lambda *a: layer(*a, mode="gemma"), {JOINED: 1}),
    "without weights": (lambda q, k, c, s, w, v: layer(q, k, c, s, None, None), {JOINED: 1}),
    "chunks": (chunks, {JOINED: 1}),
    "the other way round": (the_other_way_round, {JOINED: 1}),
    "angles of two dimensions": (two_dimensions, {JOINED: 1}),
    "two layers": (two_layers, {JOINED: 2}),
}


def read_twice(q, k, cos, sin, w, v):
    q, k = norm(q, w).transpose(1, 2), norm(k, v).transpose(1, 2)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return turn(q, cos, sin) + q, turn(k, cos, sin)


def another_eps(q, k, cos, sin, w, v):
    q, k = norm(q, w).transpose(1, 2), norm(k, v, eps=1e-3).transpose(1, 2)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return turn(q, cos, sin), turn(k, cos, sin)


def another_angle(q, k, cos, sin, w, v):
    q, k = norm(q, w).transpose(1, 2), norm(k, v).transpose(1, 2)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return turn(q, cos, sin), turn(k, sin, cos)


def wide_angles(q, k, cos, sin, w, v):
    return layer(q, k, cos.double(), sin.double(), w, v)


def partly(q, k, cos, sin, w, v):
    half = q.shape[-1] // 2

    def some(x, cos, sin):
        return torch.cat((turn(x[..., :half], cos[..., :half], sin[..., :half]), x[..., half:]), -1)

    return layer(q, k, cos, sin, w, v, some)


def not_negated(q, k, cos, sin, w, v):
    return layer(q, k, cos, sin, w, v, lambda x, c, s: turn(x, c, s, lambda x: torch.cat(halves(x)[::-1], -1)))


def neighbours(q, k, cos, sin, w, v):
    """Cohere's order."""
    return layer(
        q,
        k,
        cos,
        sin,
        w,
        v,
        lambda x, c, s: turn(x, c, s, lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)),
    )


def angles_of_heads(q, k, cos, sin, w, v):
    q, k = norm(q, w).transpose(1, 2), norm(k, v).transpose(1, 2)
    cos, sin = (x.unsqueeze(1).expand(-1, k.shape[1], -1, -1) for x in (cos, sin))
    return turn(k, cos, sin), turn(q[:, : k.shape[1]], cos, sin)


LEFT: dict[str, tuple[Function, dict[str, int]]] = {
    "one of them": (lambda q, k, c, s, w, v: layer(q, k, c, s, w, v)[0], {"rms_norm": 1}),
    "read twice": (read_twice, {"rms_norm": 2}),
    "sines first": (sines_first, {"rms_norm": 2}),
    "another eps": (another_eps, {"rms_norm": 2}),
    "another angle": (another_angle, {"rms_norm": 2}),
    "angles of a wider type": (wide_angles, {"rms_norm": 2}),
    "some of the columns": (partly, {"rms_norm": 2}),
    "not negated": (not_negated, {"rms_norm": 2}),
    "pairs that are neighbours": (neighbours, {"rms_norm": 2}),
    "angles of each head": (angles_of_heads, {"rms_norm": 2}),
    "turned by the wrong half": (
        lambda *a: layer(*a, lambda x, c, s: turn(x, c, s, lambda x: torch.cat((-halves(x)[0], halves(x)[1]), -1))),
        {"rms_norm": 2},
    ),
}


def drawn(size: int, dtype: torch.dtype, batch: int = BATCH, tokens: int = TOKENS) -> list[Tensor]:
    """Query of 4 heads, key of 2, angles, weights."""
    q, k = (sample(batch * tokens * h, size, dtype, seed=h).view(batch, tokens, h, size) for h in (4, 2))
    angles = torch.rand(batch, tokens, size, generator=torch.Generator().manual_seed(3)) * 6.3
    leaves = [
        q,
        k,
        angles.cos().to(dtype),
        angles.sin().to(dtype),
        gains(size, dtype=dtype),
        gains(size, dtype=dtype) / 2,
    ]
    return [leaf.clone().requires_grad_(i not in (2, 3)) for i, leaf in enumerate(leaves)]


def results(function: Function, leaves: list[Tensor]) -> list[Tensor]:
    """Without gradients, and with them: outputs, then gradients."""
    with torch.no_grad():
        inferred = function(*leaves)
    outputs = function(*leaves)
    inferred, outputs = (one if isinstance(one, tuple) else (one,) for one in (inferred, outputs))
    assert [a.stride() for a in inferred] == [a.stride() for a in outputs]
    grads = [incoming(one.numel() // one.shape[-1], one.shape[-1], one.dtype).reshape(one.shape) for one in outputs]
    found = torch.autograd.grad(outputs, [one for one in leaves if one.requires_grad], grads, allow_unused=True)
    return [*inferred, *(one.detach() for one in outputs), *(one for one in found if one is not None)]


@pytest.mark.parametrize(
    ("name", "dtype", "size"), crossed(TURNED | LEFT, (torch.float32, torch.bfloat16), (6, 64), rare=(2, 80, 128))
)
def test_turned_heads_have_the_bits_of_eager_mode(name, dtype, size):
    if size == 2 and name == "some of the columns":
        pytest.skip("half of 2 columns are no pair")
    function, expected = (TURNED | LEFT)[name]
    torch.compiler.reset()
    seen: list[Counter[str]] = []
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=joining(seen))
    mine, eager = (results(f, drawn(size, dtype)) for f in (compiled, function))
    assert len(mine) == len(eager)
    assert all(map(same_bits, mine, eager))
    assert [a.stride() for a in mine] == [a.stride() for a in eager]
    assert seen[0] == expected
    assert seen[1] == {f"{operator}_forward": count for operator, count in expected.items()}


@pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("lengths", [(5,), (5, 9)], ids=["static", "dynamic"])
def test_inductor_turns_heads(lengths):
    kept = Kept()
    torch.compiler.reset()
    with torch._inductor.config.patch(post_grad_custom_post_pass=kept), torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True)
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in lengths:
                leaves = drawn(64, dtype, tokens=tokens)
                for leaf in leaves[:4] if len(lengths) > 1 else ():
                    torch._dynamo.mark_dynamic(leaf, 1)
                assert all(map(same_bits, compiled(*leaves), layer(*leaves)))
    assert kept.seen == [{JOINED: 1}] * 2


@pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler")
def test_heads_that_were_moved_before_the_norm_are_turned_inside_a_graph():
    """There the operator's strides, which aren't the norm's, are nobody's to see."""
    kept = Kept()
    torch.compiler.reset()
    with torch._inductor.config.patch(post_grad_custom_post_pass=kept), torch.no_grad():
        leaves = drawn(64, torch.float32)
        torch.testing.assert_close(torch.compile(moved_first, fullgraph=True)(*leaves), moved_first(*leaves))
        assert kept.seen == [{JOINED: 1}]
        kept.seen.clear()
        outside = torch.compile(lambda *a: moved_first(*a, outside=True), fullgraph=True)(*leaves)
        eager = moved_first(*leaves, outside=True)
        assert all(map(same_bits, outside, eager))
        assert [a.stride() for a in outside] == [a.stride() for a in eager]
        assert kept.seen == [{"rms_norm": 2}]
