"""Proves surgery on whole models of many families: in fp64 they say what they said, and undone they are what they were.

The truth is the model in fp64, its norms written out in small.py; surgery's own proof isn't asked.
"""

from __future__ import annotations

from typing import Any

import pytest
import small
import torch

import rmsnorm

BAR = 1e-12
# Of each family: its norms, those that fold changes (tied heads stay tied), to_rms, and rotate after both with untie.
NORMS = {
    "llama": (5, 5, 0, 5),
    "qwen3": (9, 5, 0, 5),  # those of query and key are turned afterwards
    "gemma": (5, 4, 0, 5),
    "gemma2": (9, 4, 0, 0),  # those behind the blocks write into the stream
    "phi3": (5, 5, 0, 5),
    "granite": (5, 5, 0, 5),
    "mixtral": (5, 5, 0, 5),
    "mamba2": (5, 5, 0, 3),  # the gated ones aren't in the stream
    "t5": (12, 11, 0, 12),
    "gpt2": (5, 4, 5, 5),
    "opt": (5, 4, 5, 5),
    "neox": (5, 5, 5, 5),
    "phi": (3, 3, 3, 3),
    "stablelm": (5, 5, 5, 5),
    "vit": (5, 5, 5, 5),
    "dinov2": (5, 5, 5, 5),
    "whisper": (12, 11, 12, 7),  # the encoder's stream begins behind a GELU
    "clip": (11, 10, 10, 5),  # that of the pictures behind a norm
}


def operated(model: Any, name: str, **options: Any) -> int:
    report = getattr(rmsnorm, name)(model, inputs=small.inputs(model), verify=False, **options)
    assert all(fate.done and not fate.reason for fate in report.done)
    assert all(fate.reason and not fate.done for fate in report.left)
    return len(report.done)


@pytest.mark.parametrize("name", NORMS)
def test_a_model_says_what_it_said(name: str) -> None:
    """Folded, with RMSNorms, and after all three; taken back between and at the end."""
    model = small.make(name, eps=0.37 if name in ("llama", "gpt2", "vit") else None).double()
    before, said = small.bits(model), small.truth(model)
    norms, folds, swaps, turns = NORMS[name]
    assert operated(model, "fold") == folds
    assert small.apart(said, small.truth(model)) < BAR
    assert not small.same(before, small.bits(model))
    rmsnorm.unfold(model)
    assert small.same(before, small.bits(model))
    assert operated(model, "to_rms") == swaps
    assert small.apart(said, small.truth(model)) < BAR
    assert operated(model, "fold", untie=True) <= norms
    assert small.apart(said, small.truth(model)) < BAR
    assert operated(model, "rotate") == turns
    assert small.apart(said, small.truth(model)) < BAR
    rmsnorm.unfold(model)
    assert small.same(before, small.bits(model))
    assert small.apart(said, small.truth(model)) == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
@pytest.mark.parametrize("operation", ["fold", "to_rms"])
def test_weights_that_were_assigned_are_taken_back(name: str, operation: str) -> None:
    """Loaded as objects, they are others than those that were changed."""
    model = small.make(name).double()
    before, said = small.bits(model), small.truth(model)
    operated(model, operation)
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    rmsnorm.unfold(model)
    assert small.same(before, small.bits(model))
    assert small.apart(said, small.truth(model)) == 0


def test_a_layer_that_was_replaced_cannot_be_taken_back() -> None:
    model = torch.nn.Sequential(torch.nn.RMSNorm(8), torch.nn.Linear(8, 4), torch.nn.RMSNorm(4), torch.nn.Linear(4, 4))
    with torch.no_grad():
        for i in (0, 2):
            model[i].weight.uniform_(0.5, 2)
    rmsnorm.fold(model, inputs=torch.randn(3, 8))
    model[3] = torch.nn.Linear(4, 4)
    folded = small.bits(model)
    with pytest.raises(ValueError, match=r"unfold: 3\.weight of shape \[4, 4\] isn't there any more"):
        rmsnorm.unfold(model)
    assert small.same(folded, small.bits(model))


