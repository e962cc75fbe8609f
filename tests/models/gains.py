"""Measures what whole models gain from ``rmsnorm.patch``, and writes the table of README.md: ``make gain``.

SmolLM2 is real; the other models have the layers of real ones, fewer of them, and random weights: time per layer hangs
on neither. Before and after take turns, sample by sample; a cell shows the median over rounds of time after ÷ time
before, and the quartiles. A cell whose quartiles have 1 between them is shown as no difference.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

import rmsnorm
from rmsnorm.bench.console import machine
from rmsnorm.bench.pages import replace_block, table
from rmsnorm.models import loading, workload
from rmsnorm.models.classes import switch

ROOT = Path(__file__).parents[2]
LABEL = "made by `make gain`"
VOCABULARY = 8192
"""Of the models with random weights: a real one's head would be as large as all of these layers."""
READ = 128
SECONDS = 15.0
"""For each cell, and at least seven rounds."""


def _shaped(name: str, **config: Any) -> Callable[[torch.dtype], Any]:
    def build(dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        made = transformers.AutoConfig.for_model(name, vocab_size=VOCABULARY, **config)
        return transformers.AutoModelForCausalLM.from_config(made, dtype=dtype).eval()

    return build


MODELS: dict[str, Callable[[torch.dtype], Any]] = {
    "SmolLM2-135M": lambda dtype: loading.load(loading.SMOLLM2, dtype)[1],
    "Qwen3-0.6B, 6 layers": _shaped(
        "qwen3",
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "Gemma-3-1B, 6 layers": _shaped(
        "gemma3_text",
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
    ),
}
"""By the names of README; the sizes are those of the published configurations."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def cell(speed: workload.Speed) -> str:
    """Time after ÷ time before, and its quartiles."""
    low, high = speed.ratio_quartiles
    span = f"({low:.2f}–{high:.2f})"
    return f"**{speed.ratio:.2f}** {span}" if speed.measurable else f"no difference {span}"


def row(name: str, dtype: str, seconds: float = SECONDS) -> list[str]:
    """What a model of this type gains: its name, its norms, three times and the memory that a step keeps."""
    model = MODELS[name](DTYPES[dtype])
    size = model.get_input_embeddings().num_embeddings
    ids = torch.randint(size, (1, READ), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model(ids).logits.float()
    report = rmsnorm.patch(model, fuse_add={"input_ids": ids})
    with torch.inference_mode():
        after = model(ids).logits.float()
    # The proof of every norm is patch's own. Here: that the model as a whole says the same, up to its type's noise.
    assert (after - before).abs().max() <= 0.05 * before.abs().max(), f"{name} {dtype} says something else"
    turn, cells = switch(model), []
    inputs = {"input_ids": ids}
    for work in workload.kinds(model, inputs, writes=True).values():
        cells.append(cell(workload.time(work, turn, seconds)))
    held = [one.kept for one in workload.memories(model, inputs, turn, writes=True).values()]
    norms = f"{len(report.patched)} norms, {len(report.fused)} adds"
    print(name, dtype, norms, *cells, f"{held[1] / held[0]:.2f}", sep=" | ", flush=True)
    return [f"{name}, {dtype}", norms, *cells, f"{held[1] / held[0]:.2f}"]


def main() -> None:
    """Writes the table into README.md and README.zh-CN.md."""
    here = machine()
    if here["why_not_native"]:
        sys.exit(f"The native kernels are off: {here['why_not_native']}")
    rows = [row(name, dtype) for name in MODELS for dtype in DTYPES]
    titles = (
        "after ÷ before",
        "swapped",
        "a token",
        f"prefill of {READ}",
        f"training step of {READ}",
        "kept for backward",
    )
    where = (
        f"{here['cpu']}, {torch.get_num_threads()} threads, target {here['cpu_target']}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {date.today()}, `make gain`"
    )
    for page, says in (("README.md", f"Measured on: {where}."), ("README.zh-CN.md", f"测量环境：{where}。")):
        replace_block(ROOT / page, LABEL, f"{table(titles, rows)}\n{says}")


if __name__ == "__main__":
    main()
