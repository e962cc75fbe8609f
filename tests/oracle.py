"""The truth that results are compared with, the data, and the layouts; written from the formula alone.

    r = 1/sqrt(mean(x²) + eps)      y = x·r·(offset + weight)      dx = r·(h - x̂·mean(h·x̂))      dw = Σ_rows grad·x̂

with ``x̂ = x·r`` and ``h = grad·(offset + weight)``, in float64, and in ``numpy.longdouble`` for float64 inputs.
Nothing here imports rmsnorm. A result is right when it lies in an interval; each bound is argued where it is formed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log2

import numpy as np
import torch
from remembered import key, remembered
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES = (torch.bfloat16, torch.float16)
MODES = ("torch", "llama")
COLUMNS = (1, 3, 31, 64, 127, 129, 576, 1027, 4096, 5137)
AWKWARD = (1, 3, 127, 129, 576, 1027, 5137)
EPS = 1e-5

# Above correct rounding, in ulps of the output. Native: the contract (design.md, 3.1). Reference: its fp32 (fp64) sum
# of up to 5137 squares is pairwise over 8 or 16 lanes, which costs up to about 2 ulp of the row (halved by the root),
# rsqrt and x·r up to one each, the gain half: 4.5 in all, 4.01 seen. In a half type they vanish: 5·2^-13 of fp16's ulp.
ULPS = {torch.float32: 2.0, torch.float64: 2.0, torch.bfloat16: 0.51, torch.float16: 0.51}
REFERENCE_ULPS = ULPS | {torch.float32: 5.0, torch.float64: 5.0}


def bound(target: str, dtype: torch.dtype) -> float:
    return (REFERENCE_ULPS if target == "reference" else ULPS)[dtype]


_POWERS = {kind: np.ldexp(kind(1), np.arange(-1200, 1024)) for kind in (np.float64, np.longdouble)}


def exact(tensor: Tensor) -> np.ndarray:
    """The values, in a numpy type with room for their products: longdouble for float64, float64 for the rest."""
    values = tensor.detach().double().numpy()
    return values.astype(np.longdouble) if tensor.dtype is torch.float64 else values


def ulp(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The distance between neighbours of ``dtype`` at each value, subnormals included. In float64 by its bits:
    ``frexp`` and a look into a table were two fifths of the forward oracle's time."""
    info = torch.finfo(dtype)
    lowest = int(log2(info.smallest_normal)) + 1
    if values.dtype == np.float64 and dtype is not torch.float64:
        exponent = (values.view(np.int64) >> 52 & 0x7FF) - 1022
        return (np.maximum(exponent, lowest) - int(1 - log2(info.eps)) + 1023 << 52).view(np.float64)
    exponent = np.frexp(values)[1]
    exponent[values == 0] = lowest
    return _POWERS[values.dtype.type][np.maximum(exponent, lowest) - int(1 - log2(info.eps)) + 1200]


def gain(weight: Tensor, dtype: torch.dtype, offset: float) -> np.ndarray:
    """``offset + weight``, formed in fp32 (fp64 for fp64 inputs), as the contract says."""
    kind = np.float64 if torch.float64 in (dtype, weight.dtype) else np.float32
    return weight.detach().double().numpy().astype(kind) + kind(offset)


@remembered
def _normalised(x: Tensor, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """1/rms, and the rows divided by it."""
    wide = exact(x)
    r = 1 / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + wide.dtype.type(eps))
    return r, wide * r


@dataclass(frozen=True)
class Bounds:
    """The values that a result may take."""

    low: np.ndarray
    high: np.ndarray

    def check(self, got: Tensor, what: object) -> None:
        values = exact(got).reshape(self.low.shape).astype(self.low.dtype)
        good = (self.low <= values) & (values <= self.high)  # NaN is never good
        if not good.all():
            at = tuple(int(i) for i in np.argwhere(~good)[0])
            middle = (self.low + self.high) / 2
            worst = np.nanmax(np.abs(values - middle) / ulp(middle, got.dtype))
            raise AssertionError(
                f"{what}: {(~good).sum()} of {good.size} elements out of bounds, first at {at}: got {values[at]!r}, "
                f"allowed [{self.low[at]!r}, {self.high[at]!r}]; worst error {worst:.4g} ulp of {got.dtype}"
            )


