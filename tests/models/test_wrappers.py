"""Proves that a patched model is still a model to everything that wraps models: hooks, casts, checkpointing,
accelerate, PEFT, FSDP2. Values are compared with those of the patched model that nobody wrapped.
"""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from oracle import same_bits
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import rmsnorm
from rmsnorm.models.binding import binding_of
from rmsnorm.models.neighbours import needs_no_call


def ids() -> Tensor:
    return torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    """A small Llama, patched, with its adds fused."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    llama = transformers.LlamaForCausalLM(config).eval()
    report = rmsnorm.patch(llama, fuse_add=True)
    assert (len(report.patched), len(report.fused)) == (5, 2)
    return llama


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_hooks_see_what_they_saw(model: nn.Module) -> None:
    """Those of a norm that is fused into an add too: it then runs by itself."""
    plain, seen = model(ids()).logits, []
    for norm in (model.model.norm, model.model.layers[1].post_attention_layernorm):
        norm.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    assert same_bits(model(ids()).logits, plain)
    assert len(seen) == 2
    fused, last = seen
    assert same_bits(last[1], model.model.norm.forward(last[0]))
    assert same_bits(fused[1], model.model.layers[1].post_attention_layernorm.forward(fused[0]))


def test_a_hook_that_changes_a_norm_is_obeyed(model: nn.Module) -> None:
    plain = model(ids()).logits
    handle = model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda *_: torch.zeros(2, 12, 64))
    assert not same_bits(model(ids()).logits, plain)
    handle.remove()
    assert same_bits(model(ids()).logits, plain)


def test_a_forward_that_is_set_later_is_obeyed(model: nn.Module) -> None:
    """On a norm itself, as accelerate's offloading does, in a layer that is fused: that norm then runs by itself."""
    plain, norm = model(ids()).logits, model.model.layers[0].post_attention_layernorm
    own, seen = norm.forward, []
    norm.forward = lambda x: seen.append(x) or own(x) * 3
    assert not torch.allclose(model(ids()).logits, plain)
    assert len(seen) == 1
    del norm.forward
    assert same_bits(model(ids()).logits, plain)


class Rotation(nn.Module):
    """What ``kernels`` makes of a function of transformers: a module, whose forward ``kernelize()`` exchanges."""

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rmsnorm.rope(q, k, cos, sin)


apply_rotary = Rotation()


class Turning(nn.Module):
    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = apply_rotary(q, k, cos, sin)
        return q + k


def test_a_rotation_that_is_exchanged_or_heard_is_obeyed() -> None:
    """And such a one is not what is proven."""
    heads = {name: torch.randn(1, 2, 3, 8) for name in ("q", "k")}
    example = {**heads, "cos": torch.randn(1, 3, 8), "sin": torch.randn(1, 3, 8)}
    model = Turning()
    apply_rotary.forward = lambda q, k, cos, sin: (q * 2, k * 3)
    try:
        (entry,) = rmsnorm.patch(model, fuse=example).skipped
        assert entry.reason == "rotary embedding not fused: apply_rotary was replaced, or somebody listens to it"
        exchanged = model(**example)
        del apply_rotary.forward
        assert [entry.meaning for entry in rmsnorm.patch(model, fuse=example).fused] == ["rotary embedding"]
        turned, heard = model(**example), []
        handle = apply_rotary.register_forward_hook(lambda *_: heard.append(1))
        assert same_bits(model(**example), turned)
        assert heard == [1]
        handle.remove()
        apply_rotary.forward = lambda q, k, cos, sin: (q * 2, k * 3)
        assert same_bits(model(**example), exchanged)
        # Its own, as kernelize() sets it where it has no kernel; and another module's.
        for forward, itself in ((Rotation.forward.__get__(apply_rotary), True), (Rotation().forward, False)):
            apply_rotary.forward = forward
            assert needs_no_call(apply_rotary) is itself
        assert not same_bits(exchanged, turned)
    finally:
        vars(apply_rotary).pop("forward", None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_casts(model: nn.Module, dtype: torch.dtype) -> None:
    """In float64, which patch() does not prove, the norms run on their own forward."""
    ours = model.to(dtype)(ids()).logits
    rmsnorm.unpatch(model)
    theirs = model(ids()).logits
    assert ours.dtype is theirs.dtype is dtype
    if dtype is torch.float64:
        assert same_bits(ours, theirs)
    else:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * torch.finfo(dtype).eps * theirs.abs().max().item())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(model: nn.Module, reentrant: bool) -> None:
    """Each layer runs twice, as it does unpatched, with the gradients that it has without checkpointing."""
    plain, seen = gradients(model), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: seen.append(1))
    model.train()
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.23 on
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = gradients(model)
    assert plain.keys() == again.keys()
    assert all(same_bits(again[name], gradient) for name, gradient in plain.items())
    assert len(seen) == 4
    seen.clear()
    rmsnorm.unpatch(model)
    gradients(model)
    assert len(seen) == 4


