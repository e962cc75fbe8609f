"""Proves that a half-precision model sees the same bits: against transformers' own classes and torch's function."""

import pytest
import torch
import torch.nn.functional as F
from oracle import HALVES, gains, sample
from torch import Tensor

import rmsnorm

# Both sides round once (torch, Gemma) or twice (Llama) from fp32; their fp32 values differ by a few 2^-24, so a
# result differs where that lies across a rounding boundary: about 1e-4 of the elements in bf16 (2^-16 units apart),
# 1e-3 in fp16 (2^-13), and then by one unit.
SHARE = {torch.bfloat16: 0.999, torch.float16: 0.997}
SHAPES = [(64, 576), (256, 64), (64, 4096)]


def compare(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype is theirs.dtype
    assert ours.shape == theirs.shape
    different = ours != theirs
    assert 1 - different.double().mean() >= SHARE[ours.dtype]
    # Neighbours of one sign have neighbouring bit patterns; Llama's second rounding may carry one unit into two.
    apart = (ours.view(torch.int16).int() - theirs.view(torch.int16).int()).abs()
    assert apart.max() <= 2
    assert (apart > 1).sum() <= 1e-5 * apart.numel() + 1


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch(target, dtype, shape):
    x, weight = sample(*shape, dtype), gains(shape[-1], dtype=dtype)
    compare(rmsnorm.rms_norm(x, shape[1:], weight, 1e-6), F.rms_norm(x, shape[1:], weight, 1e-6))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("path", "name", "options"),
    [
        ("llama", "LlamaRMSNorm", {"casting_mode": "llama"}),
        ("qwen3", "Qwen3RMSNorm", {"casting_mode": "llama"}),
        ("gemma", "GemmaRMSNorm", {"offset": 1.0}),
        ("olmo2", "Olmo2RMSNorm", {}),
    ],
)
def test_transformers(target, dtype, shape, path, name, options):
    transformers = pytest.importorskip("transformers")
    theirs = getattr(getattr(transformers.models, path), f"modeling_{path}").__dict__[name](shape[-1], eps=1e-6)
    theirs.weight.data = gains(shape[-1], dtype=dtype) - options.get("offset", 0.0)
    ours = rmsnorm.RMSNorm(shape[-1], eps=1e-6, **options)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    x = sample(*shape, dtype)
    with torch.no_grad():
        compare(ours(x), theirs(x))


def test_the_casting_mode_matters():
    """In the other mode a quarter of the elements differ, so that the tests above can fail."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.models.llama.modeling_llama.LlamaRMSNorm(576, eps=1e-6).bfloat16()
    theirs.weight.data = gains(576, dtype=torch.bfloat16)
    x = sample(64, 576, torch.bfloat16)
    different = rmsnorm.rms_norm(x, (576,), theirs.weight, 1e-6) != theirs(x)
    assert 0.15 < different.double().mean() < 0.4
