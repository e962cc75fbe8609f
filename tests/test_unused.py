"""Outputs that a loss doesn't use: nothing arrives at them, which is not a gradient of zeros.

Each form against its steps one after the other, by torch's autograd in float64, with a row that has an infinity: where
the steps' gradient is None, ours is None or 0; where it is finite, ours is close; where it is NaN, ours may be
anything.
"""

from itertools import combinations

import pytest
import torch

import rmsnorm
from rmsnorm.forms import general_ops

# torch warns about its own code: inductor still uses TorchScript, and dynamo makes an autograd.Function.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]
INF = float("inf")


def norm(x, weight=None, bias=None, eps=1e-6):
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def turned(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def add_steps(x, r, w, b):
    s = x + r
    return norm(s, w, b), s


def general_steps(x, r, w, b):
    return *add_steps(x, r, w, b), torch.rsqrt((x + r).square().mean(-1, keepdim=True) + 1e-6)


def sandwich_steps(x, r, w, b):
    s = r + norm(x, w)
    return norm(s, b), s


def modulated_steps(x, r, gate, scale, shift):
    s = r + (x if gate is None else gate * x)
    return norm(s) * (1 + scale) + shift, s


def layer_steps(x, r, gate, scale, shift):
    s = r + gate * x
    return torch.nn.functional.layer_norm(s, (8,), None, None, 1e-6) * (1 + scale) + shift, s


def heads_steps(q, k, w, b, cos, sin):
    return turned(norm(q, w), cos, sin), turned(norm(k, b), cos, sin)


def rope_steps(q, k, cos, sin):
    return turned(q, cos, sin), turned(k, cos, sin)


def modulated(x, r, gate, scale, shift, **more):
    return rmsnorm.modulated_norm(x, 8, eps=1e-6, scale=scale, shift=shift, residual=r, gate=gate, **more)


ROWS, HEADS = [(3, 8), (3, 8)], [(2, 3, 8), (1, 3, 8)]
# By name: ours, and the steps.
FORMS = {
    "add": (lambda x, r, w, b: rmsnorm.add_rms_norm(x, r, 8, w, 1e-6), lambda x, r, w, b: add_steps(x, r, w, None)),
    "lean": (
        lambda x, r, w, b: rmsnorm.add_rms_norm(x, r, 8, w, 1e-6, memory="lean"),
        lambda x, r, w, b: add_steps(x, r, w, None),
    ),
    "bias": (lambda x, r, w, b: rmsnorm.add_rms_norm(x, r, 8, w, 1e-6, bias=b), add_steps),
    "rstd": (
        lambda x, r, w, b: rmsnorm.add_rms_norm(x, r, 8, w, 1e-6, bias=b, return_rstd=True),
        general_steps,
    ),
    "sandwich": (lambda x, r, w, b: rmsnorm.sandwich_rms_norm(x, r, 8, w, b, 1e-6), sandwich_steps),
    "modulated": (modulated, modulated_steps),
    "modulated, no gate": (
        lambda x, r, _, scale, shift: modulated(x, r, None, scale, shift),
        lambda x, r, _, scale, shift: modulated_steps(x, r, None, scale, shift),
    ),
    "modulated, layer": (lambda *given: modulated(*given, statistic="layer"), layer_steps),
    "heads": (lambda q, k, w, b, *a: rmsnorm.heads_rms_norm_rope(q, k, *a, w, b, 1e-6), heads_steps),
    "rope": (rmsnorm.rope, rope_steps),
}


def shapes_of(name):
    """Of what learns (the infinity is in the second), and how many angles there are behind it."""
    if name.startswith("modulated"):
        return ROWS + [(3, 8)] * 3, 0
    return {"heads": (HEADS + [(8,)] * 2, 2), "rope": (HEADS, 2)}.get(name, (ROWS + [(8,)] * 2, 0))


def outputs_of(name):
    return 3 if name == "rstd" else 2


CASES = [
    (name, used)
    for name in FORMS
    for count in range(1, outputs_of(name) + 1)
    for used in combinations(range(outputs_of(name)), count)
]


def tensors_of(name, dtype, infinite):
    torch.manual_seed(0)
    shapes, angles = shapes_of(name)
    given = [torch.rand(shape, dtype=torch.float64) + 0.5 for shape in shapes]
    if infinite:
        given[1][..., 1, 1] = INF
    given = [t.to(dtype).requires_grad_() for t in given]
    return given, [torch.rand(3, 8, dtype=torch.float64).to(dtype) for _ in range(angles)]


def loss(results, used):
    return sum((results[i] * (1 + i)).sum() for i in used)


def check(mine, theirs, tolerance):
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        if other is None:
            assert one is None or not one.any()
            continue
        known = other.isfinite()
        found = torch.zeros_like(other) if one is None else one.double()
        torch.testing.assert_close(found[known], other[known], rtol=tolerance, atol=tolerance)


def oracle(name, used, infinite):
    given, angles = tensors_of(name, torch.float64, infinite)
    return torch.autograd.grad(loss(FORMS[name][1](*given, *angles), used), given, allow_unused=True)


@pytest.mark.parametrize(("name", "used"), CASES)
@pytest.mark.parametrize("way", ["eager", "graph of the gradient", "batch", "vjp"])
@pytest.mark.parametrize("infinite", [True, False])
def test_each_subset_of_outputs(name, used, way, infinite):
    given, angles = tensors_of(name, torch.float32, infinite)
    ours = FORMS[name][0]
    if way == "vjp":
        pull = torch.func.vjp(lambda *given: loss(ours(*given, *angles), used), *given)[1]
        mine = pull(torch.ones(()))
    else:
        made = loss(ours(*given, *angles), used)
        if way == "batch":
            batch = torch.autograd.grad(made, given, torch.ones(2), allow_unused=True, is_grads_batched=True)
            mine = [t if t is None else t[1] for t in batch]
        else:
            mine = torch.autograd.grad(made, given, allow_unused=True, create_graph=way != "eager")
    theirs = oracle(name, used, infinite)
    check([t if t is None else t.detach() for t in mine], theirs, 1e-4)


@pytest.mark.parametrize(("name", "used"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_values_of_zeros(name, used, dtype):
    """Where no row has an infinity, zeros that arrive are nothing that arrives."""
    given, angles = tensors_of(name, dtype, False)
    outputs = FORMS[name][0](*given, *angles)
    ones = [torch.ones_like(y) if i in used else torch.zeros_like(y) for i, y in enumerate(outputs)]
    zeros = torch.autograd.grad(outputs, given, ones, retain_graph=True, allow_unused=True)
    some = [[t[i] for i in used] for t in (outputs, ones)]
    for alone, other in zip(torch.autograd.grad(some[0], given, some[1], allow_unused=True), zeros, strict=True):
        if alone is None:
            assert other is None or not other.any()
        else:
            assert torch.equal(alone, other)


@pytest.mark.parametrize(("name", "used"), CASES)
def test_twice(name, used):
    found = []
    for function in FORMS[name]:
        given, angles = tensors_of(name, torch.float64, False)
        made = loss([t.square() for t in function(*given, *angles)], used)
        first = torch.autograd.grad(made, given, allow_unused=True, create_graph=True)
        moving = [t.square().sum() for t in first if t is not None and t.requires_grad]
        found.append(torch.autograd.grad(sum(moving), given, allow_unused=True))
    check(found[0], found[1], 1e-9)


@pytest.mark.parametrize("more", [{}, {"memory": "lean"}, {"bias": torch.ones(4, dtype=torch.float16)}])
def test_a_sum_that_overflows(more):
    x, r = (torch.full((1, 4), 50000.0, dtype=torch.float16, requires_grad=True) for _ in range(2))
    w = torch.ones(4, dtype=torch.float16, requires_grad=True)
    s = rmsnorm.add_rms_norm(x, r, 4, w, 1e-6, **more)[1]
    dx, dr, dw = torch.autograd.grad(s.sum(), (x, r, w), allow_unused=True)
    assert dx.tolist() == dr.tolist() == [[1.0] * 4]
    assert dw is None or not dw.any()


def test_nothing_arrives_at_what_comes_before():
    x = torch.rand(3, 8)
    x[1, 1] = INF
    x.requires_grad_()
    scale = rmsnorm.gated_rms_norm(x, torch.rand(3, 8), 8, None, 1e-6)
    s = rmsnorm.modulated_norm(torch.rand(3, 8), 8, scale=scale, residual=torch.rand(3, 8, requires_grad=True))[1]
    (dx,) = torch.autograd.grad(s.sum(), x, allow_unused=True)
    assert dx is None or not dx.any()


@pytest.mark.parametrize("name", ["bias", "sandwich", "modulated", "heads"])
def test_in_graphs(name):
    given, angles = tensors_of(name, torch.float32, True)
    used = (0,) if name == "heads" else (1,)
    compiled = torch.compile(lambda *given: FORMS[name][0](*given, *angles)[used[0]], fullgraph=True)
    mine = torch.autograd.grad((compiled(*given) * (1 + used[0])).sum(), given, allow_unused=True)
    check(mine, oracle(name, used, True), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("eps", [1e-6, -1e-6])
@pytest.mark.parametrize("counted", [-1, 5])
def test_an_infinite_row_of_a_statistic_alone(dtype, eps, counted):
    """Where nothing arrives at the norm itself: by the kernel and by the definition, which other devices have."""
    x = torch.rand(3, 8).to(dtype)
    x[1, 2], x[2, 1] = -INF, torch.nan
    way = torch.ops.rmsnorm.general_rms_norm_backward.default, general_ops.GENERAL.defaults["_backward"]
    _, r = torch.ops.rmsnorm.general_rms_norm(x, None, None, 1, eps, 0.0, False, counted, True, False, None)
    for backward in way:
        dx = backward(None, torch.ones_like(r), x, r, None, None, 1, eps, 0.0, counted, True, True, False, False)[0]
        assert dx[1].isnan().nonzero().tolist() == [[2]]
        assert not dx[1].nan_to_num().any()
        assert dx[2, : counted if counted > 0 else None].isnan().all()
        assert dx[0, 0]
