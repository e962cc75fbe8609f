"""The only file that says which steps of the GPU's kernels a norm has, and which tensors those need beside the plain
norm's. triton_steps.py and triton_gradients.py have the steps themselves."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

Matrix = tuple[Tensor, int]
"""A tensor of rows, and their stride."""


class More(NamedTuple):
    """Tensors and numbers of single forms, as kernels get them."""

    gate: Matrix | None = None
    """Of an activation a row for each; of a gated add, as the next two, a row for each ``group`` of rows."""
    scale: Matrix | None = None
    shift: Matrix | None = None
    group: int | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    """LayerNorm's, which forward writes and backward reads."""
    counted: int | None = None
    """How many columns count; None for all."""
    grad_rstd: Tensor | None = None
    """The gradient that arrives at 1/rms."""
    input: Matrix | None = None
    """What the gate was multiplied with, if that isn't what is normalised."""
    dgate: Tensor | None = None
    """Where the gradient of a gate goes that has a row for each, and then that of the sum."""
    dsum: Tensor | None = None
    bias_sums: Tensor | None = None
    """Where sums of gradients over rows go: of a bias, or a shift, and of a gate that rows share."""
    gate_sums: Tensor | None = None


class Steps(NamedTuple):
    """Of one norm."""

    more: More | None = None
    load: str = ""
    layer: bool = False
    floor: bool = False
    store: str = ""
    number: int | None = None
    """What the sum of squares is divided by; None for the number of columns."""

    @property
    def named(self) -> dict[str, Any]:
        """As constants of a kernel, in its order."""
        return {"LOAD": self.load, "LAYER": self.layer, "FLOOR": self.floor, "STORE": self.store}

    def way(self, direction: str, dtype: torch.dtype | None = None) -> str:
        """Which of launch.py's tables of tiles it has; backward, of which type."""
        more = "more" if self.more is not None else "fp64" if dtype is torch.float64 else ""
        return f"{direction}, {more}" if more else direction


PLAIN, NOTHING = Steps(), More()
