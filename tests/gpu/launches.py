"""The only file that says which calls are held to Triton's launches: arguments by shapes, types and layouts."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from oracle import DTYPES, EPS
from torch import Tensor

COLUMNS = (1, 3, 127, 129, 576, 1027, 5137)
ROWS = (1, 3, 1025)


def laid(layout: str, *sizes: int, dtype: torch.dtype) -> Tensor:
    """Numbers don't matter: nothing is computed."""
    *outer, columns = sizes
    if layout == "apart":  # cut out of rows of 16 columns more, as many as keep the address even
        return torch.empty(*outer, columns + 16, dtype=dtype)[..., :columns]
    if layout == "odd":
        count = torch.Size(sizes).numel()
        return torch.empty(count + 1, dtype=dtype)[1:].view(sizes)
    if layout == "every other":
        return torch.empty(*outer, columns, 2, dtype=dtype)[..., 0]
    if layout == "transposed":
        return torch.empty(*outer[::-1], columns, dtype=dtype).permute(*range(len(outer))[::-1], len(outer))
    if layout == "expanded":
        return torch.empty(columns, dtype=dtype).expand(sizes)
    return torch.empty(sizes, dtype=dtype)


LAYOUTS = ("plain", "apart", "odd", "every other", "transposed", "expanded")


def kinds(first: str, *layouts: str) -> list:
    """Types and layouts; bfloat16 shows what the heavy others repeat."""
    return [
        pytest.param(
            *(dtype, layout),
            id=f"{str(dtype)[6:]}-{layout}",
            marks=[] if dtype is torch.bfloat16 else pytest.mark.heavy,
        )
        for dtype in DTYPES
        for layout in (first, *layouts)
    ]


def sizes(layout: str) -> list[tuple[int, int]]:
    """Columns and rows; the largest only where nothing is copied."""
    return [pair for pair in product(COLUMNS, ROWS) if layout == "plain" or pair != (COLUMNS[-1], ROWS[-1])]


