"""Proves that torch's own operator, once ``install()`` has put our kernels behind it, has their bits and gradients,
with torch's derivatives and transforms around them, and hands back what they don't take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, EPS, LAYOUTS, Truth, gains, incoming, lay_out, same_bits, sample
from torch.utils.checkpoint import checkpoint

import rmsnorm
from rmsnorm import _native, installed

pytestmark = pytest.mark.skipif(
    not _native.cpu_targets(), reason="without the native library there is nothing to install"
)


@pytest.mark.parametrize("columns", [0, 1, 3, 127, 576])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_ours(native_target, dtype, columns):
    """Forward and both gradients, in every layout, with and without weight: torch's function is ours."""
    x, grad = sample(6, columns, dtype), incoming(6, columns, dtype)
    for weight in (None, gains(columns, dtype=dtype)):
        for layout in LAYOUTS:
            results = []
            with installed():
                for function in (F.rms_norm, rmsnorm.rms_norm):
                    leaves = [lay_out(x, layout).requires_grad_()]
                    leaves += [] if weight is None else [weight.clone().requires_grad_()]
                    y = function(leaves[0], (columns,), *(leaves[1:] or [None]), EPS)
                    results.append([y.detach(), *torch.autograd.grad(y, leaves, grad.view(y.shape))])
            assert all(map(same_bits, *results)), layout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_the_gradients_asked_for(dtype):
    with installed():
        for need_x, need_w in ((True, False), (False, True), (True, True)):
            x = sample(4, 64, dtype).requires_grad_(need_x)
            weight = gains(64, dtype=dtype).requires_grad_(need_w)
            F.rms_norm(x, (64,), weight, EPS).sum().backward()  # an expanded gradient
            assert (x.grad is not None) == need_x
            assert (weight.grad is not None) == need_w
        dx, dw = torch.ops.aten._fused_rms_norm_backward(
            x.detach(),
            x.detach(),
            [64],
            torch.ones(4, 1, dtype=torch.promote_types(dtype, torch.float32)),
            None,
            [True, True],
        )
        assert dx.shape == x.shape
        assert dw is None


def test_gradients_of_rows_at_the_ends_of_the_range():
    """torch doesn't tell backward its eps. Where 1/rms is a normal number it isn't needed; else it can't matter."""
    for scale in (1e-42, 1e-38, 1e-30, 1e-20, 1e20, 1e30, 1e37):
        x = (sample(3, 64).clamp(-2, 2) * scale).float()
        for eps in (0.0, 1e-6):
            grad = incoming(3, 64, torch.float32) * min(max(scale, 1e-30), 1e30)
            with installed():
                leaf = x.clone().requires_grad_()
                (dx,) = torch.autograd.grad(F.rms_norm(leaf, (64,), None, eps), leaf, grad)
            ours = x.clone().requires_grad_()
            (wanted,) = torch.autograd.grad(rmsnorm.rms_norm(ours, 64, None, eps), ours, grad)
            assert same_bits(dx, wanted), (scale, eps)
            exact = Truth(x.double(), eps)
            h = grad.double().numpy()
            truth = exact.r * (h - exact.normalised * (h * exact.normalised).mean(-1, keepdims=True))
            error = (dx.double().numpy() - truth) / (exact.r * abs(h).max(-1, keepdims=True) + 1e-300)
            assert abs(error).max() <= 1e-5, (scale, eps)


def test_a_negative_eps_gives_nan_as_torchs_formula_does():
    x = torch.full((2, 4), 0.5, requires_grad=True)
    with installed():
        y = F.rms_norm(x, (4,), None, -1.0)
        y.sum().backward()
    assert y.isnan().all()
    assert x.grad.isnan().all()


def _calls():
    """Calls that our kernels don't take, and what torch does with them."""
    x, half = sample(3, 4, torch.float32), sample(3, 4, torch.bfloat16)
    yield lambda: F.rms_norm(x.to(torch.complex64), (4,))
    yield lambda: F.rms_norm(half, (4,), gains(4, dtype=torch.float32))
    yield lambda: F.rms_norm(x, (4,), gains(4, dtype=torch.bfloat16))
    yield lambda: torch._fused_rms_norm(half, [4], gains(4, dtype=torch.float32), EPS)[0]
    yield lambda: F.rms_norm(sample(4, 6, torch.float32).view(2, 2, 3, 2).to(memory_format=torch.channels_last), (2,))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_the_rest_keeps_torchs_formula():
    for call in _calls():
        before = call()
        with installed():
            after = call()
        assert after.dtype is before.dtype
        assert torch.equal(after, before)
    # Backward has no kernel at all without ours; torch's decomposition of it is the formula that serves.
    half, weight = sample(3, 4, torch.bfloat16), gains(4, dtype=torch.float32)
    rstd = torch.full((3, 1), 0.5)
    with installed():
        dx, dw = torch.ops.aten._fused_rms_norm_backward(half, half, [4], rstd, weight, [True, True])
    wide = half.float()
    h, x_hat = wide * weight, wide * rstd
    torch.testing.assert_close(dx, ((h - x_hat * (h * x_hat).mean(-1, keepdim=True)) * rstd).bfloat16())
    torch.testing.assert_close(dw.float(), (wide * x_hat).sum(0), rtol=1e-2, atol=1e-2)


