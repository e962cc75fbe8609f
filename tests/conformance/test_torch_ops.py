"""Proves that ``rms_norm`` and ``layer_norm`` pass what torch's test_ops.py, test_ops_gradients.py and
functorch/test_ops.py check of them. The truth is torch uninstalled. test_opinfo.py has the rest of ``rms_norm``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal import composite_compliance
from torch.utils._pytree import tree_map
from torch_samples import CASES, FLOATING, LAYER, RMS, call, close, function_of, is_noise, leaves

# torch's forward mode still uses TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_variant_consistency_eager(case, dtype):
    """Values and gradients are those of torch uninstalled in float64, with and without autograd.

    In float64, because torch's LayerNorm is no truth in the types themselves: its weight's gradient for a row of one
    number, which is 0, is 2e-5 in float32, beyond torch's own tolerance.
    """
    for sample in case.samples(dtype, requires_grad=True):
        wide = sample.transform(lambda t: t.detach().double().requires_grad_() if isinstance(t, Tensor) else t)
        if case.info is RMS:  # where none is given it depends on the type
            wide.kwargs.setdefault("eps", torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps)
        wanted = call(case.torchs, wide)
        grads = torch.autograd.grad(wanted, leaves(wide), torch.ones_like(wanted))
        with case.here():
            got = call(case.function, sample)
            gradients = torch.autograd.grad(got, leaves(sample), torch.ones_like(got))
            with torch.no_grad():
                plain = call(case.function, sample)
        # Where torch's LayerNorm runs (after install(), and for a negative eps), it is as good as torch made it.
        if case.info is LAYER and (case.installs or sample.kwargs.get("eps", 1) < 0):
            y = call(case.torchs, sample)
            wanted, grads = y, torch.autograd.grad(y, leaves(sample), torch.ones_like(y))
        for one, true in zip((got, plain, *gradients), (wanted, wanted, *grads), strict=True):
            assert one.dtype is dtype
            close(one, true.to(dtype))
        assert not plain.requires_grad


@pytest.mark.parametrize("case", CASES[2:], ids=str)  # test_opinfo.py has rms_norm
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_numpy_ref(case, dtype):
    for sample in case.samples(dtype):
        wide = {torch.bfloat16: torch.float32, torch.float16: torch.float32}.get(dtype, dtype)
        there = tree_map(lambda t: t.to(wide).numpy() if isinstance(t, Tensor) else t, (sample.input, *sample.args))  # noqa: B023
        wanted = case.info.ref(*there, **sample.kwargs)
        with case.here():
            close(call(case.function, sample), torch.as_tensor(wanted).to(dtype), exact_dtype=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors(case):
    """torch's list where it has one (rms_norm); else that whatever torch refuses is refused as the same exception."""
    with case.here():
        for error in case.info.error_inputs("cpu") if case.info.error_inputs_func else ():
            with pytest.raises(error.error_type, match=error.error_regex):
                call(case.function, error.sample_input)
    x, w = torch.ones(2, 3), torch.ones(2)
    for bad in ((x, (2,)), (x, ()), (x, (3,), w), (x.long(), (3,)), (x.bool(), (3,))):
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            case.torchs(*bad)
        with case.here(), pytest.raises(type(theirs.value)):
            case.function(*bad)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("bits", ["neg", "conj", "neg and conj"])