class Call:
    """The arguments of operators, for one input."""

    def __init__(self, layout: str, rows: int, columns: int, dtype: torch.dtype, gain: torch.dtype | None) -> None:
        self.layout, self.dtype = layout, dtype
        self.wide = torch.float64 if dtype is torch.float64 else torch.float32
        self.sizes = (rows, 2, columns) if layout in ("transposed", "odd") else (rows, columns)
        tensors = (laid(layout, *self.sizes, dtype=dtype) for _ in range(5))
        self.x, self.other, self.grad, self.grad_sum, self.sum = tensors
        self.weight = None if gain is None else laid(layout if layout == "odd" else "plain", columns, dtype=gain)
        self.bias, self.next_weight = (laid("plain", columns, dtype=dtype) for _ in range(2))
        self.rstd, self.next_rstd, self.grad_rstd = (torch.ones(*self.sizes[:-1], 1, dtype=self.wide) for _ in range(3))
        shared = (rows, 1, columns) if len(self.sizes) == 3 else (1, columns)
        self.gate, self.scale, self.shift = (laid("plain", *shared, dtype=dtype) for _ in range(3))

    def norms(self, offset: float, first: bool) -> dict[str, tuple]:
        norm = (1, EPS, offset, first)
        return {
            "rms_norm": (self.x, self.weight, *norm),
            "rms_norm_forward": (self.x, self.weight, *norm),
            "add_rms_norm": (self.x, self.other, self.weight, *norm),
            "add_rms_norm_forward": (self.x, self.other, self.weight, *norm),
            "gated_rms_norm": (self.x, self.other, self.weight, *norm, first, not first),
            "gated_rms_norm_forward": (self.x, self.other, self.weight, *norm, not first, first),
        }

    def gradients(self, offset: float, needs: tuple[bool, bool]) -> dict[str, tuple]:
        kept = (self.x, self.rstd, self.weight, 1, EPS, offset)
        gated = (self.x, self.other, self.rstd, self.weight, 1, EPS, offset)
        return {
            "rms_norm_backward": (self.grad, self.grad_sum if needs[1] else None, *kept, *needs),
            "gated_rms_norm_backward": (self.grad, *gated, needs[0], needs[1], True, needs[0], needs[1]),
        }

    def modulated(self, layer: bool, residual: bool, gated: bool, each: bool) -> dict[str, tuple]:
        other, gate = self.other if residual else None, self.gate if gated else None
        norm = (1, EPS, 0.0)
        sum, mean = self.sum if residual else self.sum[:0], self.rstd.double()
        kept = (self.x, gate, self.scale, self.shift, sum, mean, self.rstd, None, *norm, layer)
        return {
            "modulated_norm": (self.x, other, gate, self.scale, self.shift, None, *norm, each, layer),
            "modulated_norm_forward": (self.x, other, gate, self.scale, None, None, *norm, each, layer),
            "modulated_norm_backward": (self.grad, self.grad_sum if layer else None, *kept, *[True] * 5, False),
            "gated_add": (self.x, self.other, self.gate, each),
            "gated_add_forward": (self.x, self.other, self.gate, each),
            "gated_add_backward": (self.grad, self.x, self.gate, True, layer),
        }

    def general(self, floor: bool, some: bool, offset: float, biased: bool) -> dict[str, tuple]:
        norm = (1, -EPS if floor else EPS, offset)
        counted, bias = max(1, self.sizes[-1] // 2) if some else -1, self.bias if biased else None
        grad_rstd = self.grad_rstd if some else None
        kept, needs = (self.rstd, self.weight, bias, *norm, counted), (True, floor, biased)
        lean = (grad_rstd, self.x, self.rstd, self.weight, 1, offset, True, True)
        return {
            "general_rms_norm": (self.x, self.weight, bias, *norm, some, counted, not floor, biased, torch.float32),
            "general_rms_norm_forward": (self.x, self.weight, bias, *norm, some, counted, floor, True, None),
            "general_rms_norm_backward": (self.grad if biased else None, grad_rstd, self.x, *kept, not some, *needs),
            "general_add_rms_norm": (self.x, self.other, self.weight, bias, *norm, floor, counted, some, None),
            "general_add_rms_norm_backward": (self.grad, self.grad_sum, grad_rstd, self.x, *kept, *needs),
            "rms_norm_lean_backward": (self.grad, *lean),
            "add_rms_norm_lean_backward": (self.grad, self.grad_sum, *lean),
        }

    def sandwiches(self, offset: float, first: bool, e4m3: bool) -> dict[str, tuple]:
        norm = (1, EPS, offset)
        second = None if e4m3 else self.next_weight
        two = (self.x, self.sum, self.rstd, self.next_rstd, self.weight, second, *norm, None if first else 1e-3)
        gated = (None, self.other) if first else (self.other, None)
        calls = {
            "rms_norm_add": (self.x, self.other, self.weight, *norm, first),
            "rms_norm_add_forward": (self.x, self.other, self.weight, *norm, first),
            "rms_norm_add_backward": (self.grad, self.x, self.rstd, self.weight, *norm, True, first),
            "sandwich_rms_norm": (self.x, self.other, self.weight, second, *norm, first, 1e-3),
            "sandwich_rms_norm_forward": (self.x, self.other, self.weight, second, *norm, first, None),
            "sandwich_rms_norm_backward": (self.grad, self.grad_sum, *two, True, True, first, True),
            "quantised_rms_norm": (self.x, *gated, self.weight, *norm, first, e4m3, first, e4m3),
        }
        if self.dtype is torch.float64:
            del calls["quantised_rms_norm"]
        return calls


def heads(layout: str, dtype: torch.dtype, columns: int, batch: int, first: bool, interleaved: bool) -> dict:
    """Query and key as a projection wrote them, or not; angles of a part of the width, of all sequences or of each."""
    tokens, turned = 5, columns - columns % 2 if interleaved else max(2, columns // 4 * 2)

    def written(count: int) -> Tensor:
        if layout == "written":
            return torch.zeros(batch, tokens, count, columns, dtype=dtype).transpose(1, 2)
        return laid(layout, batch, count, tokens, columns, dtype=dtype)

    query, key, grad_query, grad_key = (written(count) for count in (4, 2, 4, 2))
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    shape = (batch, tokens, turned) if first else (1, tokens, turned)
    cos, sin = (torch.zeros(shape, dtype=dtype if interleaved else wide) for _ in range(2))
    weight, other = torch.zeros(columns, dtype=dtype), None if first else torch.zeros(columns, dtype=dtype)
    rstd = [torch.ones(batch, tokens, count, 1, dtype=wide) for count in (4, 2)]
    norm, angles = (EPS, 1.0 if first else 0.0), (cos, sin)
    return {
        "rope": (query, key, *angles, interleaved),
        "rope_forward": (query, key, *angles, interleaved),
        "rope_backward": (grad_query, grad_key, *angles, interleaved, True, not first),
        "heads_rms_norm_rope": (query, key, *angles, weight, other, *norm, first, interleaved),
        "heads_rms_norm_rope_forward": (query, key, *angles, weight, other, *norm, not first, interleaved),
        "heads_rms_norm_rope_backward": (
            *(grad_query, grad_key, query, key, *angles, *rstd, weight, other, *norm, interleaved),
            *(True, not first, first, True),
        ),
    }


def everything(call: Call) -> dict[str, tuple]:
    calls = call.norms(0.0, False) | call.gradients(0.0, (True, True)) | call.modulated(True, True, True, False)
    calls |= call.general(False, True, 0.0, True) | call.sandwiches(0.0, False, True)
    return calls | heads("written", call.dtype, 64, 3, False, False)
