"""Measures the error of the forward against a wider oracle, ours beside ``F.rms_norm``, and writes the table of
docs/numerics.md: ``make accuracy``. Exits with 1 where ours is beyond the contract.

The oracle is tests/oracle.py's: float64, and numpy's 80-bit longdouble for float64, whose pairwise sum of 65,536
squares is right to about 16·2^-64: 0.004 ulp of float64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from oracle import DTYPES, ULPS, Truth, exact, gain, gains, ulp
from torch import Tensor

import rmsnorm
from rmsnorm.bench.pages import replace_block

PAGE = Path(__file__).parent.parent / "docs" / "numerics.md"
COLUMNS = (64, 576, 4096, 16384, 65536)
ELEMENTS = 2**20
WRONG = 1000.0


def _normal(noise: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    return noise.to(dtype), 1e-6


def _outlier(noise: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    noise[:, noise.shape[1] // 3] = 1000.0
    return noise.to(dtype), 1e-6


def _equal(noise: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    return noise[:, :1].expand(noise.shape).to(dtype).contiguous(), 1e-6


def _subnormal(noise: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    return (noise.clamp(-4, 4) / 4.1 * torch.finfo(dtype).smallest_normal).to(dtype), 0.0


def _near_overflow(noise: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    return ((0.5 + 0.5 * noise.sigmoid()) * noise.sign() * torch.finfo(dtype).max).to(dtype), 1e-6


DATA: dict[str, Callable[[Tensor, torch.dtype], tuple[Tensor, float]]] = {
    "normal": _normal,
    "one outlier of 1000": _outlier,
    "all equal": _equal,
    "subnormal, eps=0": _subnormal,
    "near overflow": _near_overflow,
}


def errors(dtype: torch.dtype, columns: int, data: str, elements: int = ELEMENTS) -> Iterator[tuple[float, float]]:
    """Largest and mean error in ulps of the output, of ours and then of torch's."""
    generator = torch.Generator().manual_seed(columns)
    noise = torch.randn(max(1, elements // columns), columns, generator=generator, dtype=torch.float64)
    x, eps = DATA[data](noise, dtype)
    weight = gains(columns, dtype=dtype)
    truth = Truth(x, eps).normalised * gain(weight, dtype, 0.0)
    unit = ulp(truth, dtype)
    for function in (rmsnorm.rms_norm, F.rms_norm):
        with np.errstate(invalid="ignore"):  # inf - inf, where torch's squares overflow
            error = np.abs(exact(function(x, (columns,), weight, eps)) - truth) / unit
        yield float(error.max()), float(error.mean())


def _cell(largest: float, mean: float) -> str:
    return f"{largest:.3f} / {mean:.3f}" if largest <= WRONG else "wrong"


def table() -> tuple[str, bool]:
    """The Markdown, and whether ours meets the contract everywhere."""
    here, good, lines = rmsnorm.info(), True, []
    lines += [
        "Largest / mean error in ulps of the output, against an oracle in a wider type; 2²⁰ elements a cell, a random "
        f'weight, `casting_mode="torch"`. "wrong" is more than {WRONG:.0f} ulp, or NaN. `make accuracy`, CPU target '
        f"{here.cpu_target}, torch {here.torch}, {date.today().isoformat()}.",
        "",
    ]
    for dtype in DTYPES:
        lines += [
            f"| {str(dtype).removeprefix('torch.')} | | " + " | ".join(f"{n} columns" for n in COLUMNS) + " |",
            "|---|---|" + "---|" * len(COLUMNS),
        ]
        for data in DATA:
            ours, theirs = zip(*(errors(dtype, columns, data) for columns in COLUMNS), strict=True)
            good &= all(largest <= ULPS[dtype] for largest, _ in ours)
            lines.append(f"| {data} | rmsnorm | " + " | ".join(_cell(*e) for e in ours) + " |")
            lines.append("| | `F.rms_norm` | " + " | ".join(_cell(*e) for e in theirs) + " |")
        lines.append("")
    return "\n".join(lines), good


def main() -> None:
    text, good = table()
    replace_block(PAGE, "made by `make accuracy`", text)
    print(text)
    sys.exit(0 if good else "beyond the contract")


if __name__ == "__main__":
    main()
