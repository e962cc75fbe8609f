"""Proves the road through the ``kernels`` package: transformers' models take our norms up by name, each with its own
meaning, in inference and in training, eager and compiled, and give them back.
"""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from oracle import HALVES, gains

import rmsnorm
from rmsnorm import hub

kernels = pytest.importorskip("kernels")
transformers = pytest.importorskip("transformers")
if not transformers.utils.is_kernels_available():
    pytest.skip(f"transformers {transformers.__version__} wants another kernels", allow_module_level=True)

SMALL = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "rms_norm_eps": 1e-3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
# fmt: off
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
}
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}
# fmt: on
# A model: its configuration, and how many of its norms carry which name.
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL | HEADS, {"RMSNorm": 5}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", SMALL | HEADS, {"RMSNorm": 9}),
    "qwen3_next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", SMALL | HEADS | LINEAR | EXPERTS, {"RMSNormGated": 1}),
    "qwen3_5": (
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        SMALL | HEADS | LINEAR,
        {"RMSNormZeroCentered": 7, "RMSNormGated": 1},
    ),
}


@pytest.fixture(autouse=True)
def _registered():
    hub.register()
    yield
    hub.unregister()


def build(family: str, dtype: torch.dtype) -> torch.nn.Module:
    model, config, options, _ = MODELS[family]
    torch.manual_seed(0)
    model = getattr(transformers, model)(getattr(transformers, config)(**options)).to(dtype).eval()
    for i, norm in enumerate(norms(model)):
        norm.weight.data = gains(*norm.weight.shape, dtype=dtype, seed=i)
    return model


def norms(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for m in model.modules() if getattr(type(m), "kernel_layer_name", "") in hub.mapping()]


def taken(model: torch.nn.Module) -> dict[str, int]:
    """How many norms of each name run our forward."""
    counts: dict[str, int] = {}
    for norm in norms(model):
        name = type(norm).kernel_layer_name
        ours = (
            getattr(norm.forward, "__func__", None) is hub.mapping()[name]["cpu"][kernels.Mode.TRAINING].load().forward
        )
        counts[name] = counts.get(name, 0) + ours
    return counts


IDS = torch.arange(24).mul(7).remainder(97).view(2, 12)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("family", MODELS)
def test_models_take_it_up(family, dtype):
    """``use_kernels``: every norm of a name runs our forward, on its real inputs equal to the class's own. Half types:
    the same bits but for one element in a thousand, where torch's fp32 arithmetic and ours lie on two sides of a
    rounding boundary; float32: within 6 eps (torch's own error is 4)."""
    model = build(family, dtype)
    before = model(IDS).logits
    model.use_kernels = True
    assert taken(model) == MODELS[family][3]

    seen = []
    for norm in norms(model):
        norm.register_forward_hook(lambda m, args, output: seen.append((type(m).forward(m, *args), output)))
    with torch.no_grad():
        after = model(IDS).logits
    assert len(seen) == len(norms(model))
    for theirs, ours in seen:
        assert ours.dtype is theirs.dtype
        if dtype is torch.float32:
            torch.testing.assert_close(ours, theirs, rtol=6 * torch.finfo(dtype).eps, atol=1e-30)
        else:
            assert (ours != theirs).sum() <= 1 + 1e-3 * ours.numel()
            torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(
        after, before, rtol=0.05 if dtype in HALVES else 1e-4, atol=0.02 if dtype in HALVES else 1e-5
    )


@pytest.mark.parametrize("family", MODELS)
def test_training(family):
    """``train()`` kernelizes again, for training; gradients of all parameters are those of the original model."""
    gradients = []
    for use in (False, True):
        model = build(family, torch.float32)
        if use:
            model.use_kernels = True
        model.train()
        assert not use or taken(model) == MODELS[family][3]
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item(), msg=name
        )


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, about itself
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_compiled():
    """One graph with our operator in it, for each mode; the results are those of eager mode."""
    for family in ("llama", "olmo2"):
        for kind in (kernels.Mode.INFERENCE, kernels.Mode.TRAINING):
            torch.compiler.reset()
            hub._examined.cache_clear()  # so that the class is met under the compiler
            model = build(family, torch.bfloat16)
            kernels.kernelize(model, mode=kind | kernels.Mode.TORCH_COMPILE, device="cpu")
            assert taken(model) == MODELS[family][3]
            norm, x = norms(model)[0], gains(3, 64, dtype=torch.bfloat16)
            assert torch.equal(torch.compile(norm, fullgraph=True, backend="aot_eager")(x), norm(x))
    logits = torch.compile(model, backend="aot_eager")(IDS).logits
    torch.testing.assert_close(logits, model(IDS).logits)
    torch.compiler.reset()


