"""Proves that first and second derivatives and torch.func's transforms are those of the formula, or refused by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import EPS, MODES, gains, same_bits, sample

from rmsnorm import add_rms_norm, rms_norm


@pytest.mark.parametrize("casting_mode", MODES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_derivatives_of_first_and_second_order(target, offset, casting_mode):
    """Against finite differences in fp64, over one and two dimensions, with and without weight."""
    options = {"offset": offset, "casting_mode": casting_mode}
    x = sample(3, 12).div(8).view(3, 3, 4).requires_grad_()
    for shape in ((4,), (3, 4)):
        weight = gains(*shape).requires_grad_()
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda x, w, s=shape: rms_norm(x, s, w, 0.1, **options), (x, weight))
            assert check(lambda x, s=shape: rms_norm(x, s, None, 0.1, **options), (x,))


def test_add_derivatives_of_first_and_second_order(target):
    x, residual, weight = (t.requires_grad_() for t in (sample(3, 4) / 8, sample(3, 4, seed=1) / 8, gains(4)))
    for options in ({}, {"offset": 1.0, "casting_mode": "llama"}):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda a, b, w, o=options: add_rms_norm(a, b, 4, w, 0.1, **o), (x, residual, weight))
            for i in (0, 1):
                assert check(
                    lambda a, b, w, o=options, i=i: add_rms_norm(a, b, 4, w, 0.1, **o)[i], (x, residual, weight)
                )


def test_gradient_of_a_gradient_in_fp32(target):
    """A gradient penalty, as GAN and meta-learning code takes it, against the same in float64."""
    results = []
    for dtype in (torch.float32, torch.float64):
        x, weight = sample(5, 64).to(dtype).requires_grad_(), gains(64).to(dtype).requires_grad_()
        y = rms_norm(x, 64, weight, EPS)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum() + y.sum(), (x, weight)))
    for single, double in zip(*results, strict=True):
        assert (single - double).norm() <= 1e-4 * double.norm()
        assert double.norm() > 0


def _composite(x, weight, offset=0.0, mode="torch"):
    """The formula in torch's own differentiable operators; in float64 both casting modes are one function."""
    return F.rms_norm(x, x.shape[-1:], None, EPS) * (weight + offset)


def _scalar(f):
    return lambda *a: f(*a).square().sum()


