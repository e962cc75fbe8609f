"""The only file that times what can be asked for beyond the plain norm, beside our other calls and torch's lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from neighbour_forms import EPS, Calls, gradient, noise
from torch import Tensor

import rmsnorm


def small(rows: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[str, Calls, int]]:
    """What can be asked for beyond the plain norm, beside the same by our other calls and by torch's lines."""
    x, r, dy = (noise(rows, columns, dtype=dtype, seed=seed) for seed in range(3))
    w, b = (1 + noise(columns, dtype=dtype, seed=seed) / 4 for seed in (4, 5))
    shape, wide, size, half = (columns,), torch.float32, x.nbytes, torch.bfloat16
    norm, add = rmsnorm.rms_norm, rmsnorm.add_rms_norm

    def factor(t: Tensor, part: int = columns) -> Tensor:
        return torch.rsqrt(t[:, :part].float().square().mean(-1, keepdim=True) + EPS)

    yield (
        "bias",
        {
            "fused": lambda: norm(x, shape, w, EPS, bias=b),
            "rms_norm, +": lambda: norm(x, shape, w, EPS) + b,
            "torch's": lambda: F.rms_norm(x, shape, w, EPS) + b,
        },
        2 * size,
    )
    yield (
        "partial",
        {
            "fused": lambda: norm(x, shape, w, EPS, partial=0.125),
            "torch's": lambda: (x * factor(x, columns // 8)).to(dtype) * w,
        },
        2 * size,
    )
    yield (
        "rstd",
        {
            "fused": lambda: norm(x, shape, w, EPS, return_rstd=True),
            "rms_norm, torch's": lambda: (norm(x, shape, w, EPS), factor(x)),
        },
        2 * size,
    )
    yield "factor", {"fused": lambda: rmsnorm.inverse_rms(x, shape, EPS), "torch's": lambda: factor(x)}, size
    yield "l2", {"fused": lambda: rmsnorm.l2_norm(x, shape), "torch's": lambda: F.normalize(x, dim=-1)}, 2 * size
    # Both with the copies that put back what is overwritten: a half of what moves.
    a, s, c, t = x.clone(), r.clone(), x.clone(), r.clone()
    yield (
        "add in place",
        {
            "fused": lambda: rmsnorm.add_rms_norm_(a.copy_(x), s.copy_(r), w, EPS),
            "add_rms_norm": lambda: add(c.copy_(x), t.copy_(r), shape, w, EPS),
        },
        8 * size,
    )
    if dtype is wide:
        yield (
            "fp32 in, bf16 out",
            {
                "fused": lambda: norm(x, shape, w, EPS, out_dtype=half),
                "rms_norm, to": lambda: norm(x, shape, w, EPS).to(half),
                "torch's": lambda: F.rms_norm(x, shape, w, EPS).to(half),
            },
            size * 3 // 2,
        )
        leaves, g = [x.requires_grad_(), w.requires_grad_()], [dy.to(half)]
        with torch.enable_grad():
            outputs = norm(x, shape, w, EPS, out_dtype=half), norm(x, shape, w, EPS).to(half)
        names = ("fused", "rms_norm, to")
        yield (
            "fp32 in, bf16 out, backward",
            {n: gradient(y, leaves, g) for n, y in zip(names, outputs, strict=True)},
            size * 5 // 2,
        )
        return
    stream, gain = r.float(), w.float()

    def steps(norm: Callable[..., Tensor], first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        total = first + second
        return norm(total, shape, gain, EPS).to(dtype), total

    def unrounded(norm: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        y, total = steps(norm, x.float(), r.float())
        return y, total.to(dtype)

    yield (
        "fp32 residual",
        {
            "fused": lambda: add(x, stream, shape, w, EPS, out_dtype=dtype),
            "+, rms_norm, to": lambda: steps(norm, x, stream),
            "torch's": lambda: steps(F.rms_norm, x, stream),
        },
        size * 6,
    )
    yield (
        "unrounded sum",
        {
            "fused": lambda: add(x, r, shape, w, EPS, round_sum=False),
            "add_rms_norm, rounded": lambda: add(x, r, shape, w, EPS),
            "torch's": lambda: unrounded(F.rms_norm),
        },
        4 * size,
    )
