"""Proves that the proof catches what can go wrong: operations broken on purpose fail in fp64, and the model stays."""

from __future__ import annotations

import re
from typing import Any

import pytest
import small
import torch
from torch import nn

import rmsnorm
from rmsnorm import surgery
from rmsnorm.surgery import edits, folding, norms, operations, proof, streams


def raises_and_stays(model: Any, operation: str, **options: Any) -> surgery.SurgeryReport:
    """The report of the failed proof."""
    before, modules = small.bits(model), list(model.modules())
    with pytest.raises(
        surgery.SurgeryError, match=r"in float64 the outputs differ by .*the model was left as it was"
    ) as e:
        getattr(rmsnorm, operation)(model, inputs=small.inputs(model), tokens=0, **options)
    assert small.same(before, small.bits(model))
    assert modules == list(model.modules())
    assert e.value.report.differences["float64"].worst > 1e-6
    return e.value.report


def without(monkeypatch: pytest.MonkeyPatch, forgotten: str) -> None:
    """Every step of plans is carried out but those of one weight."""
    compute = edits._compute

    def some(model: nn.Module, steps: list[Any], undo: list[Any]) -> None:
        left = [one for one in steps if not re.fullmatch(forgotten, one.weight)]
        assert len(left) < len(steps)
        compute(model, left, undo)

    monkeypatch.setattr(edits, "_compute", some)


@pytest.mark.parametrize(
    ("name", "operation", "forgotten"),
    [
        ("gpt2", "to_rms", r"transformer\.h\.1\.mlp\.c_proj\.weight"),  # a writer
        ("gpt2", "to_rms", r"transformer\.h\.0\.attn\.c_proj\.bias"),  # the bias of one
        ("gpt2", "to_rms", r"transformer\.wpe\.weight"),
        ("gpt2", "to_rms", r"lm_head\.bias"),  # where the bias of the last norm went
        ("vit", "to_rms", r"vit\.embeddings\.cls_token"),
        ("llama", "fold", r"model\.layers\.1\.self_attn\.k_proj\.weight"),  # a reader
        ("llama", "fold", r"model\.norm\.weight"),  # its gain is in the head, and in the norm
    ],
)
def test_a_forgotten_weight(monkeypatch, name: str, operation: str, forgotten: str) -> None:
    without(monkeypatch, forgotten)
    raises_and_stays(small.make(name), operation)


def test_a_forgotten_rotation(monkeypatch) -> None:
    model = small.make("llama")
    rmsnorm.fold(model, verify=False)
    without(monkeypatch, r"model\.layers\.0\.self_attn\.o_proj\.weight")
    raises_and_stays(model, "rotate")


def test_an_eps_that_is_not_carried(monkeypatch) -> None:
    """1e-5 is what theirs have, and 0 what takes its place: seen where rows are small."""
    monkeypatch.setattr(norms, "eps_value", lambda norm, dtype: 0.0)
    make = streams.Swap.__call__

    def forgets(self: Any, old: nn.Module) -> nn.Module:
        new = make(self, old)
        new.eps = 0.0  # type: ignore[assignment]
        return new

    monkeypatch.setattr(streams.Swap, "__call__", forgets)
    report = raises_and_stays(small.make("gpt2"), "to_rms")
    assert report.operation == "to_rms"


def test_a_tied_head_that_is_folded_twice(monkeypatch) -> None:
    """Once as the head, and once as the embeddings, which it is."""
    monkeypatch.setattr(folding, "_split", lambda *_: [])
    raises_and_stays(small.make("gpt2"), "fold")


def test_a_gain_that_is_read_wrongly(monkeypatch) -> None:
    """Gemma's is 1 + weight."""
    gain = norms.gain
    monkeypatch.setattr(
        norms, "gain", lambda model, norm: (found := gain(model, norm)) is not None and found - norm.offset
    )
    raises_and_stays(small.make("gemma"), "fold")


