"""Proves on a GPU what only tensors that live there can show: the dispatcher's choice, autograd, streams, graphs,
compile, sizes beyond 32 bits. The kernels' values are test_values.py's subject. Run with RMSNORM_TEST_DEVICE=cuda.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from calls import gradients
from carried import DEVICE
from oracle import DTYPES, EPS, REFERENCE_ULPS, ULPS, Truth, gains, incoming, same_bits, sample
from torch import Tensor

import rmsnorm
from rmsnorm import add_rms_norm, rms_norm
from rmsnorm.gpu import launch, route

BOUNDS = ULPS | {torch.float64: REFERENCE_ULPS[torch.float64]}


@pytest.fixture(params=route.CHOICES)
def chosen(request, monkeypatch):
    """Both values of RMSNORM_CUDA."""
    monkeypatch.setattr(route, "choice", lambda: request.param)
    return request.param


@pytest.fixture
def launched(monkeypatch):
    """The names of the Triton kernels that were launched."""
    names: list[str] = []
    real = launch._launch
    monkeypatch.setattr(launch, "_launch", lambda kernel, *rest: (names.append(kernel.__name__), real(kernel, *rest)))
    return names


def there(*tensors: Tensor) -> list[Tensor]:
    return [t.to(DEVICE) for t in tensors]


@pytest.mark.parametrize("columns", [1, 129, 4096, 16385])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_on_the_device(chosen, launched, dtype, columns):
    """Output and gradients of a plain call and of one that torch's kernel doesn't know, against the oracle; torch's own
    kernel is held to a wider bound: its sums of squares are plain."""
    x, weight, grad = sample(33, columns, dtype), gains(columns, dtype=dtype), incoming(33, columns, dtype)
    truth = Truth(x, EPS)
    for offset in (0.0, 1.0):
        launched.clear()
        y, dx, dw = (t.cpu() for t in gradients(*there(x, weight, grad), offset=offset))
        ours = chosen == "triton" or offset
        assert set(launched) >= {"forward", "fold"} if ours else not launched
        truth.forward(weight, offset, "torch", BOUNDS[dtype] if ours else max(BOUNDS[dtype], 5.0)).check(y, "y")
        if ours:
            dx_bounds, dw_bounds = truth.backward(grad, weight, offset)
            dx_bounds.check(dx, f"dx, {offset=}")
            dw_bounds.check(dw, f"dw, {offset=}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_and_out(chosen, launched, dtype):
    x, other, weight = there(sample(33, 576, dtype), sample(33, 576, dtype, 1), gains(576, dtype=dtype))
    y, total = add_rms_norm(x, other, 576, weight, EPS)
    assert launched == ["forward"]
    assert same_bits(total, x + other)
    Truth(total.cpu(), EPS).forward(weight.cpu(), 0.0, "torch", BOUNDS[dtype]).check(y.cpu(), "y")
    out = torch.empty_like(x)
    assert rms_norm(x, 576, weight, EPS, out=out) is out
    assert same_bits(out, rms_norm(x, 576, weight, EPS))


def test_the_layer_moves(chosen):
    layer = rmsnorm.RMSNorm(576).to(DEVICE, torch.bfloat16)
    x = sample(5, 576, torch.bfloat16).to(DEVICE)
    assert layer(x).device.type == DEVICE
    expected = F.rms_norm(x.double(), (576,), layer.weight.double(), layer.eps)
    torch.testing.assert_close(layer(x).double(), expected, rtol=2.0**-8, atol=0)


def test_a_stream_of_its_own(chosen):
    """Launches go to the current stream: the input is written there, and nothing waits for it elsewhere."""
    x, weight = there(sample(4096, 4096, torch.float32), gains(4096, dtype=torch.float32))
    expected = rms_norm(x, 4096, weight, EPS, offset=1.0)
    stream = torch.Stream(DEVICE)
    torch.accelerator.synchronize()
    with stream:
        late = torch.zeros_like(x)
        for _ in range(50):
            late.copy_(x).neg_()
        y = rms_norm(late.neg_(), 4096, weight, EPS, offset=1.0)
    stream.synchronize()
    assert same_bits(y, expected)


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs")
def test_captured_in_a_graph(chosen):
    """Forward and backward are captured, and the replay reads new inputs."""
    first, second, grad = there(*(sample(64, 4096, torch.bfloat16, i) for i in (0, 1)), incoming(64, 4096).bfloat16())
    weight = gains(4096, dtype=torch.bfloat16).to(DEVICE)
    expected = [gradients(x, weight, grad, offset=1.0) for x in (first, second)]
    x, graph = first.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradients(x, weight, grad, offset=1.0)
    for value, right in ((first, expected[0]), (second, expected[1])):
        x.copy_(value)
        graph.replay()
        assert all(map(same_bits, got, right))


def test_compiled(chosen):
    """In a graph without breaks, with the bits of eager calls."""
    x, other, weight = there(*(sample(64, 576, torch.bfloat16, i) for i in (0, 1)), gains(576, dtype=torch.bfloat16))

    def block(x: Tensor, other: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y, total = add_rms_norm(x, other, 576, weight, EPS)
        return rms_norm(y, 576, weight, EPS, offset=1.0), total

    compiled, results = torch.compile(block, fullgraph=True), []
    for function in (block, compiled):
        leaves = [t.clone().requires_grad_() for t in (x, other, weight)]
        outputs = function(*leaves)
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, [x, other])])
    assert all(map(same_bits, *results))


def test_gradients_are_the_same_every_time(chosen):
    """No atomics: ten runs over 20000 rows have one result."""
    x, weight, grad = there(
        sample(20000, 576, torch.float32), gains(576, dtype=torch.float32), incoming(20000, 576, torch.float32)
    )
    runs = [gradients(x, weight, grad, offset=1.0) for _ in range(10)]
    assert all(same_bits(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@pytest.mark.heavy
@pytest.mark.parametrize("columns", [128, 4096, 20000])
def test_more_elements_than_32_bits_count(columns):
    """The last rows of 2^31 elements and more have the bits that they have alone; 17 GiB."""
    rows = 2**31 // columns + 1000
    block = there(sample(1000, columns, torch.bfloat16))[0]
    x = block.repeat(-(-rows // 1000), 1)[:rows]
    weight, assumed = gains(columns, dtype=torch.bfloat16).to(DEVICE), x[-7:].clone()
    y, dx, _ = gradients(x, weight, x, offset=1.0)
    alone = gradients(assumed, weight, assumed, offset=1.0)
    assert x.numel() > 2**31
    assert same_bits(y[-7:], alone[0])
    assert same_bits(dx[-7:], alone[1])


def test_other_kernels_of_the_page_work_there():
    """LayerNorm is torch's there, the gated norm is the definition."""
    x, gate = there(sample(9, 576, torch.float32), sample(9, 576, torch.float32, 1))
    layer = rmsnorm.LayerNorm(576, device=DEVICE)
    assert torch.equal(layer(x), F.layer_norm(x, (576,), layer.weight, layer.bias, layer.eps))
    y = rmsnorm.gated_rms_norm(x, gate, 576, None, EPS)
    expected = F.rms_norm(x.double(), (576,), None, EPS) * F.silu(gate.double())
    torch.testing.assert_close(y.double(), expected, rtol=2.0**-20, atol=1e-30)


def test_info_names_the_route():
    assert rmsnorm.info().cuda in route.CHOICES
