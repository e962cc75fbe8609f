"""Proves what ``patch(model, memory="lean")`` does to a model: what is kept, what a report says of it, what is refused
at once and later, and that training goes as it does with the model's own norms.
"""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import rmsnorm
from rmsnorm.bench.memory import kept
from rmsnorm.models.binding import binding_of

IDS = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.3 * torch.randn(weight.shape).to(dtype))
    return model


def loss(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name.endswith("norm")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_step_keeps(dtype, rstd_is_kept):
    """Of five norms no input, whose sums it were, and of two gated MLPs no activation: less by exactly that. (Of
    a row or a few, norms that keep their input keep nothing else, and lean ones a number for each row.)"""
    model = llama(dtype)
    sizes = {}
    for memory in (None, "lean"):
        report = rmsnorm.patch(model, fuse_add={"input_ids": IDS}, memory=memory)
        assert len(report.patched) == 5
        assert len(report.fused) == (4 if memory else 2)
        assert {entry.kept for entry in report.patched} == {"output" if memory else ""}
        sizes[memory] = sum(size for size, _ in kept(lambda: loss(model), model.parameters()))
        rmsnorm.unpatch(model)
    assert sizes[None] - sizes["lean"] == (5 * 32 + 2 * 64) * IDS.numel() * dtype.itemsize


def test_the_report():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = 0.0
    report = rmsnorm.patch(model, memory="lean")
    assert report.summary() == "5 norms run on rmsnorm, 4 of them keep no input for backward."
    assert "keeps its output" in str(report)
    reason = "its smallest gain is 0, of element 3, and float32 needs at least 1.2e-38 for x̂ = y / gain"
    assert f"keeps its input: {reason}" in str(report)
    by_name = {entry["name"]: entry["kept"] for entry in report.to_dict()["patched"]}
    assert by_name.pop("model.layers.1.input_layernorm") == f"input: {reason}"
    assert set(by_name.values()) == {"output"}
    loss(model).backward()  # and nobody is warned: it was never lean


def test_a_gain_that_becomes_zero():
    """The layer keeps its input from then on, exactly, and says so once; and comes back."""
    model, usual = llama(), llama()
    rmsnorm.patch(model, memory="lean")
    rmsnorm.patch(usual)
    for one in (model, usual):
        with torch.no_grad():
            one.model.norm.weight[5] = 0.0
    with pytest.warns(UserWarning, match=r"keeps its input: its smallest gain is 0, of element 5") as caught:
        loss(model).backward()
    assert len(caught) == 1
    model.zero_grad()
    loss(model).backward()
    loss(usual).backward()
    assert torch.equal(model.model.norm.weight.grad, usual.model.norm.weight.grad)


def test_copies_files_and_the_way_back():
    model = llama()
    rmsnorm.patch(model, memory="lean")
    file = io.BytesIO()
    torch.save(model.model.norm, file)
    file.seek(0)
    for twin in (copy.deepcopy(model).model.norm, torch.load(file, weights_only=False)):
        assert binding_of(twin).memory == "lean"
        assert "Lean" in twin(torch.randn(2, 32)).grad_fn.name()
    rmsnorm.unpatch(model)
    assert not any(binding_of(norm) for norm in norms(model).values())
    with rmsnorm.patched(model, memory="lean") as report:
        assert len(report.patched) == 5


def test_a_file_of_a_version_that_knew_less():
    from rmsnorm.models.binding import _read

    model = llama()
    rmsnorm.patch(model)
    binding = binding_of(model.model.norm)
    plain = binding.plain()
    assert _read(type(model.model.norm), *plain[:-1]) == binding
    with pytest.raises(ValueError, match="zip"):
        _read(type(model.model.norm), *plain, "of the future")


def test_inference_is_the_same():
    model = llama().eval()
    rmsnorm.patch(model, fuse_add={"input_ids": IDS})
    with torch.no_grad():
        wanted = model(IDS).logits
        rmsnorm.unpatch(model)
        rmsnorm.patch(model, fuse_add={"input_ids": IDS}, memory="lean")
        assert torch.equal(model(IDS).logits, wanted)


def test_gemma():
    """Where norms stand behind blocks, too, no sum is kept: norm + add are one pass, and the next norm is lean."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    sizes, gradients = {}, {}
    for memory in (None, "lean"):
        report = rmsnorm.patch(model, fuse={"input_ids": IDS}, memory=memory)
        assert len(report.patched) == 9
        assert sum("norm" in entry.meaning for entry in report.fused) == 2
        sizes[memory] = sum(size for size, _ in kept(lambda: loss(model), model.parameters()))
        model.zero_grad()
        loss(model).backward()
        gradients[memory] = [p.grad.clone() for p in model.parameters()]
        rmsnorm.unpatch(model)
    assert sizes["lean"] < sizes[None]
    for a, b in zip(gradients["lean"], gradients[None], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training(dtype):
    """Ten steps of both, from the same weights. A gradient differs by about two roundings of its type (2^-7 in bf16,
    relative to the terms it is summed of), so the losses do by that of what has been learnt, and no more."""
    losses = {}
    for memory in (None, "lean"):
        model = llama(dtype)
        if memory:
            report = rmsnorm.patch(model, fuse_add={"input_ids": IDS}, memory=memory)
            assert len(report.patched) == 5
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses[memory] = []
        for _ in range(10):
            optimizer.zero_grad()
            value = loss(model)
            value.backward()
            optimizer.step()
            losses[memory].append(value.item())
    learnt = losses[None][0] - losses[None][-1]
    assert learnt > 0.1
    bound = 4 * torch.finfo(dtype).eps * (learnt if dtype is torch.bfloat16 else 4 * learnt)
    # In bf16 the weights are rounded at each step, too: half an eps of each, whatever the norms do.
    bound += (0.5 * torch.finfo(dtype).eps if dtype is torch.bfloat16 else 1e-6) * losses[None][0]
    for one, other in zip(losses["lean"], losses[None], strict=True):
        assert abs(one - other) <= bound, losses


def test_other_meanings_keep_their_input():
    class Normalize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.gamma = 32**0.5, nn.Parameter(torch.ones(32))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.normalize(x, dim=-1) * self.scale * self.gamma

    model = nn.Sequential(Normalize())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = rmsnorm.patch(model, memory="lean")
    for entry in report.patched:
        assert entry.kept == "input: no norm of its meaning can do without it"
