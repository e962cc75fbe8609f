"""Proves that blocks of diffusion transformers are rewritten where their source modulates a norm or gates an add, with
the bits of the lines that were; what is not what was proven runs those lines. The small blocks here have diffusers'
lines; where diffusers is installed, its own models are tried, too.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle import same_bits
from torch import Tensor, nn

import rmsnorm
from rmsnorm.models import modulation

WIDTH = 32


class Zero(nn.Module):
    """AdaLayerNormZero."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 6 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        emb = self.linear(emb)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = emb.chunk(6, dim=1)
        x = self.norm(x) * (1 + scale_msa[:, None]) + shift_msa[:, None]
        return x, gate_msa, shift_mlp, scale_mlp, gate_mlp


class Continuous(nn.Module):
    """AdaLayerNormContinuous, and RMS norm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2 * WIDTH)
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6, elementwise_affine=False)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = torch.chunk(self.linear(emb), 2, dim=1)
        x = self.norm(x) * (1 + scale)[:, None, :] + shift[:, None, :]
        return x  # noqa: RET504


class Block(nn.Module):
    """FluxTransformerBlock's lines."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = Zero()
        self.attn, self.ff = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)

    def forward(self, hidden_states: Tensor, emb: Tensor) -> Tensor:
        norm_hidden_states, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, emb)
        attn_output = self.attn(norm_hidden_states)
        attn_output = gate_msa.unsqueeze(1) * attn_output
        hidden_states = hidden_states + attn_output

        norm_hidden_states = self.norm2(hidden_states)
        norm_hidden_states = norm_hidden_states * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        ff_output = self.ff(norm_hidden_states)
        hidden_states = hidden_states + gate_mlp.unsqueeze(1) * ff_output
        return hidden_states  # noqa: RET504


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.out = Continuous()
        self.to(dtype)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, emb)
        return self.out(x, emb)


def given(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(2, 5, WIDTH, generator=dice).to(dtype),
        "emb": torch.randn(2, WIDTH, generator=dice).to(dtype),
    }


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of our functions blocks call."""
    names: list[str] = []
    for name in ("modulated_norm", "gated_add"):
        ours = getattr(rmsnorm, name)
        monkeypatch.setattr(modulation, name, lambda *a, f=ours, n=name, **k: names.append(n) or f(*a, **k))
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_with_the_same_bits(dtype: torch.dtype, called: list[str]) -> None:
    """Those of the patched model, and in bf16 of the model itself; gradients within rounding; and back."""
    model, example = Model(dtype), given(dtype)
    theirs = model(**example)
    results = []
    for fuse in (False, example):
        report = rmsnorm.patch(model, layer_norm=True, fuse=fuse)
        called.clear()
        output = model(**example)
        model.zero_grad()
        output.square().sum().backward()
        results.append((output, [p.grad.clone() for p in model.parameters()]))
        rmsnorm.unpatch(model)
    assert called == ["modulated_norm", "modulated_norm", "gated_add"] * 2 + ["modulated_norm"]
    meanings = {entry.name: entry.meaning for entry in report.fused}
    assert meanings == {
        **{f"blocks.{i}": "norm2, modulated; 2 gated adds" for i in (0, 1)},
        **{f"blocks.{i}.norm1": "norm, modulated" for i in (0, 1)},
        "out": "norm, modulated",
    }
    assert same_bits(results[0][0].detach(), results[1][0].detach())
    torch.testing.assert_close(results[1][0], theirs)
    for one, two in zip(results[0][1], results[1][1], strict=True):
        scale = torch.finfo(dtype).eps * 16
        assert (one - two).abs().max() <= scale * one.abs().max()
    assert same_bits(model(**example).detach(), theirs.detach())


class Branches(Block):
    """DiT's block: one class, two ways, of which a model goes one."""

    modulates = True

    def forward(self, hidden_states: Tensor, emb: Tensor) -> Tensor:
        scale, shift = emb[:, None], emb[:, None] * 2
        if self.modulates:
            hidden_states = self.norm2(hidden_states)
            hidden_states = hidden_states * (1 + scale) + shift
        else:
            gate = emb.unsqueeze(1)
            hidden_states = hidden_states + gate * self.ff(hidden_states)
        return hidden_states


