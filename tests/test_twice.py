"""Proves for every form at once what follows from its row: the gradient under `create_graph=True` has the bits of the
usual one, its derivatives are right up to the third, a result requires grad if and only if it follows what learns,
what is saved may come back in other strides, compiled gradients have the bits of eager ones, and the first call of a
process may be a compiled one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import same_bits
from torch import Tensor
from torch.autograd import gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

import rmsnorm

EPS = 1e-6
Results = tuple[Tensor, ...]


def _halves(cos: Tensor, sin: Tensor) -> Results:
    return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)


def _n(x: Tensor) -> int:
    return x.shape[-1]


# A name for each form and the shapes of its tensors: r a row each, w a weight, m a modulation, h heads, a angles, which
# nobody learns here.
FORMS: dict[str, tuple[str, Callable[..., Any]]] = {
    "norm": ("rw", lambda x, w: rmsnorm.rms_norm(x, _n(x), w, EPS)),
    "lean": ("rw", lambda x, w: rmsnorm.rms_norm(x, _n(x), w, EPS, memory="lean")),
    "add": ("rrw", lambda x, r, w: rmsnorm.add_rms_norm(x, r, _n(x), w, EPS)),
    "norm, add": ("rrw", lambda x, r, w: rmsnorm.rms_norm_add(x, r, _n(x), w, EPS)),
    "sandwich": ("rrww", lambda x, r, w, v: rmsnorm.sandwich_rms_norm(x, r, _n(x), w, v, EPS)),
    "bias": ("rww", lambda x, w, b: rmsnorm.rms_norm(x, _n(x), w, EPS, bias=b, return_rstd=True)),
    "partial": ("rw", lambda x, w: rmsnorm.rms_norm(x, _n(x), w, EPS, partial=0.5)),
    "add, bias": ("rrww", lambda x, r, w, b: rmsnorm.add_rms_norm(x, r, _n(x), w, EPS, bias=b, return_rstd=True)),
    "unrounded": ("rrw", lambda x, r, w: rmsnorm.add_rms_norm(x, r, _n(x), w, EPS, round_sum=False)),
    "l2": ("rw", lambda x, w: rmsnorm.l2_norm(x, _n(x), w)),
    "factor": ("r", lambda x: rmsnorm.inverse_rms(x, _n(x), EPS)),
    "gated": ("rrw", lambda x, g, w: rmsnorm.gated_rms_norm(x, g, _n(x), w, EPS)),
    "layer": ("rww", lambda x, w, b: rmsnorm.layer_norm(x, (_n(x),), w, b)),
    "gated add": ("rrm", rmsnorm.gated_add),
    "modulated": (
        "rrmmm",
        lambda x, r, g, s, t: rmsnorm.modulated_norm(x, _n(x), eps=EPS, scale=s, shift=t, residual=r, gate=g),
    ),
    "modulated, layer": (
        "rmm",
        lambda x, s, t: rmsnorm.modulated_norm(x, _n(x), eps=EPS, scale=s, shift=t, statistic="layer"),
    ),
    "heads": (
        "hhwwaa",
        lambda q, k, w, v, c, s: rmsnorm.heads_rms_norm_rope(q, k, *_halves(c, s), w, v, EPS),
    ),
    "rope": ("hhaa", lambda q, k, c, s: rmsnorm.rope(q, k, *_halves(c, s))),
}


def tensors(kinds: str, columns: int, dtype: torch.dtype = torch.float64, size: float = 1.0) -> list[Tensor]:
    dice = torch.Generator().manual_seed(0)
    shapes = {"r": (3, columns), "w": (columns,), "m": (1, columns), "h": (2, 3, columns), "a": (3, columns // 2)}
    return [
        (torch.randn(shapes[kind], generator=dice, dtype=torch.float64) * (size if kind in "rh" else 1)).to(dtype)
        for kind in kinds
    ]


def results_of(found: Any) -> Results:
    return found if isinstance(found, tuple) else (found,)


def learning(kinds: str, given: list[Tensor]) -> list[Tensor]:
    return [t.requires_grad_() for t, kind in zip(given, kinds, strict=True) if kind != "a"]


@pytest.mark.parametrize("name", FORMS)
def test_bits(native_target, name):
    """Also of rows whose squares no float32 holds, where torch's operators would find 0."""
    kinds, call = FORMS[name]
    for dtype, size in product((torch.float32, torch.bfloat16, torch.float64), (1.0, 1e25)):
        given = tensors(kinds, 130, dtype, size)
        leaves = learning(kinds, given)
        results = results_of(call(*given))
        grads = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y) for y in results]
        usual = torch.autograd.grad(results, leaves, grads, retain_graph=True)
        graphed = torch.autograd.grad(results, leaves, grads, create_graph=True)
        assert all(map(same_bits, usual, graphed)), (dtype, size)
        assert any(g.any() for g in usual) or (name, size) == ("factor", 1e25)  # 1e-50


