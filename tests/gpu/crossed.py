"""Has what the tests of the Triton kernels' values share: the axes that are crossed, and the bounds."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from oracle import DTYPES, REFERENCE_ULPS, ULPS

CELLS = [*(("held", n) for n in (1, 3, 127, 129, 576, 1027, 5137)), ("blocks", 129), ("blocks", 5137)]
QUICK = [*product([torch.float32], [cell for cell in CELLS if cell[1] < 5000]), (torch.bfloat16, ("blocks", 129))]
# In the interpreter all types at all widths take minutes: fp32 comes at most widths, and the others at one.
PROBLEMS = [
    pytest.param(
        dtype,
        *cell,
        marks=[] if cell == ("held", 129) or (dtype, cell) in QUICK else pytest.mark.heavy,
        id=f"{dtype}-{cell[0]}-{cell[1]}",
    )
    for dtype, cell in product(DTYPES, CELLS)
]
# The contract of the native kernels, but for fp64, whose 1/rms is one number here: 5 ulp, as the reference.
BOUNDS = ULPS | {torch.float64: REFERENCE_ULPS[torch.float64]}


def types(*quick: torch.dtype) -> list[object]:
    """All types, of which the rest is heavy."""
    return [pytest.param(t, marks=[] if t in quick else pytest.mark.heavy, id=str(t)) for t in DTYPES]


TWO = types(torch.float32, torch.bfloat16)