def test_what_fails_on_the_model_itself_is_taken_back(monkeypatch) -> None:
    """The proof on the copy holds; on the model one weight is lost."""
    model = small.make("llama")
    before = small.bits(model)
    carry_out = edits.carry_out

    def loses(one: nn.Module, plan: Any, *, keep: bool) -> int:
        kept = carry_out(one, plan, keep=keep)
        if one is model:
            with torch.no_grad():
                undo = edits._done[one][-1]
                tensor = one.model.layers[0].self_attn.q_proj.weight
                was = tensor.clone()
                undo.append(lambda: tensor.copy_(was))
                tensor.zero_()
        return kept

    monkeypatch.setattr(operations.edits, "carry_out", loses)
    with pytest.raises(surgery.SurgeryError, match="in float32 the outputs differ"):
        rmsnorm.fold(model)
    assert small.same(before, small.bits(model))
    rmsnorm.unfold(model)  # nothing is left to undo
    assert small.same(before, small.bits(model))


def test_the_report_of_a_proof() -> None:
    """What differs beside what the type itself costs, the text's loss, the tokens, eps, and bytes that are kept."""
    model = small.make("llama", eps=0.37)
    report = rmsnorm.fold(model, inputs=small.inputs(model))
    assert set(report.differences) == {"float64", "bfloat16", "float32"}
    exact, coarse, own = (report.differences[name] for name in ("float64", "bfloat16", "float32"))
    assert exact.worst < 1e-13 < own.worst < 1e-5 < coarse.worst < 0.2
    assert 0 < own.own["logits"] < 1e-5 < coarse.own["logits"] < 0.2
    assert abs(exact.loss) < 1e-13
    assert abs(own.loss) < 1e-5
    assert (own.same_tokens, own.tokens, exact.tokens) == (16, 16, None)
    names = {name for name, _ in model.named_parameters() if "embed" not in name and "down" not in name}
    assert report.kept == sum(model.get_parameter(name).nbytes for name in names if "o_proj" not in name)
    least = model.model.embed_tokens(small.inputs(model)["input_ids"]).square().mean(-1).min().item()
    shares = {fate.name: fate.eps_share for fate in report.done}
    assert shares["model.layers.0.input_layernorm"] == pytest.approx(0.37 / (least + 0.37))
    assert all(0.001 < share < 0.9999 for share in shares.values())
    plain = report.to_dict()
    assert plain["done"][0]["done"].startswith(
        "into model.layers.0.self_attn.q_proj.weight, model.layers.0.self_attn.k"
    )
    assert plain["differences"]["float64"]["outputs"].keys() == {"logits"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    text = str(report)
    assert "model.layers.*.input_layernorm" in text
    assert "16 of 16" in text
    assert report.summary() in text


def test_wide_casts_nothing_to_less() -> None:
    """In the proof a cast to float32 is one to float64; elsewhere it is what it was."""
    x = torch.full((3,), 1 + 1e-12, dtype=torch.float64)
    with proof.Wide():
        assert torch.equal(x.float().double(), x)
        assert torch.softmax(x, -1, dtype=torch.float32).dtype is torch.float64
    assert not torch.equal(x.float().double(), x)


def test_experts_in_float64() -> None:
    """What stands in for torch's grouped product gives what a loop gives, rows of no expert included."""
    rows, weights = torch.randn(7, 4, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    found = proof._grouped(rows, weights, torch.tensor([2, 2, 6]))
    expected = torch.cat([rows[:2] @ weights[0], rows[2:6] @ weights[2], torch.zeros(1, 5, dtype=torch.float64)])
    assert torch.equal(found, expected)


def test_a_report_on_a_narrow_screen(capsys) -> None:
    """Numbers aren't cut, names wrap, and brackets are no markup."""
    pytest.importorskip("rich")
    from rich.console import Console

    report = rmsnorm.fold(small.make("llama"), inputs=small.inputs(small.make("llama")), tokens=0)
    report.notes.append("[bold]")
    Console(width=70).print(report)
    shown = capsys.readouterr().out
    assert f"{report.differences['float64'].worst:.1e}" in shown
    assert "[bold]" in shown
    assert max(map(len, shown.splitlines())) <= 70
    assert "".join(report.summary().split()) in "".join(shown.split())
