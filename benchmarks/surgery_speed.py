"""Times models whose norms take turns, after benchmarks/surgery.py has folded or centred them: as they were, ours, ours
without weights.

It is one model each time, so what is compared are the norms alone. After a fold gains are 1, and on a centred stream a
LayerNorm says what an RMSNorm does: all arms compute the same, which is looked at first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import surgery_whisper
import torch
from torch import Tensor, nn

import rmsnorm
from rmsnorm.bench.pages import table
from rmsnorm.bench.timing import Timing, measure
from rmsnorm.models import loading, workload
from rmsnorm.models.course import some_tokens

READ = 512
TOKENS = 10
"""In a sample."""
SECONDS = 30.0
"""For each cell, and at least seven rounds."""
BARS = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""What logits may differ by, of the largest: several times what the type itself costs in 30 layers."""
Arms = dict[str, dict[str, nn.Module]]
"""The norms of each, by their place in the model."""
Works = dict[str, tuple[Callable[[], object], int]]
"""What is timed, and how many times it does its work."""


def speed() -> str:
    """A table for each model."""
    tables = []
    for name, rows in {"SmolLM2": _smollm2, "Whisper tiny.en": _whisper}.items():
        titles: list[str] = []
        cells = [row for dtype in BARS for row in rows(dtype, titles)]
        tables.append(table((name, *titles, "last ÷ second", "last ÷ first"), cells))
    return "\n".join(tables)


def _smollm2(dtype: torch.dtype, titles: list[str]) -> Iterator[list[str]]:
    """A token behind 512, and the reading of 512."""
    tokenizer, model = loading.load(loading.SMOLLM2, dtype)
    ids = some_tokens(tokenizer, model, READ + 1)[None, :-1]
    before = _norms(model)
    assert len(rmsnorm.fold(model, keep=False, untie=True, verify=False).done) == len(before)
    arms = {"norms of transformers": before}
    for name, affine in (("norms of rmsnorm", True), ("norms of rmsnorm without weights", False)):
        arms[name] = {path: _our(one, affine, dtype, "llama") for path, one in before.items()}
    works: Works = {
        "a token": (_block(workload.decoding(model, ids)), TOKENS),
        f"prefill of {READ}": (torch.inference_mode()(lambda: model(ids, use_cache=True)), 1),
    }
    yield from _rows(model, arms, works, dtype, lambda: model(ids, use_cache=False).logits, titles)


def _whisper(dtype: torch.dtype, titles: list[str]) -> Iterator[list[str]]:
    """What thirty seconds of sound take, and a token of their text."""
    model = surgery_whisper.load()
    for operation in (rmsnorm.to_rms, rmsnorm.fold):
        operation(model, keep=False, verify=False)  # type: ignore[operator]
    model.to(dtype)
    features, start = surgery_whisper.tone().to(dtype), torch.tensor([surgery_whisper.ASKED])
    with torch.inference_mode():
        states = model.model.encoder(features)
    before = _norms(model)
    arms = {"LayerNorms of torch": {path: _layer_norm(one, dtype) for path, one in before.items()}}
    for name, affine in (("RMSNorms of rmsnorm", True), ("RMSNorms of rmsnorm without weights", False)):
        arms[name] = {path: _our(one, affine, dtype, "torch") for path, one in before.items()}

    @torch.inference_mode()
    def tokens() -> None:
        """Greedily, from the start."""
        ids, past = start, None
        for _ in range(TOKENS):
            output = model(encoder_outputs=states, decoder_input_ids=ids, past_key_values=past, use_cache=True)
            ids, past = output.logits[:, -1:].argmax(-1), output.past_key_values

    works: Works = {
        "30 s of sound": (torch.inference_mode()(lambda: model.model.encoder(features)), 1),
        "a token": (tokens, TOKENS),
    }
    says = lambda: model(features, decoder_input_ids=start).logits  # noqa: E731
    yield from _rows(model, arms, works, dtype, says, titles)


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    kinds = {"LlamaRMSNorm", "RMSNorm"}
    return {name: one for name, one in model.named_modules() if type(one).__name__ in kinds}


def _width(norm: Any) -> int:
    return len(norm.weight) if norm.weight is not None else int(norm.normalized_shape[0])


def _eps(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def _our(norm: Any, affine: bool, dtype: torch.dtype, casting_mode: str) -> nn.Module:
    """With the rounding of the one in whose place it is put."""
    return rmsnorm.RMSNorm(_width(norm), _eps(norm), affine, dtype=dtype, casting_mode=casting_mode).eval()


def _layer_norm(norm: Any, dtype: torch.dtype) -> nn.Module:
    return nn.LayerNorm(_width(norm), _eps(norm), dtype=dtype).eval()


def _rows(
    model: nn.Module, arms: Arms, works: Works, dtype: torch.dtype, says: Callable[[], Tensor], titles: list[str]
) -> Iterator[list[str]]:
    """The rows of a type; before that the model has to say the same with all norms, up to the type's noise."""
    titles[:] = [f"{name}, ms" for name in arms]
    around = {name: lambda modules=modules: _placed(model, modules) for name, modules in arms.items()}
    said: list[Tensor] = []
    for name, placed in around.items():
        with placed(), torch.inference_mode():
            said.append(says())
        apart = float((said[-1] - said[0]).abs().max() / said[0].abs().max())
        assert apart < BARS[dtype], f"{dtype}, {name}: the logits differ by {apart:.1e}"
    for kind, (call, count) in works.items():
        times = measure(dict.fromkeys(arms, call), SECONDS, around)
        first, second, last = times.values()
        cells = [f"{1e3 * one.median / count:.2f} {_span(one, 1e3 / count)}" for one in times.values()]
        shares = [Timing(tuple(last.quotients(one)), 1) for one in (second, first)]
        cells += [f"{one.median:.3f} {_span(one, 1.0, 3)}" for one in shares]
        yield [f"{kind}, {str(dtype).removeprefix('torch.')}", *cells]
        print(kind, dtype, *cells, f"{len(first.seconds)} rounds", sep=" | ", flush=True)


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
