"""Proves that whole models of many families work patched as they do unpatched: forward, backward, generation with a
cache, compile. Tiny random configurations; the norms' weights are random too, or else gains of one would hide them.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from oracle import gains, same_bits
from torch import nn

import rmsnorm

TOKENS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# name of the classes -> options of the configuration, norms, layers whose add is fused
FAMILIES: dict[str, tuple[dict[str, Any], int, int]] = {
    "Llama": ({}, 5, 2),
    "Mistral": ({"head_dim": 16}, 5, 2),
    "Qwen3": ({"head_dim": 16}, 9, 2),  # per-head q and k
    "Gemma2": ({"head_dim": 16}, 9, 2),  # before and after each block
    "Gemma3": ({"head_dim": 16}, 13, 2),  # strided q and k
    "GptOss": ({"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}, 5, 2),
    "Olmo2": ({}, 9, 2),  # only after each block: the add follows the norm
    "DeepseekV3": (  # the norm sees a slice
        {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "q_lora_rank": 24, "kv_lora_rank": 16}
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1}
        | {"num_key_value_heads": 4, **EXPERTS},
        9,
        2,
    ),
    "Mamba2": ({"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16}, 5, 0),
    "Qwen3Next": (
        {"num_experts": 4, "shared_expert_intermediate_size": 32, "layer_types": ["linear_attention", "full_attention"]}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
        | {"linear_value_head_dim": 16, "head_dim": 16, **EXPERTS},
        8,
        2,
    ),
    "FalconH1": (
        {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_rms_norm": True}
        | {"mamba_chunk_size": 16, "head_dim": 16},
        7,
        2,
    ),
    "T5": (
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        12,
        0,
    ),
}


def build(family: str) -> nn.Module:
    options, _, _ = FAMILIES[family]
    decoder = {} if family == "T5" else DECODER
    configuration = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    torch.manual_seed(0)
    config = getattr(transformers, configuration)(**(TOKENS | decoder | options))
    config.tie_word_embeddings = False
    head = "ForConditionalGeneration" if family == "T5" else "ForCausalLM"
    model = getattr(transformers, family + head)(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name.lower():
            parameter.data = gains(*parameter.shape, dtype=torch.float32)
    return model


def run(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Logits, gradients, and eight tokens that it writes."""
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    model.zero_grad(set_to_none=True)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    mask = torch.ones_like(ids)
    written = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8, min_new_tokens=8)
    return output.logits.detach(), gradients, written


@pytest.mark.parametrize("family", FAMILIES)
def test_patched_as_unpatched(family: str) -> None:
    """Logits within 1e-5 of the largest: 3e-6 seen, a dozen norms of 2e-7 each, passed on by layers of random weights.
    With the adds fused, the very same bits as without."""
    model = build(family)
    logits, gradients, written = run(model)
    report = rmsnorm.patch(model)
    _, norms, layers = FAMILIES[family]
    assert (len(report.patched), report.skipped) == (norms, [])
    ours, our_gradients, our_written = run(model)
    assert not same_bits(ours, logits), "nothing changed, not even in the last bit: nothing was patched"
    assert (ours - logits).abs().max() < 1e-5 * logits.abs().max()
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        apart = (our_gradients[name] - gradient).norm()
        assert apart <= 1e-4 * gradient.norm() + 1e-7, name
    assert torch.equal(our_written, written)

    rmsnorm.unpatch(model)
    assert same_bits(run(model)[0], logits)

    report = rmsnorm.patch(model, fuse_add=True)
    assert (len(report.fused), report.skipped) == (layers, [])
    fused, _, fused_written = run(model)
    assert same_bits(fused, ours)
    assert torch.equal(fused_written, written)
    rmsnorm.unpatch(model)
    assert same_bits(run(model)[0], logits)


@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    """The same bits, but for a rounding here and there, which later layers pass on to the rest of its sequence: 79 %
    of the logits and more; with another order of casts, 10 to 30."""
    model = build(family).to(dtype)
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        rmsnorm.patch(model)
        after = model(ids).logits
    assert (before == after).double().mean() >= 0.7
    torch.testing.assert_close(after, before, rtol=0, atol=4 * float(torch.finfo(dtype).eps * before.abs().max()))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("fuse_add", [False, True])
def test_compiled_whole(fuse_add: bool) -> None:
    model = build("Llama")
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    rmsnorm.patch(model, fuse_add=fuse_add)
    with torch.no_grad():
        eager = model(ids).logits
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")(ids).logits
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


def test_bert_has_nothing_to_patch_but_layer_norms_when_asked() -> None:
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).last_hidden_state
        report = rmsnorm.patch(model)
        assert not report.patched
        assert len(report.skipped) == 5
        assert "layer_norm=True" in report.skipped[0].reason
        assert same_bits(model(ids).last_hidden_state, before)
        report = rmsnorm.patch(model, layer_norm=True)
        assert len(report.patched) == 5
        after = model(ids).last_hidden_state
    assert not same_bits(after, before)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_a_compiled_model_notices() -> None:
    model = build("Llama")
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        before = compiled(ids).logits
        report = rmsnorm.patch(compiled)
        assert len(report.patched) == 5
        assert same_bits(compiled(ids).logits, model(ids).logits)
        assert not same_bits(compiled(ids).logits, before)
        rmsnorm.unpatch(compiled)
        assert same_bits(compiled(ids).logits, before)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.heavy
def test_compiled_to_native_code() -> None:
    """By inductor, forward and backward: the norms stay nodes of our operators, the rest is fused."""
    model = build("Llama")
    logits, gradients, _ = run(model)
    rmsnorm.patch(model, fuse_add=True)
    model.forward = torch.compile(model.forward)
    ours, our_gradients, _ = run(model)
    assert (ours - logits).abs().max() < 1e-5 * logits.abs().max()
    for name, gradient in gradients.items():
        assert (our_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # Deberta's
@pytest.mark.parametrize(("cls", "types"), [("Cohere", 9), ("Deberta", 3)])
def test_layer_norms_that_are_not_torchs(cls: str, types: int) -> None:
    """Cohere's casts as torch's does, and takes mixed types. Deberta's rounds before the weight: float32 only, and what
    is half goes its own way."""
    norm = getattr(getattr(transformers.models, cls.lower()), f"modeling_{cls.lower()}").__dict__[f"{cls}LayerNorm"](64)
    assert "layer_norm=True" in rmsnorm.patch(norm).skipped[0].reason
    (entry,) = rmsnorm.patch(norm, layer_norm=True).patched
    assert (entry.meaning, len(entry.types)) == ("LayerNorm", types), entry
    x = torch.randn(4, 64)
    ours, half = norm(x), copy.deepcopy(norm).bfloat16()(x.bfloat16())
    rmsnorm.unpatch(norm)
    torch.testing.assert_close(ours, norm(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(half, norm.bfloat16()(x.bfloat16()), rtol=2**-7, atol=1e-6)
