"""Proves what surgery leaves alone, with its reason; what it follows; and what it says to wrong arguments."""

from __future__ import annotations

from typing import Any

import pytest
import small
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import rmsnorm
from rmsnorm import surgery


def only(model: nn.Module, operation: str = "fold", x: Tensor | None = None, **options: Any) -> Any:
    """What becomes of the only norm of a model that takes rows of 8."""
    report = getattr(rmsnorm, operation)(model, inputs=torch.randn(3, 8) if x is None else x, **options)
    (fate,) = [*report.done, *report.left]
    return fate


class Block(nn.Module):
    """A norm, and what a test does with its output."""

    def __init__(self, use: Any, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm or nn.RMSNorm(8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.use = use
        small.randomised(self)

    def forward(self, x: Tensor) -> Any:
        return self.use(self, self.norm(x))


LEFT = {
    "goes into an addition": lambda block, y: block.first(y) + y,
    "goes into a multiplication": lambda block, y: block.first(y * y),
    "goes into sigmoid": lambda block, y: block.first(y) * y.sigmoid(),
    "is what the model returns as 0": lambda block, y: (y, block.first(y)),
    "goes into no linear layer": lambda block, y: block.first(torch.ones_like(y)),
    "is multiplied with something else than a weight": lambda block, y: block.first(y) + y @ y.mT @ torch.ones(3, 8),
    "is averaged over its channels": lambda block, y: block.first(y) + y.mean(-1, keepdim=True),
    "is not one row of channels": lambda block, y: linear(y.mT, torch.ones(3, 3)).mT + block.first(y),
    "is read by a part of": lambda block, y: linear(y[:, :4], block.first.weight[:, :4]),
    "is multiplied with what is computed": lambda block, y: linear(y, block.first.weight * 2),
    "meets what index has rearranged": lambda block, y: linear(y, block.first.weight[:, torch.arange(8).flip(0)]),
}


@pytest.mark.parametrize("reason", LEFT)
def test_who_else_reads_a_norm(reason: str) -> None:
    block = Block(LEFT[reason])
    before = small.bits(block)
    fate = only(block)
    assert f"its output {reason}" in fate.reason
    assert small.same(before, small.bits(block))


FOLLOWED = {
    "two layers": lambda block, y: block.second(y) + block.first(y),
    "rows": lambda block, y: block.first(y[[0, 2]].unsqueeze(0).expand(2, 2, 8).transpose(0, 1)),
    "channels": lambda block, y: block.first(y[:, torch.tensor([3, 1, 2, 0, 4, 7, 6, 5])]),
    "a cast": lambda block, y: block.first(y.double().float()),
    "rows of a weight": lambda block, y: linear(y, block.second.weight[2:5]),
    "a mean over rows": lambda block, y: y.mean(0, keepdim=True) @ block.second.weight.T,
    "a mean over all rows": lambda block, y: y.view(1, 3, 8).mean((0, 1)) @ block.second.weight.T,
    "einsum": lambda block, y: torch.einsum("rc,oc->ro", y, block.second.weight),
    "a number": lambda block, y: block.first(0.5 * y) / 3,
    "numbers of rows": lambda block, y: block.first(y * torch.tensor([[1.0], [2.0], [3.0]])),
    "a chunk": lambda block, y: torch.cat([block.first(one) for one in torch.cat([y, y]).chunk(2)]),
}


@pytest.mark.parametrize("way", FOLLOWED)
def test_what_a_shadow_follows(way: str) -> None:
    """The proof in fp64 holds for each (fold would raise)."""
    fate = only(Block(FOLLOWED[way]))
    assert fate.done.startswith("into ")


def test_columns_that_meet_a_norm_twice() -> None:
    """DINOv2's head reads the class token and the mean of the others side by side: 16 columns for 8 channels."""
    block = Block(lambda block, y: block.wide(torch.cat([y[0], y.mean(0)], -1)), nn.LayerNorm(8))
    block.wide = small.randomised(nn.Linear(16, 3))
    assert only(block).done == "into wide.weight"


def test_a_layer_norms_bias() -> None:
    """Makes a bias where a linear layer has none; a scaled output or a bare weight has nowhere to put it."""
    block = Block(lambda block, y: block.second(y), nn.LayerNorm(8))
    assert only(block).done == "into second.weight; second got a bias"
    assert block.second.bias is not None
    rmsnorm.unfold(block)
    assert block.second.bias is None
    fate = only(Block(lambda block, y: block.first(2 * y), nn.LayerNorm(8)))
    assert "its bias isn't what arrives there" in fate.reason
    block = Block(lambda block, y: y @ block.free, nn.LayerNorm(8))
    block.free = nn.Parameter(torch.randn(8, 8))
    del block.first, block.second
    assert only(block).reason == "its bias has nowhere to go: free has no bias, and Block can't hold one"


def test_weights_that_others_read() -> None:
    """A weight that two norms read, or a norm and something else; a norm that is called twice isn't two."""
    block = Block(lambda block, y: block.first(y) + block.first(torch.ones(3, 8)))
    assert only(block).reason == "first.weight is read by first, too"
    block = Block(lambda block, y: block.first(block.other(block.first(y))))
    block.other = small.randomised(nn.RMSNorm(8))
    report = rmsnorm.fold(block, inputs=torch.randn(3, 8))
    assert [fate.reason for fate in report.left] == ["first.weight is read by first, too"] * 2
    block = Block(lambda block, y: block.first(block.norm(block.first(y))))
    assert only(block).done == "into first.weight"


def test_experts_that_no_row_chose() -> None:
    """Of a list of experts one never ran: nobody knows that it would read the norm. Inputs that reach it are taken."""

    class Routed(Block):
        def __init__(self) -> None:
            super().__init__(None)
            self.experts = nn.ModuleDict({"one": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
            self.router = nn.Linear(8, 2)

        def forward(self, x: Tensor, name: str = "one") -> Tensor:
            y = self.norm(x)
            return self.router(y).softmax(-1)[:, :1] * self.experts[name](y)

    model, x = small.randomised(Routed()), torch.randn(3, 8)
    del model.first, model.second
    fate = only(model)
    assert fate.reason == (
        "experts.other.weight never ran on these inputs, and may be one of several; give inputs= that reach it"
    )
    report = rmsnorm.fold(model, inputs=[{"x": x}, {"x": x, "name": "other"}])
    assert report.done[0].done == "into router.weight, experts.one.weight, experts.other.weight"
    assert report.unused == []


def test_quantised_linear_layers_are_left() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    block = Block(lambda block, y: block.first(y) + block.second(y))
    torchao.quantize_(block, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "second")
    fate = only(block)
    assert "its output" in fate.reason
    assert "second" in fate.reason


def test_adapters_fold_and_are_centred() -> None:
    """LoRA's first factor reads the norm as the layer does, and its second writes as the layer does."""
    peft = pytest.importorskip("peft")
    model = small.make("gpt2")
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    given = small.inputs(model)
    report = rmsnorm.to_rms(model, inputs=given, tokens=0)
    assert len(report.done) == 5
    report = rmsnorm.fold(model, inputs=given, tokens=0)
    into = report.done[0].done
    assert "c_attn.base_layer.weight" in into
    assert "c_attn.lora_A.default.weight" in into


@pytest.mark.parametrize("operation", ["fold", "to_rms"])
def test_torchs_own_transformer(operation: str) -> None:
    """Its attention is one function: in_proj_weight reads the norm, out_proj writes."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True, dropout=0.0)
    head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 5))
    model = small.randomised(nn.Sequential(nn.Linear(4, 8), layer, head))
    report = getattr(rmsnorm, operation)(model, inputs=torch.randn(2, 3, 4))
    assert len(report.done) == 3
    assert "1.self_attn.in_proj_weight" in report.done[0].done


def test_a_head_that_cannot_be_untied() -> None:
    """Switch Transformers divides by √n where the configuration says that the head is tied."""
    import transformers

    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4}
    config = transformers.SwitchTransformersConfig(
        vocab_size=small.VOCABULARY, decoder_start_token_id=0, num_sparse_encoder_layers=0, **sizes
    )
    model = small.randomised(transformers.SwitchTransformersForConditionalGeneration(config))
    ids = torch.arange(2, 13)[None]
    report = rmsnorm.fold(model, untie=True, inputs={"input_ids": ids, "decoder_input_ids": ids}, tokens=0)
    assert "untie" in next(fate.reason for fate in report.left if fate.name == "decoder.final_layer_norm")
    assert report.notes[0].startswith("nothing was untied: this model computes something else")
    assert model.config.tie_word_embeddings


def test_a_linear_layer_with_a_forward_of_its_own() -> None:
    """Falcon's adds a bias in a line of its own; another forgets to."""

    class Adds(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.weight.T
            return y if self.bias is None else y + self.bias

    class Forgets(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    for cls, done in ((Adds, "into 1.weight; 1 got a bias"), (Forgets, "")):
        model = small.randomised(nn.Sequential(nn.LayerNorm(8), cls(8, 4, bias=False)))
        assert only(model).done == done
        assert (model[1].bias is None) == (not done)


def test_arguments() -> None:
    for operation in (rmsnorm.fold, rmsnorm.to_rms, rmsnorm.rotate, rmsnorm.unfold):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, but is a str;"):
            operation("smollm2")  # type: ignore[arg-type]
    model = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"fold: this model is none of transformers, .*give inputs="):
        rmsnorm.fold(model)
    model.config = {"mine": 1}  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"fold: this model is none of transformers, .*give inputs="):
        rmsnorm.fold(model)
    with pytest.raises(ValueError, match="rotate: unknown kind"):
        rmsnorm.rotate(model, kind="hadamar", inputs=torch.randn(3, 8))
    report = rmsnorm.fold(nn.Linear(8, 8), inputs=torch.randn(3, 8))
    assert str(report) == "fold: this model has no norm."


def test_nothing_kept_cannot_be_undone() -> None:
    model = small.randomised(nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 4)))
    assert rmsnorm.fold(model, inputs=torch.randn(3, 8), keep=False).kept == 0
    with pytest.raises(ValueError, match="keep=False, so nothing of it was kept"):
        rmsnorm.unfold(model)
    rmsnorm.unfold(nn.Linear(2, 2))  # never changed


def test_a_weight_that_outgrows_its_type() -> None:
    """float16 ends at 65504."""
    model = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 4)).half()
    with torch.no_grad():
        model[0].weight.fill_(1000.0)
        model[1].weight.fill_(100.0)
    before = small.bits(model)
    with pytest.raises(OverflowError, match=r"1.weight would outgrow torch.float16"):
        rmsnorm.fold(model, inputs=torch.randn(3, 8).half(), verify=False)
    assert small.same(before, small.bits(model))


