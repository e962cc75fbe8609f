"""Small random models of many families for surgery, what they are called with, and what they say in fp64."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 120
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_HEADS = {"num_attention_heads": 4, "intermediate_size": 40}
_GROUPS = {**_HEADS, "num_key_value_heads": 2}
_IMAGE = {**_HEADS, "hidden_size": 24, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}


def _text(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**{**_SIZES, **_ENDS, **options})
    )


def _gpt2() -> Any:
    sizes = {"n_positions": 200, "n_embd": 24, "n_layer": 2, "n_head": 4}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCABULARY, **_ENDS, **sizes))


def _whisper() -> Any:
    layers = {f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in _WHISPER.items()}
    sizes = {"max_source_positions": 10, "max_target_positions": 40, "num_mel_bins": 6, "d_model": 24}
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, decoder_start_token_id=1, begin_suppress_tokens=None, **sizes, **layers, **_ENDS
    )
    return transformers.WhisperForConditionalGeneration(config)


_WHISPER = {"layers": 2, "attention_heads": 4, "ffn_dim": 40}


def _clip() -> Any:
    text = {**_SIZES, **_HEADS, "max_position_embeddings": 32, "projection_dim": 16, "eos_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**_IMAGE, "projection_dim": 16}, projection_dim=16
    )
    return transformers.CLIPModel(config)


def _t5() -> Any:
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=VOCABULARY, **sizes, **ends))


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _text("Llama", **_GROUPS),
    "qwen3": _text("Qwen3", **_GROUPS, head_dim=6),
    "gemma": _text("Gemma", **_GROUPS, head_dim=6),
    "gemma2": _text("Gemma2", **_GROUPS, head_dim=6),
    "phi3": _text("Phi3", **_GROUPS),
    "granite": _text("Granite", **_GROUPS, residual_multiplier=0.7, embedding_multiplier=3.0),
    "mixtral": _text("Mixtral", **_GROUPS, num_local_experts=4, experts_implementation="eager"),
    "mamba2": _text("Mamba2", num_heads=8, head_dim=6, state_size=8, n_groups=2, chunk_size=16, expand=2),
    "t5": _t5,
    "gpt2": _gpt2,
    "opt": _text("OPT", num_attention_heads=4, ffn_dim=40, max_position_embeddings=200, word_embed_proj_dim=24),
    "neox": _text("GPTNeoX", **_HEADS),
    "phi": _text("Phi", **_HEADS, hidden_size=32),
    "stablelm": _text("StableLm", **_GROUPS),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**_IMAGE)),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**_IMAGE)),
    "whisper": _whisper,
    "clip": _clip,
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**_SIZES, **_HEADS)),
}


def make(name: str, eps: float | None = None) -> Any:
    """The model with random gains, biases and scales; eps is that of all norms, where one is given."""
    torch.manual_seed(0)
    return randomised(FAMILIES[name](), eps)


def randomised(model: nn.Module, eps: float | None = None) -> Any:
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if one.dim() < 2:
                one.copy_(0.5 * torch.randn(one.shape, generator=dice) + ("bias" not in name.rpartition(".")[2]))
            else:
                one.mul_(5.0)  # else nothing of a block is seen beside the embeddings
    for module in model.modules():
        for name in ("eps", "variance_epsilon", "layer_norm_epsilon"):
            if eps is not None and isinstance(getattr(module, name, None), float):
                setattr(module, name, eps)
    return model.eval()


def inputs(model: Any) -> dict[str, Tensor]:
    """What it is called with: not what surgery makes up itself."""
    dice = torch.Generator().manual_seed(2)
    ids = torch.randint(2, VOCABULARY, (2, 11), generator=dice)
    ids[:, -1] = 1  # CLIP looks for the end
    image = torch.randn(2, 3, 8, 8, generator=dice).to(model.dtype)
    sound = torch.randn(2, 6, 20, generator=dice).to(model.dtype)
    known = {
        "clip": {"input_ids": ids, "pixel_values": image},
        "whisper": {"input_features": sound, "decoder_input_ids": ids},
        "t5": {"input_ids": ids, "decoder_input_ids": ids.flip(1)},
    }
    kind = model.config.model_type
    return known.get(kind, {"pixel_values": image} if kind in ("vit", "dinov2") else {"input_ids": ids})


_WIDER = {name: getattr(Tensor, name) for name in ("float", "to")}


@contextmanager
def _nothing_narrower() -> Iterator[None]:
    """While it is open, a tensor in fp64 stays there: state space models and routers cast to float32."""

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.dtype is torch.float64 and torch.float32 in (*args, *kwargs.values()):
            return self
        return _WIDER["to"](self, *args, **kwargs)

    with mock.patch.object(Tensor, "to", to), mock.patch.object(Tensor, "float", lambda self: to(self, torch.float32)):
        yield


def _exact(norm: Any, x: Tensor, gate: Tensor | None = None) -> Tensor:
    """The norms of transformers, written out in the type of their input: their own forwards cast to float32."""
    if gate is not None:
        x = x * torch.nn.functional.silu(gate)
    eps = next(getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name))
    groups = x.unflatten(-1, (-1, getattr(norm, "group_size", x.shape[-1])))
    y = (groups / (groups.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)
    return y * (norm.weight + type(norm).__name__.startswith("Gemma"))


def truth(model: Any) -> dict[str, Tensor]:
    """All that a model in fp64 returns at the top, with nothing in it that rounds to less."""
    changed = []
    for module in model.modules():
        theirs = type(module).__module__.startswith("transformers") and "Norm" in type(module).__name__
        if theirs and hasattr(module, "weight") and not hasattr(module, "bias"):
            module.forward = types.MethodType(_exact, module)
            changed.append(module)
    try:
        with torch.no_grad(), _nothing_narrower():
            output = model(**inputs(model))
    finally:
        for module in changed:
            del module.forward
    found = {n: t for n, t in output.items() if isinstance(t, Tensor) and t.is_floating_point()}
    return {n: t for n, t in found.items() if not n.startswith("encoder_")}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two answers, relative to the largest element."""
    assert one.keys() == other.keys()
    assert one
    return max(float((one[n] - other[n]).abs().max() / one[n].abs().max()) for n in one)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
