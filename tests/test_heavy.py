"""Proves 64-bit offsets: tensors of more than 2³¹ elements, forward and backward, in the rows where 32 bits wrap."""

import gc

import pytest
import torch
from oracle import same_bits

import rmsnorm

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.xdist_group("heavy"),  # one after the other: each needs 13 GB
    pytest.mark.skipif(not rmsnorm.info().native, reason="torch's formula needs 50 GB of temporaries here"),
]

SHAPES = [(2**24 + 3, 129), (2**9 + 1, 2**22 + 1)]  # 2.16e9 elements, 4.3 GB in bf16: narrow rows, and wide ones


@pytest.fixture(scope="module", params=SHAPES, ids=["narrow rows", "wide rows"])  # 30 s to write
def x(request):
    rows, columns = request.param
    assert rows * columns > 2**31
    block = torch.randn(1000, columns if columns < 1e6 else 4099)
    x = torch.empty(rows, columns, dtype=torch.bfloat16)
    flat, pattern = x.view(-1), block.bfloat16().view(-1)
    whole = flat.numel() // pattern.numel() * pattern.numel()
    flat[:whole].view(-1, pattern.numel())[:] = pattern
    flat[whole:] = pattern[: flat.numel() - whole]
    yield x
    del x, flat
    gc.collect()


def telling_rows(x: torch.Tensor) -> list[int]:
    """The ends, and the rows around elements 2³⁰ and 2³¹: the byte offset, then the element offset, leaves 32 bits."""
    rows, columns = x.shape
    return sorted(
        {r for e in (0, 2**30, 2**31, x.numel() - 1) for r in (e // columns - 1, e // columns) if 0 <= r < rows}
    )


def test_forward(x):
    weight = torch.randn(x.shape[1])
    y = rmsnorm.rms_norm(x, x.shape[1:], weight, 1e-6)
    for row in telling_rows(x):
        assert same_bits(y[row], rmsnorm.rms_norm(x[row], x.shape[1:], weight, 1e-6)), f"row {row}"


def test_backward(x):
    """The gradient is the input itself, so that another 4.3 GB are not needed."""
    weight = torch.randn(x.shape[1])
    with torch.no_grad():
        y, rstd = torch.ops.rmsnorm.rms_norm_forward(x, weight, 1, 1e-6, 0.0, False)
        del y
        grad = x.detach()
        dx, dw = torch.ops.rmsnorm.rms_norm_backward(grad, None, grad, rstd, weight, 1, 1e-6, 0.0, True, True)
    for row in telling_rows(x):
        alone = grad[row : row + 1].clone().requires_grad_()
        (expected,) = torch.autograd.grad(
            rmsnorm.rms_norm(alone, x.shape[1:], weight, 1e-6), alone, grad[row : row + 1]
        )
        assert same_bits(dx[row], expected[0]), f"row {row}"
    for column in (0, x.shape[1] // 2, x.shape[1] - 1):
        # The column as doubles: 16 million terms of one sign, summed by torch in fp64, each from an fp32 1/rms: 1e-6.
        truth = (grad[:, column].double().square() * rstd[:, 0].double()).sum()
        torch.testing.assert_close(dw[column].double(), truth, rtol=1e-6, atol=0)
