"""The strategy of test_fuzz.py: what a user may call, drawn as plain numbers, and the tensors made from them.

A problem prints as the code that makes it, so that a failure can be pasted into ``@example``. Hypothesis shrinks the
numbers: to contiguous, small, ordinary, unpoisoned. Values come from a generator seeded by one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp, prod

import torch
from hypothesis import strategies as st
from oracle import DTYPES, MODES
from torch import Tensor

from rmsnorm import _native

TARGETS = _native.cpu_targets() or ["none"]
APIS = ("rms_norm", "autograd", "out", "module", "add")
POISON = ("", "", "nan", "inf", "-inf")
EPS = (1e-6, None, 0.0, 1.0, 1e-12, 1e-45, 1e-300)
MOST = 80_000  # elements: two threads share calls of more than 32768, and a case takes 20 ms at most


def exponents(dtype: torch.dtype) -> tuple[int, int]:
    """Powers of two from the smallest subnormal to the largest number."""
    info = torch.finfo(dtype)
    return frexp(info.smallest_normal * info.eps)[1] - 1, frexp(info.max)[1] - 1


@dataclass(frozen=True)
class Layout:
    """Where the elements of a tensor lie: the order of the dimensions in memory, the step and the padding before each,
    dimensions of stride 0, and the offset of the first element."""

    order: tuple[int, ...]
    steps: tuple[int, ...]
    pads: tuple[int, ...]
    expanded: tuple[bool, ...]
    offset: int = 0

    def place(self, values: Tensor, expand: bool = True) -> Tensor:
        """The values laid out so, in a buffer of NaNs. An expanded dimension repeats its first index."""
        held = [min(n, 1) if e and expand else n for n, e in zip(values.shape, self.expanded, strict=True)]
        sizes = [pad + n * step for pad, n, step in zip(self.pads, held, self.steps, strict=True)]
        buffer = torch.full((self.offset + prod(sizes),), torch.nan, dtype=values.dtype)[self.offset :]
        inverse = [self.order.index(d) for d in range(len(sizes))]
        view = buffer.view([sizes[d] for d in self.order]).permute(inverse)
        view = view[tuple(slice(pad, None, step) for pad, step in zip(self.pads, self.steps, strict=True))]
        view.copy_(values[tuple(slice(n) for n in held)])
        return view.expand(values.shape)


@dataclass(frozen=True)
class Problem:
    dtype: torch.dtype
    outer: tuple[int, ...]
    inner: tuple[int, ...]
    weight_type: torch.dtype | None
    weight_power: int
    weight_step: int
    offset: float
    eps: float | None
    mode: str
    powers: tuple[int, int]  # a row's size is 2 to a power between these
    spread: int  # and an element's up to 2^spread less
    zeros: bool  # every fourth row is zero
    poison: str  # what a few elements are
    grad_power: int
    layout: Layout
    grad_layout: Layout
    threads: int
    target: str
    other: str  # another target, which must give the same bits
    api: str
    seed: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.outer + self.inner

    @property
    def rows(self) -> int:
        return prod(self.outer)

    @property
    def columns(self) -> int:
        return prod(self.inner)

    @property
    def true_eps(self) -> float:
        """None means the machine epsilon of the accumulation type."""
        accumulation = torch.float64 if self.dtype is torch.float64 else torch.float32
        return torch.finfo(accumulation).eps if self.eps is None else self.eps

    @property
    def options(self) -> dict[str, object]:
        return {"offset": self.offset, "casting_mode": self.mode}

    def values(self, stream: int = 0) -> Tensor:
        """The input, contiguous; another stream gives a residual."""
        generator = torch.Generator().manual_seed(2 * self.seed + stream)
        x = torch.randn(self.rows, self.columns, generator=generator, dtype=torch.float64)
        low, high = self.powers
        power = torch.randint(low, high + 1, (self.rows, 1), generator=generator)
        power = power - torch.randint(0, self.spread + 1, x.shape, generator=generator)
        half = power // 2  # 2^1023 is the largest factor there is
        x = x * half.double().exp2() * (power - half).double().exp2()
        largest = torch.finfo(self.dtype).max
        x = x.clamp(-largest, largest).to(self.dtype)
        if self.zeros:
            x[::4] = 0
        if self.poison and x.numel():
            places = torch.randint(0, x.numel(), (1 + self.rows // 8,), generator=generator)
            x.view(-1)[places] = float(self.poison)
        return x.view(self.shape)

    def weight(self) -> Tensor | None:
        if self.weight_type is None:
            return None
        generator = torch.Generator().manual_seed(self.seed + 17)
        gains = (1 + 0.7 * torch.randn(self.columns, generator=generator, dtype=torch.float64)) * 2.0**self.weight_power
        buffer = torch.full((*self.inner[:-1], self.inner[-1] * self.weight_step), torch.nan, dtype=self.weight_type)
        return buffer[..., :: self.weight_step].copy_(gains.view(self.inner))

    def grad(self, dtype: torch.dtype) -> Tensor:
        """The gradient of the output, contiguous; rows of several sizes."""
        generator = torch.Generator().manual_seed(self.seed + 31)
        power = self.grad_power - torch.randint(0, 4, (self.rows, 1), generator=generator)
        grad = torch.randn(self.rows, self.columns, generator=generator, dtype=torch.float64) * 2.0**power
        return grad.to(dtype).view(self.shape)


@st.composite
def layouts(draw, dims: int, expand: bool = True) -> Layout:
    """Half of them are contiguous."""
    if draw(st.booleans()):
        return Layout(tuple(range(dims)), (1,) * dims, (0,) * dims, (False,) * dims)
    stepped, padded = draw(st.integers(0, dims - 1)), draw(st.integers(0, dims - 1))  # one each, or memory explodes
    step, pad = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    return Layout(
        order=tuple(draw(st.permutations(range(dims)))),
        steps=tuple(step if d == stepped else 1 for d in range(dims)),
        pads=tuple(pad if d == padded else 0 for d in range(dims)),
        expanded=tuple(expand and draw(st.integers(0, 5)) == 5 for _ in range(dims)),
        offset=draw(st.integers(0, 5)),
    )


@st.composite
def problems(draw) -> Problem:
    dtype = draw(st.sampled_from(DTYPES))
    outer = tuple(draw(st.lists(st.integers(0, 5), min_size=1, max_size=4)))
    most = max(1, min(9000 if draw(st.integers(0, 7)) == 7 else 600, MOST // max(1, prod(outer))))
    inner: list[int] = []
    for _ in range(draw(st.integers(1, 3)) - 1):
        inner.append(draw(st.integers(1, min(9, most // prod(inner)))))
    inner.append(draw(st.integers(1, most // prod(inner))))
    half = dtype is torch.float16
    least, largest = exponents(dtype)
    low = draw(st.one_of(st.integers(-3, 3), st.integers(least, largest)))
    high = draw(st.one_of(st.just(low), st.integers(low, largest)))
    kinds = (None, torch.float32, torch.bfloat16, torch.float16, *([torch.float64] if dtype is torch.float64 else []))
    return Problem(
        dtype=dtype,
        outer=outer,
        inner=tuple(inner),
        weight_type=draw(st.sampled_from(kinds)),
        weight_power=draw(st.one_of(st.just(0), st.integers(-6, 6))),
        weight_step=draw(st.sampled_from((1, 1, 2))),
        offset=draw(st.sampled_from((0.0, 1.0, 0.5, -0.25))),
        eps=draw(st.sampled_from(EPS)),
        mode=draw(st.sampled_from(MODES)),
        powers=(low, high),
        spread=draw(st.one_of(st.just(0), st.integers(0, 10 if half else 140))),
        zeros=draw(st.integers(0, 3)) == 3,
        poison=draw(st.sampled_from(POISON)),
        grad_power=draw(st.one_of(st.just(-2), st.integers(-6, 2) if half else st.integers(-20, 20))),
        layout=draw(layouts(len(outer) + len(inner))),
        grad_layout=draw(layouts(len(outer) + len(inner))),
        threads=draw(st.sampled_from((1, 2))),
        target=draw(st.sampled_from(TARGETS)),
        other=draw(st.sampled_from(TARGETS)),
        api=draw(st.sampled_from(APIS)),
        seed=draw(st.integers(0, 2**16)),
    )
