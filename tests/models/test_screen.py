"""Proves that what ``patch`` shows is whole at every width: reports, names, times, and no ratio within the noise."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("rich")

from rich.console import Console

from rmsnorm.bench.timing import Timing
from rmsnorm.models import screen, workload
from rmsnorm.models.report import Entry, PatchReport, shortened

REPORT = PatchReport(
    patched=[
        Entry(f"model.language_model.layers.{i}.{name}", "Qwen3VLTextRMSNorm", "round, then weight", errors=ERRORS)
        for ERRORS in [{"float32": 1.86, "bfloat16": 0.00033, "float16": 0.0, "gradient": 1.9}]
        for i in range(2)
        for name in ("input_layernorm", "self_attn.q_norm", "cross_attention_block.post_attention_layernorm")
    ],
    skipped=[Entry("visual.norm", "LayerNorm", reason="it is a LayerNorm; patch(model, layer_norm=True) takes it")],
)
PLACES = {
    *("model.language_model.….*.input_layernorm", "model.….*.input_layernorm"),
    *("model.language_model.….self_attn.q_norm", "model.….self_attn.q_norm"),
    *("model.….post_attention_layernorm", "….post_attention_layernorm"),
}
SPEED = workload.Speed(Timing((0.0415, 0.0402, 0.0433), 1), Timing((0.0355, 0.0302, 0.0399), 1), 128)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_drop_columns_and_cut_nothing(width: int) -> None:
    """Each shown number is whole, with its unit; at 120 columns all are there, at 60 some columns are named instead."""
    wide, narrow = Console(width=400), Console(width=width)
    for table, dropped in (
        (REPORT, {60: ["fp32", "class", "whole names"], 80: ["fp32"], 120: []}),
        (screen.times({"training step": SPEED, "decode": SPEED}), {60: ["quartiles"], 80: ["tokens/s"], 120: []}),
    ):
        with wide.capture() as all_of_it:
            wide.print(table)
        with narrow.capture() as shown:
            narrow.print(table)
        lines = [line.rstrip() for line in shown.get().splitlines()]
        assert max(map(len, lines)) <= width
        notes = [line for line in lines if line.startswith(("no room for", "widen the terminal"))]
        cells = {word for line in lines if line not in notes for word in line.split()}
        cells = {word for word in cells if set(word) != {"─"}}
        assert {word for word in cells if "…" not in word} <= set(all_of_it.get().split())
        assert {word for word in cells if "…" in word} <= PLACES
        assert all(name in notes[0] for name in dropped[width])
        assert len(notes) == 2 * bool(dropped[width])
        assert all("--json" in note for note in notes[1:]), "what to do about it"


def test_a_printed_report_has_a_head_and_whole_words() -> None:
    head, *rows, note, summary = str(REPORT).splitlines()
    titles = ["norms", "class", "modules", "fp32 (eps)", "bf16 (share)", "fp16 (share)", "grad (eps)", "what"]
    assert re.split("  +", head) == titles
    assert set(re.findall(r"\((\w+)\)", head)) == set(re.findall(r"(\w+): ", note)), "units, explained"
    assert all(row[head.index("what") :].startswith(("patched: ", "skipped: ")) for row in rows)
    assert summary == "6 norms run on rmsnorm; 1 left as they are."
    assert {word for word in re.split(r",? +", rows[0]) if "…" in word} <= PLACES
    assert str(PatchReport()) == "Nothing to patch: this model has no norm."


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("norm", "norm"),
        ("model.layers.*.post_attention_layernorm", "model.layers.*.post_attention_layernorm"),
        ("model.language_model.layers.*.self_attn.q_norm", "model.language_model.….self_attn.q_norm"),
        (
            "a_name_of_one_part_that_is_longer_than_there_is_room",
            "a_name_of_one_part_that_is_longer_than_there_is_room",
        ),
    ],
)
def test_names_are_cut_between_parts(name: str, short: str) -> None:
    assert shortened(name) == short


@pytest.mark.parametrize(
    ("after", "text"),
    [
        ((0.5, 0.5, 0.5, 0.5), "0.500 (0.500–0.500)"),
        ((0.9, 0.9, 1.1, 1.1), "no difference measurable"),  # quartiles of the quotients: 0.9 and 1.1
        ((1.2, 1.3, 1.3, 1.4), "1.300 (1.275–1.325)"),
        ((1.0, 1.0, 1.0, 1.0), "no difference measurable"),
    ],
)
def test_no_ratio_where_the_noise_is_larger(after: tuple[float, ...], text: str) -> None:
    assert screen.ratio(workload.Speed(Timing((1.0,) * 4, 1), Timing(after, 1), 1)) == text