def test_a_patched_model_folds(recwarn) -> None:
    """Its norms are known already."""
    model = small.make("llama")
    rmsnorm.patch(model)
    report = rmsnorm.fold(model, inputs=small.inputs(model))
    assert len(report.done) == 5
    assert surgery.SurgeryReport.to_dict(report)["operation"] == "fold"


class _Shares(nn.Module):
    """Two norms with one gain and one bias, of which the model may read the gain, too."""

    def __init__(self, first: nn.Module, second: nn.Module, *, last: bool = False, read: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.up, self.down = first, second, nn.Linear(8, 8), nn.Linear(8, 8)
        second.weight = first.weight
        if getattr(first, "bias", None) is not None:
            second.bias = first.bias
        self.last, self.read = last, read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.up(self.a(x))
        y = self.b(y) if self.last else y + self.down(self.b(y))
        return y * self.a.weight if self.read else y


SHARES = {
    "one stays": (lambda: _Shares(nn.RMSNorm(8), nn.RMSNorm(8), last=True), "its weight is that of b, too"),
    "one stays, LayerNorm": (lambda: _Shares(nn.LayerNorm(8), nn.LayerNorm(8), last=True), "its weight is that of b"),
    "read by the model": (lambda: _Shares(nn.RMSNorm(8), nn.RMSNorm(8), read=True), "its weight is read by the model"),
    "another offset": (lambda: _Shares(rmsnorm.RMSNorm(8, offset=1.0), nn.RMSNorm(8)), "its weight is that of b, too"),
    "both are folded": (lambda: _Shares(nn.RMSNorm(8), nn.RMSNorm(8)), ""),
    "both are folded, LayerNorm": (lambda: _Shares(nn.LayerNorm(8), nn.LayerNorm(8)), ""),
}


@pytest.mark.parametrize("operation", [rmsnorm.fold, rmsnorm.to_rms])
@pytest.mark.parametrize("name", SHARES)
def test_what_norms_share_is_lost_by_all_or_none(name, operation) -> None:
    """Without a proof, too; the model in float64 says what it said, and weights of norms that stay are untouched."""
    make, reason = SHARES[name]
    model, x = small.randomised(make()).double(), torch.randn(5, 8, dtype=torch.float64)
    said, before = model(x), small.bits(model)
    report = operation(model, inputs=x, verify=False)
    torch.testing.assert_close(model(x), said, rtol=1e-12, atol=1e-12)
    if operation is rmsnorm.fold:
        assert len(report.done) == (0 if reason else 2), report
        assert reason in report.left[0].reason if reason else True
        assert not reason or small.same(before, small.bits(model))
