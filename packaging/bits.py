"""Prints a hash of each result on inputs that are the same bits everywhere: two machines are compared by their lines.

    python packaging/bits.py >here.txt

Inputs are integers divided by powers of two: torch's random numbers go through its own vectorised logarithms, whose
bits depend on the CPU. Each line is of a result that our kernels computed alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import rmsnorm

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((3, 1), (4, 5), (2, 3, 64), (7, 129), (33, 576), (5, 4096))


def numbers(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Of any sign, from 2⁻¹⁵ to 4 in size."""
    count = torch.Size(shape).numel()
    state = torch.arange(count, dtype=torch.int64) * 6364136223846793005 + 1442695040888963407 * (seed + 1)
    state = (state ^ (state >> 29)) * 3202034522624059733
    return (((state >> 40) & 0xFFFFF) - 0x7FFFF).double().div_(2**17).reshape(shape).to(dtype)


def digest(*tensors: Tensor | None) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def results(dtype: torch.dtype, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[Tensor | None, ...]]]:
    n = shape[-1:]
    x, g, r = (numbers(seed, *shape, dtype=dtype) for seed in (1, 2, 3))
    w, b = (numbers(seed, *n, dtype=dtype) for seed in (4, 5))

    def gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, inputs, g.to(y.dtype))

    for casting in ("torch", "llama"):
        for offset in (0.0, 1.0):
            a, v = x.clone().requires_grad_(), w.clone().requires_grad_()
            y = rmsnorm.rms_norm(a, n, v, 1e-5, offset=offset, casting_mode=casting)
            yield f"rms_norm {casting} {offset}", (y, *gradients(y, a, v))
    yield "rms_norm no weight", (rmsnorm.rms_norm(x, n, None, 1e-6),)
    y, total = rmsnorm.add_rms_norm(x, r, n, w, 1e-5)
    yield "add_rms_norm", (y, total)
    a, v, c = x.clone().requires_grad_(), w.clone().requires_grad_(), b.clone().requires_grad_()
    y = rmsnorm.layer_norm(a, n, v, c, 1e-5)
    yield "layer_norm", (y, *gradients(y, a, v, c))
    a, z, v = x.clone().requires_grad_(), r.clone().requires_grad_(), w.clone().requires_grad_()
    y = rmsnorm.gated_rms_norm(a, z, n, v, 1e-5)
    yield "gated_rms_norm", (y, *gradients(y, a, z, v))
    with rmsnorm.installed():
        a, v = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = F.rms_norm(a, n, v, 1e-5)
        yield "F.rms_norm", (y, *gradients(y, a, v))
    rows = x.clone()
    rows.view(-1)[0] = 3e38 if dtype in (torch.float32, torch.bfloat16) else 6e4
    rows.view(-1)[-1] = float("nan")
    yield "huge, and a NaN", (rmsnorm.rms_norm(rows, n, w, 1e-5).nan_to_num(7.0),)


def main() -> None:
    if not rmsnorm.info().native:
        raise SystemExit(f"no native library: {rmsnorm.info().why_not_native}")
    for dtype in DTYPES:
        for shape in SHAPES:
            for name, tensors in results(dtype, shape):
                print(str(dtype).removeprefix("torch."), "x".join(map(str, shape)), name, digest(*tensors))


if __name__ == "__main__":
    main()
