"""Proves what ``patch(model, fuse=…, memory="lean")`` does to gated MLPs: outputs and gradients have the bits of the
lines that were there, one tensor less is kept, and whatever is unusual runs those lines."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from calls import Silent
from torch import Tensor, nn
from torch.func import functional_call, vmap
from transformers.activations import ACT2FN

import rmsnorm
from rmsnorm.bench.memory import kept
from rmsnorm.models.gates import KEPT, gated


class Mlp(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = nn.RMSNorm(8), Mlp(act)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def patched(
    act: nn.Module | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Layer, Layer, rmsnorm.PatchReport]:
    """The layer as it was, and patched."""
    torch.manual_seed(0)
    layer = Layer(act or nn.SiLU()).to(dtype)
    lean = copy.deepcopy(layer)
    return layer, lean, rmsnorm.patch(lean, fuse={"x": X.to(dtype)}, memory="lean")


def gradients(layer: nn.Module, x: Tensor, create_graph: bool = False) -> list[Tensor]:
    y = layer(x)
    return [y, *torch.autograd.grad((y * y.detach().sin()).sum(), [x, *layer.parameters()], create_graph=create_graph)]


@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), ACT2FN["gelu_pytorch_tanh"]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_bits_of_the_lines(act, dtype):
    layer, lean, report = patched(act, dtype)
    (entry,) = report.fused
    assert (entry.name, entry.kept, entry.meaning) == ("mlp", KEPT, "act_fn, product")
    assert "; 1 gated products keep less for backward" in report.summary()
    x = X.to(dtype).requires_grad_()
    mine, theirs = gradients(lean.mlp, x), gradients(layer.mlp, x)
    assert all(map(torch.equal, mine, theirs))
    sizes = [sum(size for size, _ in kept(lambda m=m: m(x), m.parameters())) for m in (layer.mlp, lean.mlp)]
    assert sizes[0] - sizes[1] == 5 * 24 * dtype.itemsize


def test_second_derivatives():
    """Through the graph of the gradient, for each of the two factors alone, too."""
    a, b = (torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (2, 3))
    act = nn.SiLU()
    for needs in ((True, True), (True, False), (False, True)):
        x, y = (t.clone().requires_grad_(need) for t, need in zip((a, b), needs, strict=True))
        assert torch.autograd.gradcheck(lambda x, y: gated(act, x, y), (x, y))
        assert torch.autograd.gradgradcheck(lambda x, y: gated(act, x, y), (x, y))


def test_whatever_is_unusual():
    """Hooks, transforms, activations that keep their output already, that write or roll dice: the line as it was."""
    x, other = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    heard, act = [], nn.SiLU()
    assert "Product" in gated(act, x, other).grad_fn.name()
    act.register_forward_hook(lambda *_: heard.append(1))
    for one in (act, nn.SiLU(inplace=True), nn.RReLU(), nn.ReLU(), nn.Identity(), torch.nn.functional.silu):
        given = x + 0
        assert "Mul" in gated(one, given, other).grad_fn.name(), one
    assert heard == [1]
    layer, lean, _ = patched()
    with torch.no_grad():
        assert torch.equal(lean.mlp(X), layer.mlp(X))
    rows = vmap(lambda row: functional_call(lean.mlp, dict(lean.mlp.named_parameters()), (row,)))(X)
    assert torch.allclose(rows, layer.mlp(X), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lean.mlp(X), layer.mlp(X))


def test_the_way_back_and_files():
    layer, lean, _ = patched()
    assert type(lean.mlp) is not Mlp
    twin = pickle.loads(pickle.dumps(lean))
    assert all(
        map(torch.equal, gradients(twin, X.clone().requires_grad_()), gradients(lean, X.clone().requires_grad_()))
    )
    rmsnorm.unpatch(lean)
    assert type(lean.mlp) is Mlp
    assert not rmsnorm.patch(lean, memory="lean").fused
    assert not patched(nn.ReLU())[2].fused
    assert torch.equal(lean.mlp(X), layer.mlp(X))


def test_no_gradient_is_not_one_of_zeros():
    x, other = torch.ones(3, requires_grad=True), torch.full((3,), torch.inf, requires_grad=True)
    y = gated(nn.SiLU(), x, other)
    assert type(y.grad_fn).__name__ == "_ProductBackward"
    assert torch.autograd.grad(Silent.apply(y).sum(), (x, other), allow_unused=True) == (None, None)
