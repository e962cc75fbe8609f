"""Proves that attention is rewritten where its source norms and turns heads, with the bits of the lines that were;
what is not what was proven runs those lines.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import astuple

import pytest
import torch
from oracle import same_bits
from torch import Tensor, nn

import rmsnorm
from rmsnorm.bench import memory
from rmsnorm.forms import heads_ops
from rmsnorm.models import attention
from rmsnorm.models import turns as turns_of_models

transformers = pytest.importorskip("transformers")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 99,
}
MEANINGS = {
    "Qwen3": "q_norm, k_norm, rotary embedding",
    "Gemma3Text": "q_norm, k_norm, rotary embedding",
    "Llama": "rotary embedding",
    "Mistral": "rotary embedding",
    "Olmo2": "rotary embedding",
    "Glm4": "rotary embedding",  # pairs are neighbours, half of a head is turned
    "Cohere": "rotary embedding",  # the same in fp32
    "Ernie4_5": "rotary embedding",
    "Qwen3Moe": "q_norm, k_norm, rotary embedding",
}


def model_of(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, pad_token_id=0)
    cls = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    model = cls(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += torch.randn_like(parameter) / 4
    return model


IDS = torch.arange(22).view(2, 11)


@pytest.fixture
def turns(monkeypatch) -> list[str]:
    """Which of our functions attention calls."""
    called: list[str] = []
    for name in ("heads_rms_norm_rope", "rope"):
        ours = getattr(rmsnorm, name)
        monkeypatch.setattr(attention, name, lambda *a, f=ours, n=name, **k: called.append(n) or f(*a, **k))
    return called


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", MEANINGS)
def test_fused_with_the_same_bits(family: str, dtype: torch.dtype, turns: list[str]) -> None:
    """Those of the patched model: logits, what is generated, loss; gradients within rounding."""
    model = model_of(family, dtype)
    results = []
    for fuse in (False, True):
        report = rmsnorm.patch(model, fuse=fuse)
        turns.clear()
        with torch.no_grad():
            logits = model(IDS).logits
        loss = model(IDS, labels=IDS).loss
        model.zero_grad()
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        text = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
        results.append((logits, loss.detach(), text, gradients))
        if fuse:
            meanings = [e.meaning for e in report.fused if e.name.endswith("self_attn")]
            assert meanings == [MEANINGS[family]] * 2, report.skipped
            normed = "q_norm" in MEANINGS[family]
            assert set(turns) == {"heads_rms_norm_rope" if normed else "rope"}
        rmsnorm.unpatch(model)
    (logits, loss, text, gradients), (ours, our_loss, our_text, our_gradients) = results
    assert same_bits(logits, ours)
    assert same_bits(loss, our_loss)
    assert torch.equal(text, our_text)
    for one, other in zip(gradients, our_gradients, strict=True):
        error = (one.double() - other.double()).norm() / one.double().norm().clamp_min(1e-30)
        assert error <= 8 * torch.finfo(dtype).eps
    assert type(model.model.layers[0].self_attn).forward.__code__.co_filename.endswith(".py")  # unpatched


def test_copies(turns: list[str]) -> None:
    model = model_of("Qwen3")
    rmsnorm.patch(model, fuse=True)
    with torch.no_grad():
        wanted = model(IDS).logits
        turns.clear()
        assert same_bits(copy.deepcopy(model)(IDS).logits, wanted)
    assert turns == ["heads_rms_norm_rope"] * 2


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
def test_compiled_whole(family: str) -> None:
    """One graph, with one node for query and key of a layer, and the bits of eager mode."""
    model, nodes = model_of(family), []
    rmsnorm.patch(model, fuse=True)

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        eager = model(IDS, use_cache=False).logits
        torch.compiler.reset()
        compiled = torch.compile(model, backend=backend, fullgraph=True)(IDS, use_cache=False).logits
    assert same_bits(compiled, eager)
    name = "heads_rms_norm_rope" if family == "Qwen3" else "rope"
    assert nodes.count(f"rmsnorm.{name}.default") == 2


def test_what_was_not_proven_runs_as_it_was(turns: list[str], monkeypatch) -> None:
    """A hook on a norm, norms of two meanings, unpatched norms, another function behind the name, autocast."""
    model = model_of("Qwen3")
    with torch.no_grad():
        plain = model(IDS).logits
        rmsnorm.patch(model, fuse=True)
        first = model.model.layers[0].self_attn

        def run() -> tuple[Tensor, list[str]]:
            turns.clear()
            return model(IDS).logits, list(turns)

        heard: list[str] = []
        handles = [
            getattr(first, name).register_forward_hook(lambda *_, name=name: heard.append(name))
            for name in ("q_norm", "k_proj", "v_proj")
        ]
        logits, called = run()
        assert (heard, called) == (["k_proj", "v_proj", "q_norm"], ["rope", "heads_rms_norm_rope"])
        torch.testing.assert_close(logits, plain)
        for handle in handles:
            handle.remove()
        first.q_norm.variance_epsilon = 1e-2
        assert run()[1] == ["rope", "heads_rms_norm_rope"]
        first.q_norm.variance_epsilon = first.k_norm.variance_epsilon
        rmsnorm.unpatch(first.k_norm)
        logits, called = run()
        assert called == ["rope", "heads_rms_norm_rope"]
        torch.testing.assert_close(logits, plain)
        module = transformers.models.qwen3.modeling_qwen3
        theirs = module.apply_rotary_pos_emb
        monkeypatch.setattr(module, "apply_rotary_pos_emb", functools.partial(theirs))
        logits, called = run()
        assert called == []
        torch.testing.assert_close(logits, plain)


class Rotated(nn.Module):
    """Attention's beginning, with a function that turns the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(8), nn.RMSNorm(8)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        q = self.q_norm(x)
        k = self.k_norm(x * 2)
        cos, sin = angles
        q, k = backwards_rotary(q, k, cos, sin)
        return q + k


