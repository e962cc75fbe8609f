"""Proves that a report says what is: how many lines of which kind were fused, in which types a norm runs on ours, and
that a model without RMS norms may have something fused.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import transformers
from layers import Layer, Model
from torch import Tensor, nn

import rmsnorm
from rmsnorm.models.report import Entry, PatchReport


class TwoAdds(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x)
        y = self.input_layernorm(x)
        x = x + self.mlp(y)
        y = self.post_attention_layernorm(x)
        return x + y


class Modulated(nn.Module):
    """A block of DiT's: two norms that are modulated, two gated adds, of which one stands before a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(16, 1e-6, elementwise_affine=False) for _ in range(2))
        self.mixer, self.mlp = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        scale = shift = gate = torch.ones_like(x[:, :1]) / 2
        y = self.norm1(x) * (1 + scale) + shift
        x = x + gate * self.mixer(y)
        y = self.norm2(x) * (1 + scale) + shift
        x = x + gate * self.mlp(y)
        return x  # noqa: RET504 - the line is the pattern


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def half(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + half(q) * sin, k * cos + half(k) * sin


class Turning(nn.Module):
    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = apply_rotary(q, k, cos, sin)
        return q + k


HEADS = {"q": torch.randn(1, 2, 3, 8), "k": torch.randn(1, 2, 3, 8)}
ANGLES = {"cos": torch.randn(1, 3, 8), "sin": torch.randn(1, 3, 8)}
GATES = "; 2 gated products keep less for backward"


def llama(memory: str | None = None, **fuse: bool) -> PatchReport:
    torch.manual_seed(0)
    return rmsnorm.patch(tiny.MODELS["llama"](), memory=memory, **{name: dict(_ids()) for name in fuse})


def _ids() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(2, 26).view(2, 12)}


def gemma3() -> PatchReport:
    torch.manual_seed(0)
    return rmsnorm.patch(tiny.MODELS["gemma3"](), fuse=_ids())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: rmsnorm.patch(Model(Layer), fuse=True), "4 norms run on rmsnorm; 2 residual adds fused."),
        (lambda: rmsnorm.patch(Model(TwoAdds), fuse=True), "4 norms run on rmsnorm; 4 residual adds fused."),
        (
            lambda: rmsnorm.patch(Model(Modulated), fuse=True),
            "4 norms run on rmsnorm; 4 modulated norms, 4 gated adds fused.",
        ),
        (lambda: llama(fuse_add=True), "5 norms run on rmsnorm; 2 residual adds fused."),
        (lambda: llama(fuse=True), "5 norms run on rmsnorm; 2 residual adds, 2 rotary embeddings fused."),
        (gemma3, "13 norms run on rmsnorm; 4 residual adds, 2 rotary embeddings fused."),
        (
            lambda: llama(fuse=True, memory="lean"),
            "5 norms run on rmsnorm, 5 of them keep no input for backward; 2 residual adds, 2 rotary embeddings fused"
            f"{GATES}.",
        ),
        (lambda: rmsnorm.patch(Turning(), fuse=HEADS | ANGLES), "0 norms run on rmsnorm; 1 rotary embeddings fused."),
    ],
    ids=["adds", "two of a layer", "modulated", "llama, adds", "llama", "gemma3", "lean", "no norm"],
)
def test_what_was_fused_is_counted_by_its_kind(make, said: str) -> None:
    report = make()
    assert report.summary() == said, report
    assert str(report).endswith(said)


class Some(nn.Module):
    """A norm that takes some types alone; others are an error."""

    def __init__(self, inputs: set[torch.dtype], weights: set[torch.dtype]) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6
        self.inputs, self.weights = tuple(map(str, inputs)), tuple(map(str, weights))

    def forward(self, x: Tensor) -> Tensor:
        if str(x.dtype) not in self.inputs or str(self.weight.dtype) not in self.weights:
            raise TypeError
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


ALL = {torch.float32, torch.bfloat16, torch.float16}


@pytest.mark.parametrize(
    ("inputs", "weights", "said"),
    [
        (ALL, ALL, ""),
        ({torch.float32}, ALL, " (in float32 only)"),
        (ALL - {torch.float16}, ALL, " (in bfloat16 and float32 only)"),
        (ALL - {torch.bfloat16}, ALL, " (in float16 and float32 only)"),
        (ALL - {torch.float16}, {torch.float32}, " (in bfloat16 × float32 and float32 only)"),
    ],
)
def test_the_types_of_a_norm(inputs: set[torch.dtype], weights: set[torch.dtype], said: str) -> None:
    report = rmsnorm.patch(Some(inputs, weights))
    assert report.rows()[0][-1] == f"patched: round, then weight{said}"


def test_types_of_a_norm_that_float32_is_not_among() -> None:
    report = PatchReport([Entry("norm", "Norm", "no weight", types=("bfloat16", "float16"))])
    assert report.rows()[0][-1] == "patched: no weight (in bfloat16 and float16 only)"


def test_the_command_compares_what_has_no_rms_norm_but_is_fused(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    from commands import FAST, invoke

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.GPTNeoXConfig(vocab_size=256, bos_token_id=0, eos_token_id=0, **sizes)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    result = invoke(tmp_path, "--fuse", *FAST)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "0 norms run on rmsnorm; 2 rotary embeddings fused; 5 left as they are." in result.stdout
    assert "logits: differ by at most 0.0e+00" in result.stdout
    assert "Nothing was patched" not in result.stdout


def test_the_command_counts_norms_alone() -> None:
    screen = pytest.importorskip("rmsnorm.models.screen")
    turning = Entry("attention", "Attention", reason="rotary embedding not fused: its output changes")
    norm = Entry("norm", "LayerNorm", reason="it is a LayerNorm; patch(model, layer_norm=True) takes it")
    assert screen.nothing(PatchReport(skipped=[turning]), 0) == "Nothing was patched: this model has no norm."
    assert "none of its 1 norms is" in screen.nothing(PatchReport(skipped=[norm, turning]), 0)
