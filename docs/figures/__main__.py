"""The only file that writes the figures of docs/explained.md: ``make explained``, or ``python docs/figures FOLDER``.

What a figure shows is computed while it is drawn, by this library, torch and autograd.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from limits import eps, gradient, precision
from places import dial, geometry, ruler

from rmsnorm.bench.export import replace
from rmsnorm.bench.figures import RC, stack


def draw(folder: Path) -> None:
    """Writes explained-NAME.png for each figure."""
    for figure in (ruler, geometry, dial, gradient, eps, precision):
        with matplotlib.rc_context(RC):
            replace(folder / f"explained-{figure.__name__}.png", stack([figure()]))


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent.parent)