@pytest.mark.skipif(
    "cache" not in inspect.signature(LlamaDecoderLayer.forward).parameters,
    reason="transformers before 5.24 renames none",
)
def test_a_renamed_argument_is_still_taken_and_told(model: nn.Module) -> None:
    layer, cache = model.model.layers[0], transformers.DynamicCache()
    x = torch.randn(2, 3, 64)
    positions = model.model.rotary_emb(x, torch.arange(3)[None])
    for _ in range(2):
        with pytest.warns(FutureWarning, match="`past_key_values` is deprecated") as seen:
            layer(x, position_embeddings=positions, past_key_values=cache)
        assert len(seen) == 1
        rmsnorm.unpatch(model)
    assert cache.get_seq_length() == 6


def test_state_dicts_go_both_ways(model: nn.Module) -> None:
    state = model.state_dict()
    other = transformers.LlamaForCausalLM(model.config).eval()
    assert list(other.state_dict()) == list(state)
    other.load_state_dict(state)
    rmsnorm.patch(other, fuse_add=True)
    assert same_bits(other(ids()).logits, model(ids()).logits)


def test_accelerate_around_ours_and_ours_around_accelerate(model: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    norm, plain = model.model.norm, model(ids()).logits
    hooks.add_hook_to_module(norm, hooks.ModelHook())
    assert same_bits(model(ids()).logits, plain)
    rmsnorm.unpatch(model)  # from under the hook
    own = model(ids()).logits
    assert not same_bits(own, plain)
    report = rmsnorm.patch(model)
    assert [entry.reason for entry in report.skipped] == ["its forward was replaced before, by accelerate.hooks"]
    rmsnorm.unpatch(model)
    hooks.remove_hook_from_module(norm)
    assert same_bits(model(ids()).logits, own)
    assert not binding_of(norm)


@pytest.mark.filterwarnings("ignore")  # peft's imports
def test_peft_before_and_after(model: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    plain = model(ids()).logits
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["model.norm"])
    tuned = peft.get_peft_model(model, config)
    assert same_bits(tuned(ids()).logits, plain)  # a fresh adapter adds zero
    found = gradients(tuned)
    assert any("lora" in name for name in found)
    assert any("norm.modules_to_save" in name for name in found)  # PEFT trains a copy of the norm: it is patched too
    rmsnorm.unpatch(tuned)
    own = tuned(ids()).logits
    assert not same_bits(own, plain)
    report = rmsnorm.patch(tuned, fuse_add=True)
    assert (len(report.patched), len(report.fused)) == (6, 2)
    assert same_bits(tuned(ids()).logits, plain)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.filterwarnings("ignore")  # torch.distributed's own
def test_fsdp2_on_one_process(model: nn.Module, tmp_path) -> None:
    """It swaps the classes of the layers, and makes every parameter a DTensor outside of its layer's forward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain = model(ids()).logits.detach()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert same_bits(model(ids()).logits.detach(), plain)
        assert len(gradients(model)) == len(list(model.parameters()))
        rmsnorm.unpatch(model)
        assert not same_bits(model(ids()).logits.detach(), plain)
    finally:
        torch.distributed.destroy_process_group()
