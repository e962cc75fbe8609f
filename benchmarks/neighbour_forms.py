"""The forms of benchmarks/neighbours.py: each fused call, and the separate steps that it stands for, by name.

A function makes one case: its calls, the first of which is ours, and the bytes that have to move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rmsnorm

Calls = dict[str, Callable[[], Any]]
EPS = 1e-6


def noise(*sizes: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantised(rows: int, columns: int, dtype: torch.dtype, residual: bool) -> tuple[Calls, int]:
    """int8 behind the norm: torchao's quantiser behind ours."""
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

    x, r = noise(rows, columns, dtype=dtype), noise(rows, columns, dtype=dtype, seed=1)
    w = 1 + noise(columns, dtype=dtype, seed=2) / 4

    def fused() -> Any:
        return rmsnorm.quantised_rms_norm(x, (columns,), w, EPS, residual=r if residual else None)

    def separate() -> Any:
        if residual:
            y, sum = rmsnorm.add_rms_norm(x, r, (columns,), w, EPS)
        else:
            y = rmsnorm.rms_norm(x, (columns,), w, EPS)
        q = Int8Tensor.from_hp(y, granularity=PerRow())
        return (q.qdata, q.scale, sum) if residual else (q.qdata, q.scale)

    moved = x.nbytes * (3 if residual else 1) + x.numel()
    return {"fused": fused, "ours + torchao": separate}, moved