@pytest.mark.parametrize(("modulates", "said"), [(True, "norm2, modulated"), (False, "gated add")])
def test_only_what_the_model_runs_is_said_to_be_fused(modulates: bool, said: str, called: list[str]) -> None:
    block = Branches()
    block.modulates = modulates
    example = {"hidden_states": given()["x"], "emb": given()["emb"]}
    report = rmsnorm.patch(block, layer_norm=True, fuse=example)
    assert [(entry.name, entry.meaning) for entry in report.fused] == [("", said)]
    called.clear()
    block(**example)
    assert called == ["modulated_norm" if modulates else "gated_add"]


def test_a_layer_of_which_nothing_is_served_is_not_said_to_be_fused() -> None:
    """CogVideoX: its norms have weights and biases, which one pass doesn't take."""
    zero = Zero()
    zero.norm = nn.LayerNorm(WIDTH)
    report = rmsnorm.patch(zero, layer_norm=True, fuse=given())
    assert report.fused == []
    assert "modulation not fused: the model reaches no such line" in report.skipped[-1].reason
    assert type(zero) is Zero


def test_a_layer_whose_norms_are_left_alone_is_not_said_to_be_fused() -> None:
    report = rmsnorm.patch(Zero(), fuse=given())
    assert report.fused == []
    assert [entry.reason for entry in report.skipped if entry.name == ""] == ["modulation not fused: norm: not patched"]


def test_what_was_not_proven_runs_the_lines(called: list[str]) -> None:
    """A norm that isn't patched or is listened to, autocast, other types: the same numbers, without our functions."""
    model, example = Model(), given()
    rmsnorm.patch(model, layer_norm=True, fuse=example)
    block = model.blocks[0]
    wanted = block(example["x"], example["emb"])
    called.clear()
    heard: list[Tensor] = []
    hook = block.norm2.register_forward_hook(lambda module, args, output: heard.append(output))
    again = block(example["x"], example["emb"])
    hook.remove()
    assert len(heard) == 1
    assert called == ["modulated_norm", "gated_add", "gated_add"]
    assert same_bits(again.detach(), wanted.detach())
    called.clear()
    model.double()(**{name: t.double() for name, t in example.items()})
    assert not called
    model.float()
    called.clear()
    with torch.autocast("cpu", torch.bfloat16):
        model(**example)
    assert not called
    twin = copy.deepcopy(model)
    called.clear()
    assert same_bits(twin(**example).detach(), model(**example).detach())
    assert called


class Reads(nn.Module):
    """What is gated is read once more: the add stays, and so does what stands in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        gate = emb.unsqueeze(1)
        y = self.norm(x) * (1 + emb[:, None]) + emb[:, None]
        y = gate * y
        x = x + y
        return x + y.mean()


def test_what_is_read_again_stays(called: list[str]) -> None:
    model, example = Reads(), given()
    theirs = model(**example)
    report = rmsnorm.patch(model, layer_norm=True, fuse=example)
    assert [entry.meaning for entry in report.fused] == ["norm, modulated"]
    torch.testing.assert_close(model(**example), theirs)
    assert called[-1:] == ["modulated_norm"]


def flux(diffusers: Any, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    sizes = {"hidden_states": (2, 16, 4), "encoder_hidden_states": (2, 6, 32), "pooled_projections": (2, 32),
             "timestep": (2,), "img_ids": (16, 3), "txt_ids": (6, 3)}  # fmt: skip
    return model.to(dtype), {name: torch.randn(size).to(dtype) for name, size in sizes.items()}


def dit(diffusers: Any, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=10
    )
    numbers = {"timestep": torch.tensor([1, 3]), "class_labels": torch.tensor([0, 1])}
    return model.to(dtype), {"hidden_states": torch.randn(2, 4, 8, 8).to(dtype), **numbers}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [flux, dit])
def test_diffusers(make: Any, dtype: torch.dtype, called: list[str]) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model, example = make(diffusers, dtype)
    model.eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) / 20
    outputs = []
    for fuse in (False, example):
        report = rmsnorm.patch(model, layer_norm=True, fuse=fuse)
        called.clear()
        with torch.no_grad():
            outputs.append(model(**example).sample)
        rmsnorm.unpatch(model)
    assert len(called) == (8 if make is flux else 3)
    assert {"AdaLayerNormZero"} < {entry.cls for entry in report.fused}
    assert same_bits(*outputs)


def test_tensors_of_a_device_without_autocast() -> None:
    """torch raises where it is asked whether autocast is on for meta."""
    x = torch.empty(2, 3, 8, device="meta")
    assert modulation.gated(x, x[:, :1], x).is_meta