class Truth:
    """What the formulas give for rows ``x`` of shape [rows, columns]."""

    def __init__(self, x: Tensor, eps: float) -> None:
        self.dtype = x.dtype
        self.key = "Truth", key(x), key(eps)
        self.r, self.normalised = _normalised(x, eps)

    def forward(self, weight: Tensor | None, offset: float, mode: str, ulps: float) -> Bounds:
        """Mode torch: within ``ulps`` of the output. Mode llama: x̂ has ``ulps - 0.5`` before it is rounded to the
        input's type, so near a tie either neighbour is right; times the gain, and one rounding of the product (0.51:
        a half type's product may pass through fp32)."""
        if weight is None or mode == "torch":
            value, unit = self._value(weight, offset)
            margin = ulps * unit
            return Bounds(value - margin, value + margin)
        return self._rounded(weight, offset, ulps)

    @remembered
    def _value(self, weight: Tensor | None, offset: float) -> tuple[np.ndarray, np.ndarray]:
        value = self.normalised if weight is None else self.normalised * gain(weight, self.dtype, offset)
        return value, ulp(value, self.dtype)

    @remembered
    def _rounded(self, weight: Tensor, offset: float, ulps: float) -> Bounds:
        unit = ulp(self.normalised, self.dtype)
        neighbours = [np.rint(self.normalised / unit + side * (ulps - 0.5)) * unit for side in (-1, 1)]
        products = [n * gain(weight, self.dtype, offset) for n in neighbours]
        dtype = torch.promote_types(self.dtype, weight.dtype)
        low, high = np.minimum(*products), np.maximum(*products)
        return Bounds(low - 0.51 * ulp(low, dtype), high + 0.51 * ulp(high, dtype))

    @remembered
    def backward(
        self, grad: Tensor, weight: Tensor | None, offset: float, more: np.ndarray | float = 0.0
    ) -> tuple[Bounds, Bounds | None]:
        """dx and dw, rounded once from arithmetic in units u of the accumulation type. dx cancels, so its error is
        c·u·r·(|h| + |x̂|·mean|h·x̂|) and not relative to itself; each term of dw carries r, x̂ and the product
        (3u), and a sum of up to 130 random ones about sqrt(130)·u more. Both stay below 16u. ``more`` is allowed to dx
        beside: a number of u, or one per row."""
        g, x_hat = exact(grad).reshape(self.normalised.shape), self.normalised
        h = g if weight is None else g * gain(weight, self.dtype, offset)
        accumulation = torch.finfo(torch.float64 if self.dtype is torch.float64 else torch.float32)
        unit, step = accumulation.eps / 2, accumulation.smallest_normal * accumulation.eps
        mean = np.mean(h * x_hat, axis=-1, keepdims=True)
        dx = self.r * (h - x_hat * mean)
        size = self.r * (np.abs(h) + np.abs(x_hat) * np.mean(np.abs(h * x_hat), axis=-1, keepdims=True))
        # Where x̂, the mean or their product are subnormal, each is off by up to half a step, which the others multiply.
        steps = self.r * step * (1 + np.abs(x_hat) + np.abs(mean))
        margin = 0.501 * ulp(dx, self.dtype) + (16 + more) * unit * size + steps
        dx_bounds = Bounds(dx - margin, dx + margin)
        if weight is None:
            return dx_bounds, None
        dw = np.sum(g * x_hat, axis=0)
        margin = 0.501 * ulp(dw, weight.dtype) + 16 * unit * np.sum(np.abs(g * x_hat), axis=0)
        return dx_bounds, Bounds(dw - margin, dw + margin)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bit patterns: -0 differs from 0, and a NaN equals itself."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return (
        a.dtype is b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
    )


