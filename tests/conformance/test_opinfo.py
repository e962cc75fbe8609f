"""Proves that torch's own description of ``nn.functional.rms_norm`` and ``nn.RMSNorm`` (OpInfo and ModuleInfo, which
ship in the torch wheel) holds twice: for torch's function on our kernels after ``install()``, unmodified, and with our
function and our layer put in its place.

The checks are those of torch's test_ops.py, test_ops_gradients.py and test_modules.py, which the wheel doesn't ship;
samples, references, tolerances and errors are theirs.
"""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch.testing._internal.common_utils import TestCase, gradcheck, gradgradcheck, noncontiguous_like
from torch.utils._pytree import tree_leaves, tree_map

import rmsnorm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's, about itself
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

[OPERATOR] = [op for op in op_db if op.name == "nn.functional.rms_norm"]
[MODULE] = [module for module in module_db if module.module_cls is torch.nn.RMSNorm]
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DIFFERENTIABLE = (torch.float64, torch.complex128)
WHOSE = ("torch", "ours")

# Forward mode in torch still uses TorchScript; low precision samples beside a weight of 1000 overflow in float16.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)  # torch draws its samples from the global generator


@pytest.fixture(params=WHOSE)
def operator(request):
    """torch's entry after ``install()``, and a copy of it with our function in place of torch's."""
    if request.param == "ours":
        op = copy.copy(OPERATOR)
        op.op = rmsnorm.rms_norm
        yield op
    elif not rmsnorm.info().native:
        pytest.skip("without the native library there is nothing to install")
    else:
        with rmsnorm.installed():
            yield OPERATOR


def samples(op, dtype, requires_grad=False):
    found = list(op.sample_inputs("cpu", dtype, requires_grad=requires_grad))
    assert len(found) == 6, "torch's own number of samples; a change is worth a look"
    return found


def call(op, sample):
    return op(sample.input, *sample.args, **sample.kwargs)


def close(got, wanted, **options):
    TestCase().assertEqual(got, wanted, **options)  # noqa: PT009  torch's tolerances by dtype


def test_dtypes(operator):
    """What torch says is supported runs, forward and backward; what isn't, raises."""
    every = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
    assert set(operator.dtypes) == set(every)
    for dtype in every:
        for sample in samples(operator, dtype, requires_grad=True):
            y = call(operator, sample)
            assert y.dtype is dtype
            y.abs().sum().backward()
    for dtype in (torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool):
        with pytest.raises(RuntimeError):
            operator(torch.ones(2, 3).to(dtype), (3,))


@pytest.mark.parametrize("dtype", [*FLOATING, torch.complex64, torch.complex128], ids=str)
def test_reference(operator, dtype):
    """numpy's result, by OpInfo's own reference."""
    for sample in samples(operator, dtype):
        # The reference computes where it is: in float32 for a half type, as the operator does.
        wide = {torch.bfloat16: torch.float32, torch.float16: torch.float32}.get(dtype, dtype)
        move = lambda t: t.to(wide).numpy() if isinstance(t, torch.Tensor) else t  # noqa: B023, E731
        wanted = operator.ref(move(sample.input), *tree_map(move, sample.args), **sample.kwargs)
        close(call(operator, sample), torch.as_tensor(wanted).to(dtype), exact_dtype=True)


@pytest.mark.parametrize("dtype", [*FLOATING, torch.complex64], ids=str)
def test_noncontiguous_samples(operator, dtype):
    """test_ops.py, test_noncontiguous_samples: values and gradients."""
    for sample in samples(operator, dtype, requires_grad=True):
        strided = sample.noncontiguous()
        results = []
        for one in (sample, strided):
            y = call(operator, one)
            leaves = [t for t in tree_leaves((one.input, one.args, one.kwargs)) if isinstance(t, torch.Tensor)]
            grad = torch.ones_like(y)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
            assert all(t.requires_grad for t in leaves)
            close(list(torch.autograd.grad(call(operator, one), leaves, noncontiguous_like(grad))), results[-1][1:])
        close(results[1], results[0])