def backwards_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return heads_ops.rope(q, k, cos, -sin, False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Rotated()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, (x[:, 0], x[:, 1]))


def test_a_function_that_turns_otherwise_is_left_alone() -> None:
    model, x = Model(), torch.randn(1, 2, 3, 8)
    report = rmsnorm.patch(model, fuse={"x": x})
    (entry,) = (e for e in report.skipped if e.name == "attention")
    assert entry.reason == "rotary embedding not fused: backwards_rotary computes something else"


def written(interleaved: bool, halves: bool, wide: bool, partial: bool):
    """A rotary embedding as models write it, from the formula."""

    def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        cos, sin = (
            t[..., : t.shape[-1] // 2].repeat_interleave(2, -1)[:, None] if halves else t[:, None] for t in (cos, sin)
        )
        out = []
        for x in (q, k):
            turned = cos.shape[-1] if partial else x.shape[-1]
            part, rest = x[..., :turned], x[..., turned:]
            part = part.float() if wide and part.element_size() == 2 else part
            if interleaved:
                other = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
            else:
                other = torch.cat((-part[..., turned // 2 :], part[..., : turned // 2]), -1)
            out.append(torch.cat(((part * cos + other * sin).to(x.dtype), rest), -1))
        return tuple(out)

    return apply_rotary


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("way", turns_of_models.TURNS, ids=str)
def test_each_way_to_write_it_is_told(way: turns_of_models.Turn, partial: bool) -> None:
    found = turns_of_models.turn_of(written(way.interleaved, way.halves, way.wide, partial))
    assert found is not None
    assert (found.interleaved, found.halves, found.wide, found.partial) == (*astuple(way)[:3], partial)
    x = torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16)
    assert found.takes(x[..., :8], x) is partial
    assert found.takes(x.float(), x) is found.mixed
    assert found.mixed is True  # to(x.dtype) says so


def test_tables_in_another_type_are_their_functions_own() -> None:
    """Llama's lines make fp32 of half types beside fp32 tables: ours would round."""
    found = turns_of_models.turn_of(transformers.models.llama.modeling_llama.apply_rotary_pos_emb)
    assert found == turns_of_models.Turn(False, False, False)


def test_a_model_on_the_meta_device_spoils_nothing() -> None:
    """A function was tried under a caller's `torch.device("meta")`, failed, and was never tried again; and torch knows
    no autocast of that device."""
    turns_of_models.turn_of.cache_clear()
    with torch.device("meta"):
        empty = model_of("Llama")
        report = rmsnorm.patch(empty, fuse=True)
        assert not any("autocast" in e.reason or "something else" in e.reason for e in report.skipped), report
        assert empty(IDS.to("meta")).logits.is_meta
    assert len(rmsnorm.patch(model_of("Llama"), fuse=True).fused) == 4


def test_adds_alone_have_their_old_name() -> None:
    report = rmsnorm.patch(model_of("Llama"), fuse_add=True)
    assert report.fused
    assert not any("rotary" in entry.meaning for entry in report.fused)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3Text", "Glm4"])
def test_keeps_no_more(family, rstd_is_kept):
    """Queries lie as the lines' do: attention's output then goes into the next projection as it is, and not as a copy
    that is kept, too. The heads' norms, in turn, keep less than theirs, where those of more than a few rows do."""
    kept = {}
    for fuse in ("fuse_add", "fuse"):
        model = model_of(family)
        rmsnorm.patch(model, **{fuse: {"input_ids": IDS}})
        kept[fuse] = sum(size for size, _ in memory.kept(lambda m=model: m(IDS).logits.sum(), model.parameters()))
    assert kept["fuse"] <= kept["fuse_add"]