def test_generation_and_back():
    """The same text; ``unregister()`` and another kernelize give the original forwards back."""
    model = build("llama", torch.float32)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    before = model.generate(IDS[:1], **options)
    model.use_kernels = True
    assert torch.equal(model.generate(IDS[:1], **options), before)
    hub.unregister()
    model.set_use_kernels(True)  # the property does nothing a second time
    assert taken(model) == {"RMSNorm": 0}
    for norm in norms(model):
        assert norm.forward.__func__ is type(norm).forward


@pytest.mark.parametrize(
    ("path", "name", "meaning"),
    [
        ("llama", "LlamaRMSNorm", "round, then weight"),
        ("deepseek_v4", "DeepseekV4RMSNorm", "weight, then round"),
        ("gpt_oss", "GptOssRMSNorm", "weight, then round"),
        ("nemotron_h", "NemotronHRMSNorm", "weight, then round"),
        ("qwen3_5", "Qwen3_5RMSNorm", "1 + weight"),
        ("qwen3_next", "Qwen3NextRMSNormGated", "norm, round, weight, gate"),
        ("kimi_linear", "KimiLinearRMSNormGated", "norm, sigmoid gate"),
    ],
)
def test_meanings(path, name, meaning):
    """One class of each source that transformers has under these names."""
    cls = getattr(importlib.import_module(f"transformers.models.{path}.modeling_{path}"), name)
    binding = hub._BINDINGS[hub._meaning(cls, getattr(cls(8), "activation", None))]
    assert binding.recipe.meaning == meaning
    assert binding.complete()


def test_a_stranger_keeps_its_forward():
    """Another formula under one of the names, or an activation that we don't have: left alone, and said so once."""

    @kernels.use_kernel_forward_from_hub("RMSNorm")
    class Outside(torch.nn.Module):
        def __init__(self, n, eps=1e-6):
            super().__init__()
            self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(n)), eps

        def forward(self, x):  # eps outside of the root
            return self.weight * (x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon))

    gated = importlib.import_module("transformers.models.qwen4_exp.modeling_qwen4_exp").Qwen4ExpTextRMSNormGated
    x = gains(3, 8).float()
    for module, inputs in ((Outside(8, 0.5), (x,)), (gated(8, activation="gelu"), (x, x))):
        wanted = module(*inputs)
        kernels.kernelize(module, mode=kernels.Mode.INFERENCE, device="cpu")
        assert taken(module) == {type(module).kernel_layer_name: 1}
        with pytest.warns(
            UserWarning, match=rf"{type(module).__name__} keeps its own forward: no recipe reproduces it"
        ):
            assert torch.equal(module(*inputs), wanted)
        assert torch.equal(module(*inputs), wanted)
    module = gated(8, activation="silu")
    kernels.kernelize(module, mode=kernels.Mode.INFERENCE, device="cpu")
    torch.testing.assert_close(module(x, x), gated.forward(module, x, x))


def test_a_class_without_a_name(monkeypatch):
    """docs/hub.md: Gemma's class is given one."""
    cls = transformers.models.gemma.modeling_gemma.GemmaRMSNorm
    for attribute in ("kernel_layer_name", "kernel_condition"):
        monkeypatch.setattr(cls, attribute, None, raising=False)  # taken back afterwards
    kernels.replace_kernel_forward_from_hub(cls, "RMSNormZeroCentered")
    module, x = cls(8), gains(3, 8, dtype=torch.bfloat16)
    wanted = module(x)
    kernels.kernelize(module, mode=kernels.Mode.TRAINING, device="cpu")
    assert taken(module) == {"RMSNormZeroCentered": 1}
    assert torch.equal(module(x), wanted)


def test_monkey_patching():
    """docs/hub.md: another class at construction, with the same parameters and the same results."""
    patching = importlib.import_module("transformers.monkey_patching")

    class RoundFirstRMSNorm(rmsnorm.RMSNorm):
        def __init__(self, hidden_size, eps=1e-6):
            super().__init__(hidden_size, eps, casting_mode="llama")

    original = build("llama", torch.bfloat16)
    patching.register_patch_mapping({"LlamaRMSNorm": RoundFirstRMSNorm})
    try:
        with patching.apply_patches():
            model = build("llama", torch.bfloat16)
    finally:
        patching.unregister_patch_mapping(["LlamaRMSNorm"])
    assert sum(isinstance(m, RoundFirstRMSNorm) for m in model.modules()) == 5
    model.load_state_dict(original.state_dict())
    torch.testing.assert_close(model(IDS).logits, original(IDS).logits, rtol=0.05, atol=0.02)


def test_missing_package(monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "kernels", None)
        for call in (hub.register, hub.unregister, hub.mapping):
            with pytest.raises(ImportError, match=r"rmsnorm\.hub needs the package kernels, .*: pip install .kernels"):
                call()
