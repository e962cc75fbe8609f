"""Proves that patch() keeps what a model means, refuses what it can't reproduce, and leaves the model a model: copies,
files, hooks, wrappers, and the way back.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from oracle import gains, same_bits
from torch import Tensor, nn

import rmsnorm
from rmsnorm.models.binding import binding_of


class Llama(nn.Module):
    """The formula of transformers' LlamaRMSNorm: rounds to the input's type, then multiplies."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(gains(size, dtype=torch.float32))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class T5(Llama):
    """Its output has the weight's type if that is a half type."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            x = x.to(self.weight.dtype)
        return self.weight * x


class Gemma(Llama):
    def forward(self, x: Tensor) -> Tensor:
        normalised = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (normalised * (1.0 + self.weight.float())).type_as(x)


class OtherOrder(Llama):
    """A class by Llama's name and attributes, with the other order of casts."""

    def forward(self, x: Tensor) -> Tensor:
        normalised = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * normalised).to(x.dtype)


class Weightless(nn.Module):
    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(64), persistent=False)  # unused, as in falcon_mamba

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x)


class EpsOutside(Llama):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x.float() / (x.float().pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)).to(
            x.dtype
        )


class Centred(Llama):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class RoundedFactor(Llama):
    """Half precision: 1/rms is rounded before it multiplies."""

    def forward(self, x: Tensor) -> Tensor:
        r = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (x * r.to(x.dtype))


class InPlace(Llama):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is torch.float32:
            return x.mul_(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).mul_(self.weight)
        return super().forward(x)


class Detached(Llama):
    """Right forward, and a gradient of its own."""

    def forward(self, x: Tensor) -> Tensor:
        r = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (x.float() * r.detach()).to(x.dtype)


class HiddenEps(Llama):
    """The attribute isn't what the formula reads."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.norm = norm
        self.last = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.first(x)))
        return y


def x(dtype: torch.dtype = torch.float32, columns: int = 32) -> Tensor:
    return torch.randn(5, 7, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's
@pytest.mark.parametrize(
    ("norm", "meaning"),
    [
        (Llama(64), "round, then weight"),
        (T5(64), "round, then weight"),
        (OtherOrder(64), "weight, then round"),
        (nn.RMSNorm(64), "weight, then round"),
        (nn.RMSNorm((4, 16), eps=1e-3), "weight, then round"),
        (Gemma(64), "1 + weight"),
        (Weightless(), "no weight"),
        (nn.RMSNorm((4, 16), elementwise_affine=False), "no weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_norm_is_what_it_computes(norm: nn.Module, meaning: str) -> None:
    """Names and classes say nothing: OtherOrder is a Llama by name."""
    before = copy.deepcopy(norm)
    report = rmsnorm.patch(norm)
    assert [(entry.name, entry.cls, entry.meaning) for entry in report.patched] == [("", type(norm).__name__, meaning)]
    assert not report.skipped
    assert {"float32", "bfloat16", "float16"} <= set(report.patched[0].types)
    shape = getattr(norm, "normalized_shape", (64,))
    for x_type in (torch.float32, torch.bfloat16, torch.float16):
        for w_type in (torch.float32, torch.bfloat16, torch.float16):
            rows = x(x_type, 64).view(5, 7, *shape)
            theirs, ours = before.to(w_type)(rows), norm.to(w_type)(rows)
            assert theirs.dtype is ours.dtype, (x_type, w_type)
            tolerance = 4 * torch.finfo(x_type).eps
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (EpsOutside(64), "no recipe reproduces it"),
        (Centred(64), "it is a LayerNorm"),
        (RoundedFactor(64).bfloat16(), "no recipe reproduces it"),
        (InPlace(64), "it writes into its input"),
        (Detached(64), "not backward"),
        (HiddenEps(64), "no recipe reproduces it"),
        (nn.BatchNorm1d(64), "it is torch's own, and no RMS norm"),
        (nn.LayerNorm(64), "it is a LayerNorm"),
        (rmsnorm.RMSNorm(64), "it is rmsnorm's own layer"),
        (nn.Sequential(Llama(64).double()), "its weight is torch.float64"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_cant_be_reproduced_is_left_alone_with_the_reason(norm: nn.Module, reason: str) -> None:
    report = rmsnorm.patch(norm)
    assert not report.patched
    assert reason in report.skipped[0].reason
    assert all("forward" not in vars(module) for module in norm.modules())


def test_the_way_there_and_back() -> None:
    """Same values to rounding, the same state, and the very same bits after unpatch."""
    net = Net(Llama(64))
    before, state = net(x()), copy.deepcopy(net.state_dict())
    parameters = dict(net.named_parameters())
    report = rmsnorm.patch(net)
    assert [entry.name for entry in report.patched] == ["norm"]
    assert isinstance(net.norm, Llama)
    assert type(net.norm).__qualname__ == Llama.__qualname__
    torch.testing.assert_close(net(x()), before, rtol=1e-5, atol=1e-6)
    assert not same_bits(net(x()), before), "ours rounds less: equal bits mean that nothing was patched"
    assert net.state_dict().keys() == state.keys()
    assert all(parameters[name] is parameter for name, parameter in net.named_parameters())
    rmsnorm.unpatch(net)
    assert type(net.norm) is Llama
    assert "forward" not in vars(net.norm)
    assert same_bits(net(x()), before)
    rmsnorm.unpatch(net)  # twice is once
    with rmsnorm.patched(net) as report:
        assert len(report.patched) == 1
        assert binding_of(net.norm)
    assert not binding_of(net.norm)


def test_patching_twice_is_patching_once() -> None:
    net = Net(Llama(64))
    rmsnorm.patch(net)
    bound = net.norm.forward
    again = rmsnorm.patch(net)
    assert not again.patched
    assert again.skipped[0].reason == "it is patched already"
    assert net.norm.forward == bound


def test_weight_and_eps_are_read_at_each_call() -> None:
    net = Net(Llama(64))
    rmsnorm.patch(net)
    with torch.no_grad():
        net.norm.weight *= 3
    net.norm.variance_epsilon = 0.5
    ours = net(x())
    rmsnorm.unpatch(net)
    torch.testing.assert_close(ours, net(x()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), "file"], ids=["deepcopy", "pickle", "file"]
)
def test_copies_are_patched_and_independent(copied) -> None:
    net = Net(Llama(64))
    rmsnorm.patch(net)
    if copied == "file":
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copied(net)
    assert binding_of(twin.norm) == binding_of(net.norm)
    assert same_bits(twin(x()), net(x()))
    with torch.no_grad():
        net.norm.weight.zero_()
    assert not same_bits(twin(x()), net(x()))
    rmsnorm.unpatch(twin)
    assert not binding_of(twin.norm)
    assert binding_of(net.norm)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_mode_of_the_caller_does_not_matter(mode) -> None:
    net = Net(Llama(64))
    with mode():
        report = rmsnorm.patch(net)
    assert report.patched
    net(x()).sum().backward()
    assert net.norm.weight.grad is not None


def test_without_verify_gradients_are_not_asked_for() -> None:
    assert rmsnorm.patch(Detached(64), verify=False).patched
    assert not rmsnorm.patch(EpsOutside(64), verify=False).patched
