"""The only file that makes orthogonal matrices: random ones, and randomised Hadamard matrices of any width."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("hadamard", "random")


def orthogonal(width: int, kind: str, seed: int) -> Tensor:
    """An orthogonal matrix ``[width, width]`` in fp64, the same for the same seed.

    ``random`` is the Q of a Gaussian matrix's QR, with the signs that make it Haar's. ``hadamard`` is ``diag(s) · (H ⊗
    R)``: signs s, the Hadamard matrix H of the largest power of two in the width, and a random R of the odd rest. Every
    entry of a row of H has one size, so a single large number is spread over as many as H has columns.
    """
    dice = torch.Generator().manual_seed(seed)
    if kind == "random":
        return _haar(width, dice)
    power = width & -width
    signs = torch.randint(0, 2, (width,), generator=dice).double() * 2 - 1
    matrix = _hadamard(power)
    if power < width:
        matrix = torch.kron(matrix, _haar(width // power, dice).contiguous())
    return signs[:, None] * matrix


def _hadamard(size: int) -> Tensor:
    """Sylvester's, normalised."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * size**-0.5


def _haar(width: int, dice: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(width, width, generator=dice, dtype=torch.float64))
    return q * r.diagonal().sign()
