"""Proves that our norms are at home wherever torch's own are: what can be done to torch's norm can be done to each of
ours, with the same value, gradients, kind of result, and kind of error.

A row is something that is done to a norm, a column is one of nine norms. A cell runs its row twice, on our norm and on
torch's own counterpart, and compares the two. Rows stand in home_*.py, columns in home_norms.py.
"""

from __future__ import annotations

import warnings
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

# These five fill the table.
import home_autograd  # noqa: F401
import home_compile  # noqa: F401
import home_modules  # noqa: F401
import home_onnx  # noqa: F401 - with those of home_export.py and home_graphs.py
import home_tensors  # noqa: F401
import pytest
import torch
from home_compare import Failed, attempt, compare
from home_norms import FILTERS, NORMS, ROWS, Norm

from rmsnorm import _native

pytestmark = pytest.mark.skipif(not _native.cpu_targets(), reason="without the native library ours are torch's formula")

PINNED = torch.__version__.startswith("2.13.0")  # other versions of torch deprecate other things
PAGE, LABEL = Path(__file__).parents[1] / "docs" / "home.md", "made by `make home`"
# (row, column) -> why this cell can't be as torch's is. A cell that has become right fails until it is taken out.
_FEW = (
    "patch() proves a norm's meaning on its own columns, and leaves one alone that has too few to tell meanings apart"
)
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("called with one column and three", "patched nn.RMSNorm"): _FEW,
    ("subclass that logs, seen once by its public name", "patched LlamaRMSNorm"): (
        "a subclass sees what the module's own forward calls, as before patch(): pow, mean, rsqrt"
    ),
    ("MaskedTensor", "installed"): "MaskedTensor knows torch's formula, not the operator that install() fills",
    ("inputs of inference_mode, outside it", "installed"): (
        "torch's own derivative of its fused operator keeps the input, which such a tensor doesn't allow"
    ),
    **{
        (row, "installed"): "torch's own translation of its own norm: x · Reciprocal(Sqrt(...)) below opset 23"
        for row in ("ONNX, with the operators that runtimes know a norm by", "ONNX, fused by onnxruntime")
    },
}

# Row -> what torch itself refuses in it, so that an error of this kind is what ours has to give.
REFUSALS: dict[str, str] = {
    "MaskedTensor": "masks with holes, as a row's mean has a mask of its own; layer_norm and silu altogether",
    "inputs of inference_mode, outside it": "layer_norm, which would keep the input for backward",
    "a change to what was saved is an error": "that is the row",
    "a second backward pass, and derivatives of gradients": "a third, after the graph was freed",
    "detect_anomaly": "a NaN that a backward makes: that is the row",
    "export, normalised over a size that isn't known": "layers, whose size is a constant",
}

# Rows of which a cell is an export or a compilation: four of the table's six minutes.
LONG = ("ONNX", "compile", "export", "run_decompositions", "decomposed", "make_fx")


def failures(result: Any) -> list[Failed]:
    """All errors within a result."""
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, list | tuple):
        return [failure for part in result for failure in failures(part)]
    return [result] if isinstance(result, Failed) else []


def run(row: str, norm: Norm) -> Any:
    torch.compiler.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings(), norm.context():
        warnings.simplefilter("error" if PINNED else "ignore")
        for message, category in FILTERS[row]:
            warnings.filterwarnings("ignore", message, category)
        return attempt(lambda: ROWS[row](norm))


@cache
def truth(row: str, column: str) -> Any:
    """What torch's own norm does, where it doesn't fail for a reason that nobody has looked at."""
    theirs = NORMS[column][1]
    same = next(name for name, (_, other) in NORMS.items() if other is theirs)
    if same != column:  # several columns have one counterpart
        return truth(row, same)
    wanted = run(row, theirs)
    refused = failures(wanted)
    assert not any(issubclass(f.kind, Warning) for f in refused), f"torch warns in this row; filter it: {refused}"
    assert not refused or row in REFUSALS, f"torch's own norm fails in this row: {refused}"
    return wanted


def cells() -> list[Any]:
    """All of them. The cells of a row share what torch's norm did, and those of ONNX their models: one process each.

    Where a cell takes half a second to eight `make test` has the function's and the layer's, `make heavy` the others'.
    """
    found = []
    for row, column in product(ROWS, NORMS):
        marks: list[Any] = [pytest.mark.xdist_group(row if not row.startswith("ONNX") else "ONNX")]
        if row.startswith(LONG) and column not in ("rms_norm", "RMSNorm"):
            marks.append(pytest.mark.heavy)
        found.append(pytest.param(row, column, marks=marks, id=f"{row}-{column}"))
    return found


@pytest.mark.parametrize(("row", "column"), cells())
def test_cell(row, column):
    wanted, got = truth(row, column), run(row, NORMS[column][0])
    reason = EXCEPTIONS.get((row, column))
    try:
        compare(got, wanted)
    except AssertionError:
        if reason:
            pytest.xfail(reason)
        raise
    assert not reason, f"this cell is right now; take it out of EXCEPTIONS ({reason})"


def page() -> str:
    """The block of docs/home.md."""
    rows = "; ".join(ROWS)
    text = [
        f"Columns: {', '.join(NORMS)}.",
        f"Rows: {rows}.",
        "Cells that are not as torch's:",
        "| row | norm | why |\n|---|---|---|",
    ]
    text[-1] += "".join(f"\n| {row} | {column} | {reason} |" for (row, column), reason in EXCEPTIONS.items())
    text += ["What torch itself refuses, and ours with it:", "| row | what |\n|---|---|"]
    text[-1] += "".join(f"\n| {row} | {what} |" for row, what in REFUSALS.items())
    return "\n\n".join(text) + "\n"


def test_the_page_is_current():
    """Otherwise: ``make home``."""
    assert f"<!-- {LABEL} -->\n{page()}<!-- end -->\n" in PAGE.read_text()


def test_no_reason_outlives_its_cell():
    assert all(row in ROWS and column in NORMS for row, column in EXCEPTIONS)
    assert set(REFUSALS) <= set(ROWS)
    assert not [row for row in REFUSALS if not any(failures(truth(row, column)) for column in NORMS)]


if __name__ == "__main__":
    from rmsnorm.bench.pages import replace_block

    replace_block(PAGE, LABEL, page())