def test_a_layer_norm_with_a_hook_stays() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4)).double()
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(None))
    x = torch.randn(3, 4, dtype=torch.float64)
    said = model(x)
    report = rmsnorm.to_rms(model, inputs=x)
    assert [fate.reason.partition(",")[0] for fate in report.left] == ["it has a hook"]
    seen.clear()
    assert torch.equal(model(x), said)
    assert seen == [None]


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_rotations_of_both_kinds(name: str) -> None:
    """24 is 8 times 3: a Hadamard matrix, and a random one of 3."""
    model = small.make(name).double()
    operated(model, "to_rms")
    operated(model, "fold", untie=True)
    said, before = small.truth(model), small.bits(model)
    for options in ({"kind": "random"}, {"kind": "hadamard", "seed": 3}):
        operated(model, "rotate", **options)
        assert small.apart(said, small.truth(model)) < BAR
        assert not small.same(before, small.bits(model))
    seeds = {bytes(rmsnorm.surgery.rotation.orthogonal(24, "random", seed).numpy()) for seed in (0, 0, 1)}
    assert len(seeds) == 2


def test_a_token_that_never_ran() -> None:
    """DINOv2's mask token is in no call without a mask, and is centred as the class token beside it."""
    model = small.make("dinov2").double()
    backbone, given = model.dinov2, small.inputs(model)
    torch.nn.init.normal_(backbone.embeddings.mask_token)  # it is zeros in a fresh model
    masked = {**given, "bool_masked_pos": torch.tensor([[True, False, False, True]] * 2)}
    with torch.no_grad():
        said = backbone(**masked).last_hidden_state
    report = rmsnorm.to_rms(model, inputs=given)
    assert report.notes == ["dinov2.embeddings.mask_token never ran, and was changed as the tokens beside it"]
    with torch.no_grad():
        after = backbone(**masked).last_hidden_state  # without the bias of the last norm, which is in the head
    shift = (said - after)[0, 0]
    assert (said - after - shift).abs().max() < BAR * said.abs().max()


def test_post_norm_is_refused() -> None:
    """BERT's norms are its stream: nothing changes, and each says why."""
    model = small.make("bert")
    before = small.bits(model)
    report = rmsnorm.to_rms(model, inputs=small.inputs(model))
    assert not report.done
    assert sum("(post-norm)" in fate.reason for fate in report.left) == 4
    assert report.summary().startswith(
        "to_rms: nothing was changed; bert.embeddings.LayerNorm: its bias can't be moved"
    )
    assert small.same(before, small.bits(model))


def test_gradients_after_to_rms() -> None:
    """f(θ) = f'(T(θ)), so the gradient of θ is Tᵀ times that of T(θ): on the first layer of GPT-2, in fp64."""
    model = small.make("gpt2").double()
    layer = model.transformer.h[0]
    gain, shift = layer.ln_1.weight, layer.ln_1.bias.detach().clone()
    reads, writes = layer.attn.c_attn, layer.attn.c_proj

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**small.inputs(model)).logits.square().mean().backward()
        wanted = {"gain": gain, "read": reads.weight, "read_bias": reads.bias}
        wanted |= {"write": writes.weight, "write_bias": writes.bias, "shift": getattr(layer.ln_1, "bias", None)}
        return {name: one.grad.clone() for name, one in wanted.items() if one is not None}

    theirs = gradients()
    weight = reads.weight.detach().clone()  # [in, out]
    assert operated(model, "to_rms") == 5
    ours = gradients()
    assert "shift" not in ours
    centred = {name: ours[name] - ours[name].mean(-1, keepdim=True) for name in ("write", "write_bias")}
    expected = {
        "gain": ours["gain"],
        "read": ours["read"] + torch.outer(shift, ours["read_bias"]),
        "read_bias": ours["read_bias"],
        "shift": weight @ ours["read_bias"],
        **centred,
    }
    assert expected.keys() == theirs.keys()
    for name, one in expected.items():
        assert (one - theirs[name]).abs().max() < 1e-12 * theirs[name].abs().max(), name


def test_a_folded_llama_is_a_llama(tmp_path) -> None:
    """transformers alone loads what it saved; its weights are ones; it writes the same 64 tokens in float32."""
    import transformers

    model = small.make("llama")
    ids = small.inputs(model)["input_ids"][:1]

    def written(one: Any) -> list[int]:
        mask = torch.ones_like(ids)
        return one.generate(ids, attention_mask=mask, do_sample=False, min_new_tokens=64, max_new_tokens=64)[0].tolist()

    before = written(model)
    report = rmsnorm.fold(model)
    assert (report.differences["float32"].same_tokens, report.differences["float32"].tokens) == (16, 16)
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(bool((one == 1).all()) for name, one in loaded.named_parameters() if "norm" in name)
    assert written(loaded) == before
