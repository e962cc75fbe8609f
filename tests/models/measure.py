"""Measures SmolLM2 before and after ``rmsnorm.patch`` and writes their table in docs/models.md: ``make models``.

Half precision and fused adds beside float32, in one process; what each number means is in ``models/comparison.py`` and
``models/workload.py``.
"""

from __future__ import annotations

import sys
from datetime import date
from pathlib import Path

import torch

import rmsnorm
from rmsnorm.bench.console import machine
from rmsnorm.bench.pages import replace_block
from rmsnorm.models import command, comparison, course, loading, workload
from rmsnorm.models.classes import switch

PAGE = Path(__file__).parents[2] / "docs/models.md"
PROMPT = "The sky is blue because"
SECONDS = 6.0


def column(dtype: str, fuse_add: bool) -> list[str]:
    """The cells of one column: what a model says, and after ÷ before."""
    tokenizer, model = loading.load(loading.SMOLLM2, command.DTYPES[dtype])
    rmsnorm.patch(model, fuse_add=fuse_add)
    turn = switch(model)
    prompt, text = course.prompt_of(tokenizer, model, PROMPT), course.some_tokens(tokenizer, model, 2000)
    numbers = comparison.compare(model, turn, {"input_ids": prompt[None]}, prompt, text, 64).numbers()
    inputs = {"input_ids": text[None, : course.READ]}
    speeds = [workload.time(work, turn, SECONDS) for work in workload.kinds(model, inputs, writes=True).values()]
    memory = workload.memories(model, inputs, turn, writes=True)
    sizes = [[getattr(memory[when], name) for when in ("before", "after")] for name in ("kept", "peak")]
    return [
        f"{numbers['same_tokens']} of {numbers['written_tokens']}",
        f"{numbers['loss_before']:.4f}, {abs(numbers['loss_after'] - numbers['loss_before']):.0e}",
        *(f"{one.per_second[0]:.0f} → {one.per_second[1]:.0f}, {one.ratio:.3f}" for one in speeds),
        *(f"{before / 2**20:.0f} → {after / 2**20:.0f}, {after / before:.3f}" for before, after in sizes),
    ]


def main() -> None:
    """Writes the table."""
    here = machine()
    if here["why_not_native"]:
        sys.exit(f"The native kernels are off: {here['why_not_native']}")
    titles = "float32", "float32, adds fused", "bfloat16", "bfloat16, adds fused"
    columns = [column(title.split(",")[0], "fused" in title) for title in titles]
    rows = (
        "greedy tokens alike",
        "loss per token of real text, and its change",
        "decode: tokens/s, time after ÷ before",
        "prefill of 128: tokens/s, time",
        "training step on 128: tokens/s, time",
        "kept for backward: MiB, after ÷ before",
        "peak of the step: MiB, after ÷ before",
    )
    lines = [
        f"SmolLM2-135M-Instruct before → after `rmsnorm.patch`: {here['cpu']}, {torch.get_num_threads()} threads, CPU "
        f"target {here['cpu_target']}, torch {torch.__version__}, {date.today()}, `make models`.",
        "",
        f"| | {' | '.join(titles)} |",
        f"|---|{'---:|' * len(titles)}",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in zip(rows, zip(*columns, strict=True), strict=True)),
    ]
    replace_block(PAGE, "made by `make models`", "\n".join(lines))


if __name__ == "__main__":
    main()