def heads(tokens: int, dtype: torch.dtype, normed: bool, back: bool) -> tuple[Calls, int]:
    """32 query heads and 8 key heads of 128, as projections leave them: Qwen3's lines, or Llama's without the norm."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    width = 128
    both = [noise(1, tokens, n * width, dtype=dtype, seed=n).requires_grad_(back) for n in (32, 8)]
    angle = torch.outer(torch.arange(tokens) + 1.0, 1e4 ** -(torch.arange(width // 2) * 2 / width)).repeat(1, 2)[None]
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    norms = [Qwen3RMSNorm(width, EPS).to(dtype).requires_grad_(back) for _ in both]
    weights = [norm.weight for norm in norms]
    grads = [noise(1, n, tokens, width, dtype=dtype, seed=n) for n in (32, 8)]

    def split(norm: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
        return [norm(x.view(1, tokens, -1, width), i).transpose(1, 2) for i, x in enumerate(both)]

    def ours(x: Tensor, i: int) -> Tensor:
        return rmsnorm.rms_norm(x, (width,), weights[i], EPS, casting_mode="llama")

    def fused() -> Any:
        q, k = split(lambda x, i: x)
        if not normed:
            return rmsnorm.rope(q, k, cos, sin)
        return rmsnorm.heads_rms_norm_rope(q, k, cos, sin, *weights, EPS, casting_mode="llama")

    calls: Calls = {"fused": fused}
    if normed:
        calls["Qwen3's"] = lambda: apply_rotary_pos_emb(*split(lambda x, i: norms[i](x)), cos, sin)
        calls["ours + Qwen3's"] = lambda: apply_rotary_pos_emb(*split(ours), cos, sin)
    else:
        calls["Llama's"] = lambda: apply_rotary_pos_emb(*split(lambda x, i: x), cos, sin)
    moved = sum(x.nbytes for x in both) * (3 if back and normed else 2)
    if back:
        leaves = both + weights if normed else both
        with torch.enable_grad():
            calls = {name: gradient(call(), leaves, grads) for name, call in calls.items()}
    return calls, moved


def gradient(outputs: Any, leaves: list[Tensor], grads: list[Tensor]) -> Callable[[], Any]:
    """Backward alone, of a graph that is kept."""
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def norm_add(rows: int, columns: int, dtype: torch.dtype) -> tuple[Calls, int]:
    """The first half of the sandwich alone."""
    x, r = noise(rows, columns, dtype=dtype), noise(rows, columns, dtype=dtype, seed=1)
    w = 1 + noise(columns, dtype=dtype, seed=2) / 4
    return {
        "fused": lambda: rmsnorm.rms_norm_add(x, r, (columns,), w, EPS),
        "rms_norm, +": lambda: r + rmsnorm.rms_norm(x, (columns,), w, EPS),
        "torch's": lambda: r + F.rms_norm(x, (columns,), w, EPS),
    }, 3 * x.nbytes


def sandwich(rows: int, columns: int, dtype: torch.dtype, backward: bool) -> tuple[Calls, int]:
    """Norm, add, norm: as Gemma 2 and 3 have them, by our own calls and by torch's."""
    x, r, dy, ds = (noise(rows, columns, dtype=dtype, seed=seed).requires_grad_(backward) for seed in range(4))
    w, v = (1 + noise(columns, dtype=dtype, seed=seed) / 4 for seed in (4, 5))
    leaves = [x, r, w.requires_grad_(backward), v.requires_grad_(backward)]

    def steps(norm: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        s = r + norm(x, (columns,), w, EPS)
        return norm(s, (columns,), v, EPS), s

    def ours() -> tuple[Tensor, Tensor]:
        return rmsnorm.add_rms_norm(rmsnorm.rms_norm(x, (columns,), w, EPS), r, (columns,), v, EPS)

    calls: Calls = {
        "fused": lambda: rmsnorm.sandwich_rms_norm(x, r, (columns,), w, v, EPS),
        "rms_norm, +, rms_norm": lambda: steps(rmsnorm.rms_norm),
        "rms_norm, add_rms_norm": ours,
        "torch's": lambda: steps(F.rms_norm),
    }
    if not backward:
        return calls, 4 * x.nbytes

    return {name: gradient(call(), leaves, [dy, ds]) for name, call in calls.items()}, 6 * x.nbytes


def modulated(sizes: tuple[int, ...], dtype: torch.dtype, layer: bool, added: bool, back: bool) -> tuple[Calls, int]:
    """AdaLN of samples, with or without the gated add before it: diffusers' lines, with torch's norms and with ours."""
    x, r = (noise(*sizes, dtype=dtype, seed=seed).requires_grad_(back) for seed in (0, 1))
    width = sizes[-1:]
    both = noise(sizes[0], 3 * width[0], dtype=dtype, seed=2).requires_grad_(back)
    shift, scale, gate = both.chunk(3, 1)
    mode = "torch" if dtype is torch.float32 else "llama"
    statistic = "layer" if layer else "rms"

    def torchs(x: Tensor) -> Tensor:
        return F.layer_norm(x, width, None, None, EPS) if layer else F.rms_norm(x, width, None, EPS)

    def ours(x: Tensor) -> Tensor:
        return rmsnorm.layer_norm(x, width, None, None, EPS) if layer else rmsnorm.rms_norm(x, width, None, EPS)

    def lines(norm: Callable[[Tensor], Tensor]) -> Any:
        s = r + gate.unsqueeze(1) * x if added else x
        y = norm(s) * (1 + scale[:, None]) + shift[:, None]
        return (y, s) if added else y

    def fused() -> Any:
        options: dict[str, Any] = {"statistic": statistic, "casting_mode": mode, "scale": scale, "shift": shift}
        if added:
            options |= {"residual": r, "gate": gate}
        return rmsnorm.modulated_norm(x, width, None, EPS, **options)

    calls: Calls = {"fused": fused, "torch's": lambda: lines(torchs), "ours, separate": lambda: lines(ours)}
    if not back:
        return calls, x.nbytes * (4 if added else 2)
    grads = [noise(*sizes, dtype=dtype, seed=seed) for seed in (3, 4)][: 1 + added]
    leaves = [x, r, both] if added else [x, both]
    with torch.enable_grad():
        calls = {name: gradient(call(), leaves, grads) for name, call in calls.items()}
    return calls, x.nbytes * (6 if added else 3)