def test_math_bits(case, bits):
    """TestMathBits: views whose sign or conjugation is a bit of the tensor."""
    dtype = torch.float64 if bits == "neg" else torch.complex128
    if dtype not in case.info.dtypes:
        pytest.skip("layer_norm takes no complex numbers")
    turn = {
        "neg": torch._neg_view,
        "conj": torch.conj,
        "neg and conj": lambda t: torch._neg_view(t.conj()),
    }[bits]
    for sample in case.samples(dtype):
        viewed = sample.transform(lambda t: turn(t) if isinstance(t, Tensor) else t)
        solid = sample.transform(lambda t: turn(t).resolve_conj().resolve_neg() if isinstance(t, Tensor) else t)
        wanted = call(case.torchs, solid)
        for one in (viewed, solid):
            one.input.requires_grad_()
        [grad] = torch.autograd.grad(call(case.torchs, solid), solid.input, torch.ones_like(wanted))
        with case.here():
            got = call(case.function, viewed)
            close(got, wanted)
            close(torch.autograd.grad(got, viewed.input, torch.ones_like(wanted))[0], grad)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cow_input(case):
    """test_cow_input: a copy that is made on writing is read, never written, and so never copied."""
    for sample in case.samples(torch.float32):
        lazy = sample.transform(lambda t: torch._lazy_clone(t) if isinstance(t, Tensor) else t)
        wanted = call(case.torchs, sample)
        with case.here():
            close(call(case.function, lazy), wanted)
        close(leaves(lazy), leaves(sample))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("check", ["operator", "backward", "forward mode"])
def test_composite_compliance(case, check):
    """TestCompositeCompliance: tensor subclasses that intercept each operator, in every position."""
    for sample in case.samples(torch.float32, requires_grad=check != "operator"):
        if is_noise(case, sample):
            continue
        args = (sample.input, *sample.args)
        with case.here():
            if check == "operator":
                composite_compliance.check_with_mode(case.function, args, sample.kwargs, close)
                composite_compliance.check_all_permutations(case.function, args, sample.kwargs, close)
            elif check == "backward":
                composite_compliance.check_backward_formula(case.function, args, sample.kwargs, None, None, close)
            else:
                composite_compliance.check_forward_ad_formula(case.function, args, sample.kwargs, None, close)


@pytest.mark.parametrize("case", CASES[2:], ids=str)  # test_opinfo.py has rms_norm
@pytest.mark.parametrize("check", ["backward", "double backward", "forward mode", "forward over reverse"])
def test_gradients(case, check):
    options = {"check_undefined_grad": False, "check_batched_grad": False}
    for sample in case.samples(torch.float64, requires_grad=True):
        function, inputs = function_of(case.function, sample), tuple(leaves(sample))
        if sample.input.numel() == 0 or sample.kwargs.get("eps", 1) < 0:
            continue  # finite differences of nothing, or of the root of a negative number
        with case.here():
            if check == "backward":
                assert gradcheck(function, inputs, check_batched_grad=True)
            elif check == "double backward":
                assert gradgradcheck(function, inputs, check_batched_grad=True)
                assert gradgradcheck(function, inputs, gen_non_contig_grad_outputs=True)
            elif check == "forward mode":
                assert gradcheck(function, inputs, check_forward_ad=True, check_backward_ad=False, **options)
            else:
                assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=False, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_functorch(case):
    """vjp, vjp of vjp, jvp, vmap over each subset of the arguments, vmap of vjp; against torch uninstalled."""

    def everything(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Any]:
        primals, found = tuple(tensors), []
        y, pull = torch.func.vjp(function, *primals)
        found += [y, pull(y)]
        found.append(torch.func.vjp(lambda *p: torch.func.vjp(function, *p)[1](y)[0], *primals)[1](primals[0]))
        found.append(torch.func.jvp(function, primals, primals))
        batch = [torch.stack([t, t * 2 + 1]) for t in tensors]
        for subset in range(1, 2 ** len(tensors)):
            dims = tuple(0 if subset >> i & 1 else None for i in range(len(tensors)))
            mixed = [b if d == 0 else t for b, t, d in zip(batch, tensors, dims, strict=True)]
            found.append(torch.func.vmap(function, dims)(*mixed))
            found.append(torch.func.vmap(lambda *p: torch.func.vjp(function, *p)[1](y), dims)(*mixed))
        return found

    for sample in case.samples(torch.float64):
        wanted = everything(function_of(case.torchs, sample), leaves(sample))
        with case.here():
            close(everything(function_of(case.function, sample), leaves(sample)), wanted)