NEGATED = {"negated": torch._neg_view, "imaginary": lambda t: torch.complex(torch.zeros_like(t), t).conj().imag}


@pytest.mark.parametrize("where", ["input", "other", "weight", "gradient"])
@pytest.mark.parametrize("how", NEGATED)
def test_negated_views(how, where):
    """Their memory holds the negative of what they show; every function, and torch's own, sees what they show."""
    x, other, weight, grad = sample(3, 8), sample(3, 8, seed=1), gains(8), incoming(3, 8, torch.float64)
    functions = {
        "rms_norm": lambda a, b, w: rmsnorm.rms_norm(a, 8, w, EPS) * b,
        "llama": lambda a, b, w: rmsnorm.rms_norm(a, 8, w, EPS, offset=1.0, casting_mode="llama") * b,
        "no weight": lambda a, b, w: rmsnorm.rms_norm(a, 8, None, EPS) * b * w,
        "add_rms_norm": lambda a, b, w: sum(rmsnorm.add_rms_norm(a, b, 8, w, EPS)),
        "gated_rms_norm": lambda a, b, w: rmsnorm.gated_rms_norm(a, b, 8, w, EPS),
        "gate first": lambda a, b, w: rmsnorm.gated_rms_norm(a, b, 8, w, EPS, norm_before_gate=False, group_size=4),
        "layer_norm": lambda a, b, w: rmsnorm.layer_norm(a, 8, w, b[0], EPS),
        "torch": lambda a, b, w: F.rms_norm(a, (8,), w, EPS) * b,
    }
    with installed():
        for name, function in functions.items():
            results = []
            for make in (NEGATED[how], lambda t: -t):
                leaves = [
                    (make(t) if where == place else t.clone()).detach().requires_grad_()
                    for place, t in (("input", x), ("other", other), ("weight", weight))
                ]
                y = function(*leaves)
                seed = make(grad) if where == "gradient" else grad
                assert seed.is_neg() or any(leaf.is_neg() for leaf in leaves) or make is not NEGATED[how]
                results.append([y, *torch.autograd.grad(y, leaves, seed.view_as(y))])
            torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
            with torch.no_grad():
                torch.testing.assert_close(function(*leaves), results[1][0].detach(), rtol=1e-12, atol=1e-12)


# torch warns about its own code: forward AD and inductor still use TorchScript.
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchs_derivatives_and_transforms_around_our_kernels():
    """In float64, where ours and torch's formula differ by rounding alone. A loop over the batch would warn."""
    x, w, dx = sample(4, 5).clamp(-2, 2), gains(5), sample(4, 5, seed=1)
    f = lambda a, b: F.rms_norm(a, (5,), b, EPS)  # noqa: E731
    scalar = lambda *a: f(*a).square().sum()  # noqa: E731
    transforms = [
        lambda: torch.func.jvp(f, (x, w), (dx, w)),
        lambda: torch.func.jacrev(f, (0, 1))(x, w),
        lambda: torch.func.jacfwd(f, (0, 1))(x, w),
        lambda: torch.func.hessian(scalar, (0, 1))(x, w),
        lambda: torch.func.vmap(f, (0, None))(x, w),
        lambda: torch.func.vmap(torch.func.grad(scalar, (0, 1)), (0, None))(x, w),
        lambda: torch.func.vmap(torch.func.grad(scalar, (0, 1)), (None, 0))(x, gains(3, 5)),
        lambda: torch.func.grad(lambda a: torch.func.vmap(torch.func.grad(scalar, 1), (0, None))(a, w).square().sum())(
            x
        ),
        lambda: torch.autograd.functional.jacobian(f, (x, w), vectorize=True),
        lambda: torch.autograd.functional.hvp(scalar, (x, w), (dx, w)),
        lambda: torch.autograd.functional.hessian(scalar, (x, w), vectorize=True),
    ]
    for i, transform in enumerate(transforms):
        wanted = transform()
        with installed():
            got = transform()
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8, msg=lambda m, i=i: f"transform {i}: {m}")
    with installed():
        leaves = (x.clone().requires_grad_(), w.clone().requires_grad_())
        assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_compile_and_checkpoint():
    layer = torch.nn.RMSNorm(64, EPS)
    x = sample(5, 64, torch.float32)
    with installed():
        wanted = layer(x)
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-6, atol=1e-6)
        leaf = x.clone().requires_grad_()
        assert same_bits(checkpoint(layer, leaf, use_reentrant=False).detach(), wanted.detach())
        compiled(leaf).sum().backward()
        assert leaf.grad.isfinite().all()
    torch.compiler.reset()