@pytest.mark.parametrize("name", FORMS)
def test_saved_tensors_come_back_in_other_strides(native_target, name):
    """As hooks may hand them back that store them compressed, say: the numbers of each row, too."""
    kinds, call = FORMS[name]

    def spread(saved: Tensor) -> Tensor:
        return torch.stack([saved.detach(), torch.full_like(saved, 7)], -1)[..., 0]

    def gradients(given: list[Tensor]) -> Results:
        leaves = learning(kinds, given)
        results = results_of(call(*given))
        grads = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y) for y in results]
        return torch.autograd.grad(results, leaves, grads)

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        usual = gradients(tensors(kinds, 130, dtype))
        with torch.autograd.graph.saved_tensors_hooks(spread, lambda t: t):
            assert all(map(same_bits, usual, gradients(tensors(kinds, 130, dtype)))), dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_compiled_gradients(name, dtype):
    """Those of eager mode: of each type, as what is kept may be of one type in one and of two in another."""
    kinds, call = FORMS[name]
    torch._dynamo.reset()
    found: list[Results] = []
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        given = tensors(kinds, 130, dtype)
        leaves = learning(kinds, given)
        results = results_of(run(*given))
        grads = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y) for y in results]
        found.append((*(y.detach() for y in results), *torch.autograd.grad(results, leaves, grads)))
    if name in ("layer", "lean"):  # torch's own LayerNorm there, and a norm that keeps its input
        for one, other in zip(*found, strict=True):
            assert (one - other).abs().max() <= 4 * torch.finfo(dtype).eps * one.abs().max()
    else:
        assert all(map(same_bits, *found))


@pytest.mark.parametrize("name", FORMS)
def test_traced_gradients(name):
    """In fp64, where all that is kept is of one type."""
    kinds, call = FORMS[name]

    def gradients(*given: Tensor) -> Results:
        leaves = learning(kinds, [t.detach() for t in given])
        fixed = given[len(leaves) :]
        return torch.autograd.grad(sum(y.sin().sum() for y in results_of(call(*leaves, *fixed))), leaves)

    given = tensors(kinds, 130)
    traced = make_fx(gradients, tracing_mode="fake")(*given)
    torch.testing.assert_close(traced(*given), gradients(*given), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", FORMS)
def test_third_derivatives(target, name):
    if (target, name) == ("reference", "layer"):
        pytest.skip("torch's own LayerNorm, whose third derivatives are wrong (pytorch/pytorch#175754)")
    kinds, call = FORMS[name]
    given = tensors(kinds, 4)
    leaves = learning(kinds, given)
    fixed = given[len(leaves) :]

    def gradient(*tensors: Tensor) -> Results:
        first = sum(y.sin().sum() for y in results_of(call(*tensors, *fixed)))
        return torch.autograd.grad(first, tensors, create_graph=True)  # type: ignore[arg-type]

    assert gradgradcheck(gradient, leaves, fast_mode=True)


@pytest.mark.parametrize("name", FORMS)
def test_a_tensor_that_is_given_twice(target, name):
    """Has the sum of both gradients, of the gradient too: that of two tensors with the same numbers."""
    kinds, call = FORMS[name]
    alike = [[i for i, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds) if kind != "a"]
    for several in alike:
        if len(several) < 2:
            continue

        def penalty(given: list[Tensor], leaves: list[Tensor]) -> Results:
            first = sum(y.sin().sum() for y in results_of(call(*given)))
            found = torch.autograd.grad(first, leaves, create_graph=True)  # type: ignore[arg-type]
            return torch.autograd.grad(sum(found).square().sum(), leaves)  # type: ignore[union-attr]

        given = tensors(kinds, 4)
        one = given[several[0]].requires_grad_()
        together = penalty([one if i in several else t for i, t in enumerate(given)], [one])
        apart = [one.detach().clone().requires_grad_() if i in several else t for i, t in enumerate(given)]
        each = penalty(apart, [apart[i] for i in several])
        torch.testing.assert_close(together[0], sum(each), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FORMS)
def test_who_learns(target, name):
    """A result requires grad if it changes with the only tensor that does; else it is a constant, as torch's are."""
    kinds, call = FORMS[name]
    for i, kind in enumerate(kinds):
        if kind == "a":
            continue
        given = tensors(kinds, 130, torch.float32)
        before = results_of(call(*given))
        moved = results_of(call(*(t + (j == i) for j, t in enumerate(given))))
        given[i].requires_grad_()
        results = results_of(call(*given))
        follows = [not torch.equal(a, b) for a, b in zip(before, moved, strict=True)]
        assert [y.requires_grad for y in results] == follows, i
        last = [y for y in results if y.requires_grad][-1]
        (found,) = torch.autograd.grad(last.sum(), given[i])
        assert found.isfinite().all()


def test_the_first_call_is_a_compiled_one(python):
    """Of each form, in a process that has called nothing: dynamo then traces whatever is asked the first time."""
    program = """
import sys, torch, rmsnorm
sys.path.insert(0, {home!r})
from test_twice import FORMS, learning, tensors
calls = dict(FORMS)
calls["quantised"] = "rw", lambda x, w: rmsnorm.quantised_rms_norm(x, x.shape[-1], w, 1e-6)[0]
calls["out"] = "rrw", lambda x, y, w: rmsnorm.rms_norm(x, x.shape[-1], w, 1e-6, out=y)
calls["in place"] = "rrw", lambda x, r, w: rmsnorm.add_rms_norm_(x, r, w)
for name, (kinds, call) in calls.items():
    given = tensors(kinds, 64, torch.float32)
    torch.compile(call, fullgraph=True, backend="eager")(*given)
print("compiled", len(calls))
"""
    result = python(program.format(home=str(Path(__file__).parent)))
    assert result.stdout == f"compiled {len(FORMS) + 3}\n", result.stderr[-3000:]
