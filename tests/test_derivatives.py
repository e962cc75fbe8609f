"""Proves that first and second derivatives and torch.func's transforms are those of the formula, or refused by name."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from oracle import EPS, MODES, gains, sample

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


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's forward AD, about itself
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
        lambda f, x, t: torch.func.jacfwd(f)(x),
        lambda f, x, t: torch.func.jacrev(f)(x),
        lambda f, x, t: torch.func.hessian(lambda a: f(a).square().sum())(x),
        lambda f, x, t: torch.func.vmap(f)(x),
        lambda f, x, t: torch.func.vmap(f, in_dims=1, out_dims=1)(x.mT.contiguous().mT.unsqueeze(1).expand(-1, 3, -1)),
        lambda f, x, t: torch.func.vmap(torch.func.grad(lambda a: f(a).square().sum()))(x),
        lambda f, x, t: torch.func.vmap(torch.func.jvp, in_dims=(None, 0, 0))(f, (x,), (t,))[1],
        lambda f, x, t: torch.autograd.functional.jvp(f, x, t)[1],
    ],
    ids=[
        "jvp",
        "jacfwd",
        "jacrev",
        "hessian",
        "vmap",
        "vmap strided",
        "vmap of grad",
        "vmap of jvp",
        "double backward",
    ],
)
def test_transforms_are_right_or_refused(transform):
    """The derivatives of F.rms_norm, or an error that says what is missing; never other numbers."""
    x, tangent, weight = sample(4, 5), sample(4, 5, seed=1), gains(5)
    for name, ours, theirs in (
        ("rms_norm", lambda a: rms_norm(a, 5, weight, EPS), lambda a: F.rms_norm(a, (5,), weight, EPS)),
        (
            "add",
            lambda a: add_rms_norm(a, a * a, 5, weight, EPS)[0],
            lambda a: F.rms_norm(a + a * a, (5,), weight, EPS),
        ),
    ):
        wanted = transform(theirs, x, tangent)
        try:
            got = transform(ours, x, tangent)
        except (RuntimeError, NotImplementedError) as refusal:
            if not re.search("vmap|jvp|forward", str(refusal)):
                raise
        else:
            torch.testing.assert_close(got, wanted, msg=lambda m, name=name: f"{name}: {m}")