@pytest.mark.parametrize("dtype", DIFFERENTIABLE, ids=str)
@pytest.mark.parametrize("check", ["backward", "double backward", "forward mode", "forward over reverse"])
def test_gradients(operator, dtype, check):
    """test_ops_gradients.py and test_ops_fwd_gradients.py, with batched gradients and the complex types."""
    for sample in samples(operator, dtype, requires_grad=True):
        if sample.input.numel() == 0:
            continue  # finite differences of nothing; test_dtypes runs it
        args = tuple(a for a in sample.args if isinstance(a, torch.Tensor))

        def function(x, *weights, sample=sample):
            return operator(x, sample.args[0], *weights, **sample.kwargs)

        inputs = tuple(t.detach().requires_grad_() for t in (sample.input, *args))
        if sample.kwargs.get("eps", 1) < 0:  # sqrt of a negative number where the inputs are small: keep them away
            inputs = tuple((t.detach() + 2 * t.detach().sgn()).requires_grad_() for t in inputs)
        if check == "backward":
            assert gradcheck(function, inputs, check_batched_grad=True, check_grad_dtypes=True)
        elif check == "double backward":
            assert gradgradcheck(function, inputs, gen_non_contig_grad_outputs=False, check_batched_grad=True)
            assert gradgradcheck(function, inputs, gen_non_contig_grad_outputs=True)
        elif check == "forward mode":
            assert gradcheck(
                function,
                inputs,
                check_forward_ad=True,
                check_backward_ad=False,
                check_undefined_grad=False,
                check_batched_grad=False,
                check_batched_forward_grad=True,
            )
        else:
            assert gradgradcheck(
                function,
                inputs,
                check_fwd_over_rev=True,
                check_rev_over_rev=False,
                check_undefined_grad=False,
                check_batched_grad=False,
            )


def test_error_inputs(operator):
    """torch's own list of bad calls, matched by torch's own words."""
    errors = list(operator.error_inputs("cpu"))
    assert len(errors) == 3
    for error in errors:
        with pytest.raises(error.error_type, match=error.error_regex):
            call(operator, error.sample_input)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_vmap(operator, dtype):
    """functorch's test_vmap_exhaustive: one loop instead, over each argument that may be batched."""
    for sample in samples(operator, dtype):
        shape, *weights = sample.args
        batch = torch.stack([sample.input, sample.input * 2 + 1, -sample.input])

        def function(x, *w, sample=sample, shape=shape):
            return operator(x, shape, *w, **sample.kwargs)

        for batched in {0, len(weights)}:
            many = [torch.stack([w, w + 1, w - 1]) if batched else w for w in weights]
            dims = (0, *[0 if batched else None] * len(weights))
            got = torch.func.vmap(function, dims)(batch, *many)
            wanted = [function(batch[i], *(w[i] if batched else w for w in many)) for i in range(3)]
            close(got, torch.stack(wanted))


@pytest.mark.parametrize("whose", WHOSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_module(whose, dtype):
    """test_modules.py: reference, gradients, strides, pickle, dtype, of every sample of ModuleInfo."""
    cases = MODULE.module_inputs_func(MODULE, device="cpu", dtype=dtype, requires_grad=True, training=True)
    assert len(cases) == 6
    with rmsnorm.installed() if whose == "torch" and rmsnorm.info().native else torch.enable_grad():
        for case in cases:
            build, (x, *rest) = case.constructor_input, case.forward_input.args
            cls = rmsnorm.RMSNorm if whose == "ours" else torch.nn.RMSNorm
            layer = cls(*build.args, **build.kwargs, device="cpu", dtype=dtype)
            y = layer(x, *rest)
            parameters = list(layer.parameters())
            if case.reference_fn:
                # The reference computes in float32, whatever the dtype: its rounding is the tolerance.
                close(y, case.reference_fn(layer, x, *rest), rtol=1.3e-6, atol=1e-5)
            assert y.dtype is dtype
            loaded = pickle.loads(pickle.dumps(layer))
            close(loaded(x), y)
            other = torch.nn.RMSNorm(*build.args, **build.kwargs, dtype=dtype)
            other.load_state_dict(layer.state_dict())
            close(other(x), y)
            strided = noncontiguous_like(x.detach()).requires_grad_()
            grad = torch.ones_like(y)
            close(
                torch.autograd.grad(layer(strided), [strided, *parameters], grad),
                torch.autograd.grad(y, [x, *parameters], grad),
            )
            if dtype is torch.float64:
                names = [name for name, _ in layer.named_parameters()]

                def function(x, *values, layer=layer, names=names):
                    return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

                assert gradcheck(function, (x, *parameters), check_forward_ad=True)
                assert gradgradcheck(function, (x, *parameters))