def sample(rows: int, columns: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Rows of different sizes, from one where eps matters (rms 2^-7 against sqrt(eps) = 2^-8.3) to 2^5, and outlier
    columns 40 times as large every 97."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + 8191 * rows + columns)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x *= 2.0 ** torch.randint(-7, 6, (rows, 1), generator=generator)
    x[:, 50::97] *= 40
    return x.to(dtype)


def incoming(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gradients of the output, of several sizes, so small that dx and dw stay in fp16's range."""
    generator = torch.Generator().manual_seed(131 * rows + columns)
    sizes = 2.0 ** torch.randint(-7, -1, (rows, 1), generator=generator)
    return (torch.randn(rows, columns, generator=generator, dtype=torch.float64) * sizes).to(dtype)


def gains(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A weight around 1 of both signs; with an offset added, a half type could not hold the sum."""
    generator = torch.Generator().manual_seed(seed + 17)
    return (1 + 0.7 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def weights(columns: int, dtype: torch.dtype) -> Iterator[Tensor | None]:
    """No weight, and one of each type that kernels have (fp64 gains for fp64 inputs only)."""
    yield None
    for kind in (*HALVES, torch.float32, *([torch.float64] if dtype is torch.float64 else [])):
        yield gains(columns, dtype=kind)


def heads(rows: int) -> tuple[int, int, int]:
    """``rows`` as batch, heads, sequence."""
    batch = 2 if rows % 10 == 0 else 1
    head = next(n for n in (5, 3, 2, 1) if rows // batch % n == 0)
    return batch, head, rows // batch // head


# name -> a view of shape [rows, columns] (or [batch, heads, sequence, columns]) into a new buffer.
LAYOUTS = {
    "contiguous": lambda new, rows, columns: new(rows, columns),
    "row-strided": lambda new, rows, columns: new(2 * rows, columns)[::2],
    "sliced": lambda new, rows, columns: new(rows, columns + 13)[:, 5 : 5 + columns],
    "misaligned": lambda new, rows, columns: new(rows * columns + 1)[1:].view(rows, columns),
    "heads": lambda new, rows, columns: new(*[heads(rows)[i] for i in (0, 2, 1)], columns).transpose(1, 2),
    "column-strided": lambda new, rows, columns: new(rows, 2 * columns + 1)[:, 1::2],
    "transposed": lambda new, rows, columns: new(columns, rows).t(),
    "expanded": lambda new, rows, columns: new(1, columns).expand(rows, columns),  # row 0 in every row
}
WRITABLE = [name for name in LAYOUTS if name != "expanded"]


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` [rows, columns] in a layout; all of the buffer that isn't theirs is NaN."""
    view = LAYOUTS[layout](lambda *shape: torch.full(shape, torch.nan, dtype=x.dtype), *x.shape)
    if layout == "expanded" and len(x):
        view[0] = x[0]
    elif layout != "expanded":
        view.copy_(x.view(view.shape))
    return view


GRADS = [*LAYOUTS, "scalar"]  # "scalar": what .sum().backward() sends, one number with stride 0 everywhere


def lay_out_grad(grad: Tensor, layout: str) -> Tensor:
    return torch.ones((), dtype=grad.dtype).expand(grad.shape) if layout == "scalar" else lay_out(grad, layout)


def grad_rows(grad: Tensor, layout: str) -> Tensor:
    return torch.ones_like(grad) if layout == "scalar" else rows_of(grad, layout)


def alike(*views: Tensor) -> list[Tensor]:
    """The views in one shape: if one is in heads, all are; [rows, columns] can be seen so in any layout."""
    shape = max((view.shape for view in views), key=len)
    return [view if view.shape == shape else view.unflatten(0, shape[:-1]) for view in views]


def rows_of(x: Tensor, layout: str) -> Tensor:
    """The rows [rows, columns] that ``lay_out`` gives, contiguous."""
    return x[:1].expand(x.shape).contiguous() if layout == "expanded" else x


def outside(view: Tensor) -> Tensor:
    """The elements of the view's buffer that are not the view's."""
    flat = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage())
    mask = torch.ones(flat.shape, dtype=torch.bool)
    mask.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return flat[mask]
