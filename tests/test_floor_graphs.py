"""Proves that the second rule for eps, ``r = 1/sqrt(max(mean(x²), floor))``, has derivatives of both orders, torch's
transforms, compiled graphs and ONNX."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from floored_oracle import gradients, rows_around
from oracle import MODES, gains, incoming, same_bits, sample
from test_derivatives import TRANSFORMS

from rmsnorm.forms.floored import floored_rms_norm


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's forward AD, about itself
@pytest.mark.parametrize("casting_mode", MODES)
def test_derivatives_of_first_and_second_order(target, casting_mode):
    """Against finite differences in fp64: rows below the floor, one of zeros, and rows above."""
    x = sample(4, 12).sin() * torch.tensor([[0.1], [0.0], [3.0], [0.3]], dtype=torch.float64)
    x, weight = x.view(4, 3, 4).requires_grad_(), gains(3, 4).requires_grad_()
    run = lambda a, w: floored_rms_norm(a, (3, 4), w, 0.5, offset=1.0, casting_mode=casting_mode)  # noqa: E731
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(run, (x, weight))
        assert check(lambda a: run(a, None), (x,))
    assert torch.autograd.gradcheck(run, (x, weight), check_forward_ad=True, check_batched_grad=True)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's forward AD, about itself
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_those_of_the_formula(name):
    x, dx, ws = sample(4, 5), sample(4, 5, seed=1), torch.stack([gains(5, seed=i) for i in range(4)])
    x = x / x.abs().amax(-1, keepdim=True) * torch.tensor([[0.1], [0.2], [2.0], [3.0]], dtype=torch.float64)
    floor, w, dw = 0.09, gains(5), gains(5, seed=9)
    ours = lambda a, b: floored_rms_norm(a, 5, b, floor)  # noqa: E731
    formula = lambda a, b: F.normalize(a, dim=-1, eps=(5 * floor) ** 0.5) * 5**0.5 * b  # noqa: E731
    got, wanted = (TRANSFORMS[name](f, x, w, dx, dw, ws) for f in (ours, formula))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_has_the_bits_of_eager(dtype):
    torch.compiler.reset()
    compiled = torch.compile(gradients, backend="aot_eager", fullgraph=False)
    forward = torch.compile(floored_rms_norm, backend="aot_eager", fullgraph=True)
    weight = gains(129, dtype=dtype)
    for rows in (4, 9):
        x, grad = rows_around(0.01, rows, 129, dtype), incoming(rows, 129, dtype)
        assert same_bits(forward(x, 129, weight, 0.01), floored_rms_norm(x, 129, weight, 0.01))
        assert all(map(same_bits, compiled(x, weight, grad, 0.01), gradients(x, weight, grad, 0.01)))
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")

    class Norm(torch.nn.Module):
        def forward(self, x):
            return floored_rms_norm(x, 64, None, 0.01)

    x = rows_around(0.01, 5, 64, torch.float32)
    torch.onnx.export(Norm().eval(), (x,), dynamo=True, opset_version=23, verbose=False).save(tmp_path / "norm.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "norm.onnx", providers=["CPUExecutionProvider"])
    [got] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), floored_rms_norm(x, 64, None, 0.01))