# Each transform takes f(x, w), x [4, 5], w [5], tangents of both, and weights [4, 5], one a row.
TRANSFORMS = {
    "jvp": lambda f, x, w, dx, dw, ws: torch.func.jvp(f, (x, w), (dx, dw)),
    "jvp of x": lambda f, x, w, dx, dw, ws: torch.func.jvp(lambda a: f(a, w), (x,), (dx,)),
    "jvp of w": lambda f, x, w, dx, dw, ws: torch.func.jvp(lambda b: f(x, b), (w,), (dw,)),
    "jvp of jvp": lambda f, x, w, dx, dw, ws: torch.func.jvp(
        lambda a, b: torch.func.jvp(f, (a, b), (dx, dw))[1], (x, w), (dx, dw)
    ),
    "vjp": lambda f, x, w, dx, dw, ws: torch.func.vjp(f, x, w)[1](dx),
    "jacfwd": lambda f, x, w, dx, dw, ws: torch.func.jacfwd(f, (0, 1))(x, w),
    "jacrev": lambda f, x, w, dx, dw, ws: torch.func.jacrev(f, (0, 1))(x, w),
    "jacfwd of jacfwd": lambda f, x, w, dx, dw, ws: torch.func.jacfwd(torch.func.jacfwd(_scalar(f), (0, 1)), (0, 1))(
        x, w
    ),
    "jacrev of jacrev": lambda f, x, w, dx, dw, ws: torch.func.jacrev(torch.func.jacrev(_scalar(f), (0, 1)), (0, 1))(
        x, w
    ),
    "jacrev of jacfwd": lambda f, x, w, dx, dw, ws: torch.func.jacrev(torch.func.jacfwd(_scalar(f), (0, 1)), (0, 1))(
        x, w
    ),
    "hessian": lambda f, x, w, dx, dw, ws: torch.func.hessian(_scalar(f), (0, 1))(x, w),
    "third derivative": lambda f, x, w, dx, dw, ws: torch.func.grad(
        lambda a: torch.func.grad(lambda b: _scalar(torch.func.grad(_scalar(f)))(b, w))(a).sin().sum()
    )(x),
    "vmap": lambda f, x, w, dx, dw, ws: torch.func.vmap(f, (0, None))(x, w),
    "vmap over an inner dimension": lambda f, x, w, dx, dw, ws: torch.func.vmap(f, (1, None), 1)(
        x.unsqueeze(1).expand(-1, 3, -1), w
    ),
    "vmap of weights": lambda f, x, w, dx, dw, ws: torch.func.vmap(f, (None, 0))(x, ws),
    "vmap of both": lambda f, x, w, dx, dw, ws: torch.func.vmap(f, (0, 0))(x, ws),
    "vmap of vmap": lambda f, x, w, dx, dw, ws: torch.func.vmap(torch.func.vmap(f, (0, None)), (None, 0))(x, ws),
    "per-sample gradients": lambda f, x, w, dx, dw, ws: torch.func.vmap(torch.func.grad(_scalar(f), (0, 1)), (0, None))(
        x, w
    ),
    "per-model gradients": lambda f, x, w, dx, dw, ws: torch.func.vmap(torch.func.grad(_scalar(f), (0, 1)), (None, 0))(
        x, ws
    ),
    "vmap of jvp": lambda f, x, w, dx, dw, ws: torch.func.vmap(
        lambda a, b, t: torch.func.jvp(f, (a, b), (t, dw)), (0, 0, 0)
    )(x, ws, dx),
    "vmap of hessian": lambda f, x, w, dx, dw, ws: torch.func.vmap(torch.func.hessian(_scalar(f), (0, 1)), (0, 0))(
        x, ws
    ),
    "gradient of vmap": lambda f, x, w, dx, dw, ws: torch.func.grad(_scalar(torch.func.vmap(f, (0, 0))), (0, 1))(x, ws),
    "jvp of vmap": lambda f, x, w, dx, dw, ws: torch.func.jvp(torch.func.vmap(f, (0, None)), (x, w), (dx, dw)),
    "double backward": lambda f, x, w, dx, dw, ws: torch.autograd.functional.jvp(f, (x, w), (dx, dw)),
    "hvp": lambda f, x, w, dx, dw, ws: torch.autograd.functional.hvp(_scalar(f), (x, w), (dx, dw)),
    "batched gradients": lambda f, x, w, dx, dw, ws: torch.autograd.functional.jacobian(f, (x, w), vectorize=True),
    "forward mode": lambda f, x, w, dx, dw, ws: torch.autograd.functional.jacobian(
        f, (x, w), vectorize=True, strategy="forward-mode"
    ),
}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's forward AD, about itself
@pytest.mark.parametrize("options", [{}, {"offset": 1.0, "casting_mode": "llama"}], ids=["plain", "llama"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_those_of_the_formula(name, options):
    """Every transform of the fused functions equals that of the same formula in torch's operators, in float64; a slow
    path of functorch (its loop over the batch) would warn, and a warning is an error."""
    x, dx, ws = sample(4, 5), sample(4, 5, seed=1), torch.stack([gains(5, seed=i) for i in range(4)])
    x = 2 * x / x.abs().amax(-1, keepdim=True)  # of one size, so that third derivatives don't cancel to the last digits
    w, dw = gains(5), gains(5, seed=9)
    offset = options.get("offset", 0.0)
    functions = {
        "rms_norm": (lambda a, b: rms_norm(a, 5, b, EPS, **options), lambda a, b: _composite(a, b, offset)),
        "add, output": (
            lambda a, b: add_rms_norm(a, a.sin(), 5, b, EPS, **options)[0],
            lambda a, b: _composite(a + a.sin(), b, offset),
        ),
        "add, both": (
            lambda a, b: torch.cat(add_rms_norm(a, a.sin(), 5, b, EPS, **options), -1),
            lambda a, b: torch.cat((_composite(a + a.sin(), b, offset), a + a.sin()), -1),
        ),
        "add, constant residual": (
            lambda a, b: add_rms_norm(a, torch.ones_like(a), 5, b, EPS, **options)[0],
            lambda a, b: _composite(a + 1, b, offset),
        ),
    }
    for label, (ours, formula) in functions.items():
        tangent = dx if label != "add, both" or name != "vjp" else torch.cat((dx, dx), -1)
        got, wanted = (TRANSFORMS[name](f, x, w, tangent if name == "vjp" else dx, dw, ws) for f in (ours, formula))
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9, msg=lambda m, label=label: f"{label}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_under_create_graph_is_the_fused_one(native_target, dtype):
    """The same bits with and without ``create_graph``: a gradient penalty doesn't change the training step."""
    for residual in (None, sample(5, 129, dtype, seed=1)):
        results = []
        for create_graph in (False, True):
            x, weight = sample(5, 129, dtype).requires_grad_(), gains(129, dtype=dtype).requires_grad_()
            y = rms_norm(x, 129, weight) if residual is None else add_rms_norm(x, residual, 129, weight)[0]
            results.append(torch.autograd.grad(y, (x, weight), torch.ones_like(y), create_graph=create_graph))
        assert all(map(same_bits, *([t.detach() for t in r] for r in results)))


def test_half_precision_transforms_round_once(native_target):
    """Tangents and per-sample gradients in bf16 differ from the float64 formula by their own rounding, and a little:
    half an ulp (2^-9 relative), plus fp32 arithmetic; dw sums 3 rows whose largest term sets its error."""
    x, dx = sample(6, 129, torch.bfloat16), sample(6, 129, torch.bfloat16, seed=1)
    w, dw = gains(129, dtype=torch.bfloat16), gains(129, dtype=torch.bfloat16, seed=1)

    def close(transform):
        got = transform(lambda a, b: rms_norm(a, 129, b, EPS), x, w, dx, dw)
        wanted = transform(_composite, x.double(), w.double(), dx.double(), dw.double())
        for g, t in zip(got, wanted, strict=True):
            assert g.dtype is torch.bfloat16
            bound = 2**-8 * t.abs() + 2**-10 * t.abs().amax(-1, keepdim=True)
            assert ((g.double() - t).abs() <= bound).all()

    close(lambda f, x, w, dx, dw: torch.func.jvp(f, (x, w), (dx, dw)))
    batched = lambda f, x, w, dx, dw: torch.func.vmap(torch.func.grad(lambda a, b: f(a, b).sum(), (0, 1)), (0, None))(  # noqa: E731
        x.view(2, 3, 129), w
    )
    close(batched)
