"""Proves docs/scaling.md: what norms were counted to send is what the formulas say, and the page shows just that."""

from __future__ import annotations

import re

import pytest
import scaling
from pages import Page
from scaling import CASES, DATA, GATHERED, LABEL, PAGE, TENSOR, WHOLE, formula

pytestmark = pytest.mark.xdist_group("distributed")  # one process has the ranks


@pytest.fixture(scope="module")
def counts(ranks):
    return scaling.counts(ranks)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("call", "split"), CASES)
def test_formula_is_what_was_counted(counts, call, split, size):
    assert counts[call, split, size].sent() == formula(call, split, 64, 1024, size)


@pytest.mark.parametrize(
    ("call", "split", "sent"),
    [
        ("rms_norm", DATA, (0, 0, 14_336)),  # 2 · 7/8 of 4096 numbers of 2 bytes
        ("rms_norm", TENSOR, (57_344, 57_344, 0)),  # 2 · 7/8 of 8192 rows of 4 bytes
        ("layer_norm", TENSOR, (229_376, 229_376, 0)),  # of 16 bytes
        ("layer_norm", WHOLE, (229_376, 229_376, 14_336)),  # and 7/8 of two weights
        ("rms_norm", GATHERED, (58_720_256, 58_720_256, 0)),  # 7/8 of 64 MiB
    ],
)
def test_formula_by_hand(call, split, sent):
    assert formula(call, split, 8192, 4096, 8) == sent


def test_tables_are_current(counts):
    """All but the sentence that names the version of torch."""
    shown = Page(PAGE).text.partition(f"<!-- {LABEL} -->\n")[2].partition("<!-- end -->")[0]
    lines = [line for line in scaling.tables(counts).splitlines() if line.startswith("|")]
    assert len(lines) > 20
    assert [line for line in shown.splitlines() if line.startswith("|")] == lines, "run `make scaling`"


def test_interface_confirms_the_ring():
    """What the command heard on the loopback interface, as the page has it: headers and barriers are below 2 %."""
    shown = Page(PAGE).text.partition(f"<!-- interface: {LABEL} -->\n")[2].partition("<!-- end -->")[0]
    ratios = [float(ratio) for ratio in re.findall(r"\| (\d\.\d{3}) \|$", shown, re.MULTILINE)]
    assert len(ratios) == 6
    assert all(1.0 <= ratio < 1.02 for ratio in ratios)


def read() -> int:
    """On a rank: runs the code of the page."""
    return len(list(Page(PAGE).run()))


def test_code_of_the_page_runs(ranks):
    assert ranks.run(read) == [1] * 4
