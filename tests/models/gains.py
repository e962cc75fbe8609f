"""Measures what whole models gain from ``rmsnorm.patch(model, fuse=True)``; writes the table of README.md, and that of
docs/models.md which says where a token's time goes: ``make gain``.

SmolLM2 is real; the other models have the layers of real ones and random weights: time hangs on neither. Before and
after take turns, in blocks of ten tokens; a cell shows the median over rounds of time after ÷ time before, and the
quartiles. A cell whose quartiles have 1 between them is shown as no difference.

Each model has a process of its own, as one's memory isn't given back whole. What they found is in build/gains.json;
``--resume`` measures only what is missing there, ``--kept`` only the last column, which no other work disturbs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers

import rmsnorm
from rmsnorm.bench.console import machine
from rmsnorm.bench.memory import kept
from rmsnorm.bench.pages import replace_block, table
from rmsnorm.bench.timing import measure
from rmsnorm.models import loading, workload
from rmsnorm.models.classes import switch

ROOT = Path(__file__).parents[2]
FOUND = ROOT / "build/gains.json"
LABEL = "made by `make gain`"
VOCABULARY = 8192
"""Of the models with random weights: a real one's head would be as large as all of these layers."""
READ = 512
TOKENS = 10
"""In a block: the machine's own drift between two of them is smaller than between two minutes."""
SECONDS = 20.0
"""For each cell, and at least seven rounds."""


def _shaped(name: str, **config: Any) -> Callable[[torch.dtype], Any]:
    def build(dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        made = transformers.AutoConfig.for_model(name, vocab_size=VOCABULARY, **config)
        return transformers.AutoModelForCausalLM.from_config(made, dtype=dtype).eval()

    return build


MODELS: dict[str, Callable[[torch.dtype], Any]] = {
    "SmolLM2-135M": lambda dtype: loading.load(loading.SMOLLM2, dtype)[1],
    "Qwen3-0.6B, 14 layers": _shaped(
        "qwen3",
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=14,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "Gemma-3-270M": _shaped(
        "gemma3_text",
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
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


def row(name: str, dtype: str, only_kept: bool = False) -> list[list[str]]:
    """What a model of this type gains: its name, what was swapped, three times and the memory that a step keeps. And
    where the time of a token goes."""
    model = MODELS[name](DTYPES[dtype])
    size = model.get_input_embeddings().num_embeddings
    ids = torch.randint(size, (1, READ), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model(ids).logits.float()
    report = rmsnorm.patch(model, fuse={"input_ids": ids})
    with torch.inference_mode():
        after = model(ids).logits.float()
    # The proof of every norm is patch's own. Here: that the model as a whole says the same, up to its type's noise.
    assert (after - before).abs().max() <= 0.05 * before.abs().max(), f"{name} {dtype} says something else"
    turn, inputs = switch(model), {"input_ids": ids}
    swapped = f"{len(report.patched)} norms, {len(report.fused)} layers fused"
    cells, spent = [f"{name}, {dtype}", swapped], [f"{name}, {dtype}"]
    if not only_kept:
        works = workload.kinds(model, inputs, writes=True)
        works["decode"] = workload.Work(lambda: _block(workload.decoding(model, ids)), TOKENS)
        speeds = {kind: workload.time(work, turn, SECONDS) for kind, work in works.items()}
        cells += map(cell, speeds.values())
        spent += _spent(model, ids, turn, speeds["decode"])
    held = []
    for on in (False, True):
        turn(on)
        storages = kept(lambda: workload.loss(model, inputs, writes=True), model.parameters())
        held.append(sum(size for size, _ in storages))
    return [[*cells, f"{held[1] / held[0]:.2f}"], spent]


def _block(token: Callable[[], object]) -> Callable[[], None]:
    def block() -> None:
        for _ in range(TOKENS):
            token()

    return block


def _spent(model: Any, ids: torch.Tensor, turn: workload.Turn, decode: workload.Speed) -> list[str]:
    """Of a token: time before and after; the weights at the speed of a copy, below which no time can fall; and what
    torch's profiler says of matrix products and attention before, and of all else before and after, in shares."""
    times = [1e3 * side.median / TOKENS for side in (decode.before, decode.after)]
    table = model.get_input_embeddings().weight
    read = sum(p.nbytes for p in model.parameters() if p is not table or model.get_output_embeddings().weight is table)
    a, b = torch.zeros(2**25), torch.zeros(2**25)
    copy = measure({"copy": lambda: b.copy_(a)}, 1.0)["copy"].fastest
    shares = []
    for on in (False, True):
        turn(on)
        token = workload.decoding(model, ids)
        token()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            _block(token)()
        spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
        products = sum(time for key, time in spent.items() if key in PRODUCTS or "attention" in key)
        shares.append(products / sum(spent.values()))
    turn(True)
    floor = 1e3 * read / (2 * a.nbytes / copy)
    return [*(f"{time:.1f}" for time in times), f"{floor:.1f}", *(f"{share:.2f}" for share in shares)]


PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::baddbmm"}


def measured(resume: bool, only_kept: bool) -> list[list[list[str]]]:
    """All rows, each from a process of its own."""
    found: dict[str, list[list[str]]] = json.loads(FOUND.read_text()) if resume or only_kept else {}
    FOUND.parent.mkdir(exist_ok=True)
    for name, dtype in product(MODELS, DTYPES):
        key = f"{name}, {dtype}"
        if key in found and not only_kept:
            continue
        command = [sys.executable, __file__, name, dtype, *(["--kept"] if only_kept else [])]
        got = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        if only_kept:
            found[key][0][-1] = got[0][-1]
        else:
            found[key] = got
        print(*found[key][0], *found[key][1][1:], sep=" | ", flush=True)
        beside = FOUND.with_suffix(".part")
        beside.write_text(json.dumps(found, ensure_ascii=False, indent=1))
        os.replace(beside, FOUND)
    return [found[f"{name}, {dtype}"] for name, dtype in product(MODELS, DTYPES)]


def main() -> None:
    """Writes the tables into README.md, README.zh-CN.md and docs/models.md."""
    here = machine()
    if here["why_not_native"]:
        sys.exit(f"The native kernels are off: {here['why_not_native']}")
    only_kept = "--kept" in sys.argv
    if len(sys.argv) >= 3:
        print(json.dumps(row(*sys.argv[1:3], only_kept)))
        return
    rows, spent = zip(*measured("--resume" in sys.argv, only_kept), strict=True)
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
    titles = (
        "a token",
        "before, ms",
        "after, ms",
        "weights ÷ copy, ms",
        "products and attention, before",
        "after",
    )
    replace_block(ROOT / "docs/models.md", LABEL, f"{table(titles, spent)}\nMeasured on: {where}.")


if __name__ == "__main__":
    main()
