"""Proves that the modulated norm and the gated add are their steps done one after the other, to the bit where the steps
round as they do; the truth beside them is longdouble's.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from oracle import DTYPES, EPS, HALVES, LAYOUTS, alike, exact, incoming, lay_out, rows_of, same_bits, sample, ulp
from torch import Tensor

from rmsnorm import gated_add, layer_norm, modulated_norm, rms_norm

COLUMNS = (0, 1, 3, 127, 129, 576, 1027, 5137)
STATISTICS = ("rms", "layer")
# [samples, tokens] of a modulation for inputs of 2 samples of so many tokens.
SHARED = {"sample": (2, 1), "token": (2, None), "all": (1, 1)}
Modulations = dict[str, Tensor]


def inputs(tokens: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, residual = (sample(2 * tokens, columns, seed=seed).view(2, tokens, columns) for seed in (0, 2))
    return x.to(dtype), (residual * 1.37).to(dtype)


def modulations(shared: str, tokens: int, columns: int, dtype: torch.dtype) -> Modulations:
    dice = torch.Generator().manual_seed(columns)
    samples, own = SHARED[shared]
    sizes = samples, tokens if own is None else own, columns
    return {n: torch.randn(sizes, generator=dice).to(dtype) for n in ("scale", "shift", "gate")}


def norm(x: Tensor, statistic: str) -> Tensor:
    columns = (x.shape[-1],)
    return rms_norm(x, columns, None, EPS) if statistic == "rms" else layer_norm(x, columns, None, None, EPS)


def steps(x: Tensor, residual: Tensor | None, m: Modulations, statistic: str, mode: str = "llama") -> list[Tensor]:
    """A model's lines: ``[output]`` or ``[output, sum]``. Mode torch in fp32 (fp64), rounded at the end."""
    dtype = x.dtype
    wide = torch.promote_types(dtype, torch.float32) if mode == "torch" else dtype
    shift, gate, s = m.get("shift"), m.get("gate"), x
    if residual is not None:
        gated = x.to(wide) if gate is None else gate.to(wide) * x.to(wide)
        s = (residual.to(wide) + gated).to(dtype)
    y = norm(s.to(wide), statistic) * (1 + m["scale"].to(wide))
    y = (y if shift is None else y + shift.to(wide)).to(dtype)
    return [y] if residual is None else [y, s]


def fused(x: Tensor, residual: Tensor | None, m: Modulations, statistic: str, mode: str = "llama") -> list[Tensor]:
    named = {name: value for name, value in m.items() if name != "gate" or residual is not None}
    found = modulated_norm(
        x, x.shape[-1], None, EPS, residual=residual, statistic=statistic, casting_mode=mode, **named
    )
    return [found] if residual is None else list(found)


def small(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    dice = torch.Generator().manual_seed(1)
    return [torch.randn(sizes, generator=dice, dtype=dtype).requires_grad_() for sizes in
            ((2, 3, 4), (2, 3, 4), (2, 4), (2, 4), (2, 4))]  # fmt: skip


def only(m: Modulations, names: str) -> Modulations:
    return {name: m[name] for name in names.split()}


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_those_of_the_steps(target, dtype, columns):
    """Llama's rounding, that of models in eager mode; in fp32 and fp64 it is both modes'."""
    for shared, tokens in (*product(SHARED, (1, 3)), ("sample", 0), ("sample", 513 if columns in (3, 129) else 37)):
        x, residual = inputs(tokens, columns, dtype)
        m = modulations(shared, tokens, columns, dtype)
        for statistic, names, other in product(
            STATISTICS, ("scale", "scale shift", "scale shift gate"), (None, residual)
        ):
            if other is None and "gate" in names:
                continue
            got = fused(x, other, only(m, names), statistic)
            wanted = steps(x, other, only(m, names), statistic)
            assert all(t.is_contiguous() for t in got)
            assert all(map(same_bits, got, wanted)), (shared, tokens, statistic, names)
            if dtype not in HALVES:
                assert all(map(same_bits, fused(x, other, only(m, names), statistic, "torch"), wanted))
        assert same_bits(gated_add(x, residual, m["gate"], casting_mode="llama"), residual + m["gate"] * x)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounded_once(target, dtype):
    """Mode torch of a half type, with modulations of its own type and of fp32, against fp64: 0.51 ulp of the output,
    and what fp32 loses of the larger term where two cancel."""
    for columns in (1, 31, 129, 1027):
        check_rounded_once(dtype, columns)


def check_rounded_once(dtype: torch.dtype, columns: int) -> None:
    for kind, statistic, shared in product((dtype, torch.float32), STATISTICS, SHARED):
        x, residual = inputs(3, columns, dtype)
        m = modulations(shared, 3, columns, kind)
        y, s = fused(x, residual, m, statistic, "torch")
        assert y.dtype is s.dtype is dtype
        scale, shift, gate, wide, given = (exact(t) for t in (m["scale"], m["shift"], m["gate"], x, residual))
        total = given + gate * wide
        margin = 0.51 * ulp(total, dtype) + 2.0**-22 * (np.abs(given) + np.abs(gate * wide))
        assert (np.abs(exact(s) - total) <= margin).all()
        z = exact(s)
        z = z - z.mean(-1, keepdims=True) if statistic == "layer" else z
        term = z / np.sqrt((z * z).mean(-1, keepdims=True) + EPS) * (1 + scale)
        margin = 0.52 * ulp(term + shift, dtype) + 2.0**-17 * (np.abs(term) + np.abs(shift) + np.abs(1 + scale))
        assert (np.abs(exact(y) - (term + shift)) <= margin).all(), (columns, kind, statistic, shared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values(native_target, dtype):
    """Against longdouble: 2 (LayerNorm 3.6) ulps of the product, and half of one of the sum."""
    for columns in (1, 31, 129, 1027):
        check_values(dtype, columns)


def check_values(dtype: torch.dtype, columns: int) -> None:
    for statistic in STATISTICS:
        x, _ = inputs(5, columns, dtype)
        m = modulations("sample", 5, columns, dtype)
        (y,) = fused(x, None, only(m, "scale shift"), statistic)
        z, scale, shift = (exact(t).astype(np.longdouble) for t in (x, m["scale"], m["shift"]))
        z = z - z.mean(-1, keepdims=True) if statistic == "layer" else z
        term = z / np.sqrt((z * z).mean(-1, keepdims=True) + np.longdouble(EPS)) * (1 + scale)
        wanted = term + shift
        units = 2.6 if statistic == "rms" else 3.6
        margin = units * ulp(term, dtype) + 0.51 * ulp(wanted, dtype)
        margin += np.abs(1 + scale) * (2.0**-40 if dtype is torch.float32 else 2.0**-60) * 64
        assert (np.abs(exact(y) - wanted) <= margin).all(), (columns, statistic)


def differentiate(function, x: Tensor, residual: Tensor | None, m: Modulations, statistic: str, mode: str = "llama"):
    """The gradients, by name."""
    named = {"x": x, "residual": residual, **m}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in named.items() if t is not None}
    outputs = function(leaves["x"], leaves.get("residual"), {n: leaves[n] for n in m}, statistic, mode)
    grads = [incoming(t.shape[0] * t.shape[1], t.shape[2], t.dtype).view(t.shape) for t in outputs]
    return dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), grads), strict=True))


def sizes(x: Tensor, residual: Tensor | None, m: Modulations, statistic: str) -> dict[str, Tensor]:
    """Of each gradient the sum of its terms' sizes, which are what rounding is relative to: ds of the row's largest h,
    r·h·(1 + |x̂|) and what arrives at the sum."""
    s = steps(x, residual, m, statistic)[-1] if residual is not None else x
    grads = [incoming(t.shape[0] * t.shape[1], t.shape[2], t.dtype).view(t.shape).abs() for t in (x, x)]
    z = s - s.mean(-1, keepdim=True) if statistic == "layer" else s
    r = (z.square().mean(-1, keepdim=True) + EPS).rsqrt()
    h = (grads[0] * (1 + m["scale"]).abs()).amax(-1, keepdim=True)
    # Of s rounding is relative to what was added, and to the mean.
    far = (x * m.get("gate", 1.0)).abs() + (0 if residual is None else residual.abs())
    far = far.amax(-1, keepdim=True) * r
    ds = r * h * (1 + (z * r).abs() + far) * (1 + (z * r).abs()) + (0 if residual is None else grads[1])
    normalised = (z * r).abs() + far
    found = {"x": ds, "residual": ds, "scale": grads[0] * normalised, "shift": grads[0], "gate": ds * x.abs()}
    if "gate" in m:
        found["x"] = ds * m["gate"].abs()
    return {n: t.sum_to_size(m[n].shape) if n in m else t for n, t in found.items()}


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(target, dtype, shared):
    """Against longdouble's, or fp64's, of the formula: 16 units of the type, relative to the terms (64 of a half type,
    whose sum is rounded before it is normalised)."""
    for columns, tokens in product((1, 3, 129, 576), (1, 3, 70)):
        check_gradients(dtype, shared, columns, tokens)


def check_gradients(dtype: torch.dtype, shared: str, columns: int, tokens: int) -> None:
    for statistic in STATISTICS:
        x, residual = inputs(tokens, columns, dtype)
        m = modulations(shared, tokens, columns, dtype)
        for other, names in ((None, "scale shift"), (residual, "scale shift gate"), (residual, "scale")):
            given = only(m, names)
            got = differentiate(fused, x, other, given, statistic)
            wide = {name: t.double() for name, t in given.items()}
            whole = x.double(), None if other is None else other.double(), wide, statistic
            truth, size = differentiate(steps, *whole), sizes(*whole)
            for name, grad in got.items():
                assert grad.dtype is dtype
                assert grad.shape == truth[name].shape
                unit = torch.finfo(dtype).eps * 16 * (4 if dtype in HALVES else 1)
                apart = (grad.double() - truth[name]).abs()
                good = apart <= unit * (size[name] + truth[name].abs()) + torch.finfo(dtype).smallest_normal
                assert good.all(), (name, columns, tokens, statistic, names, (apart / size[name]).max() / unit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(target, dtype):
    """The bits of contiguous tensors, for all operands and gradients; chunks of one tensor are read where they lie."""
    rows = 10
    for layout, other in [*product(LAYOUTS, ["contiguous"]), *product(["sliced"], LAYOUTS)]:
        results = []
        for arrange in (lay_out, rows_of):
            tensors = [sample(rows, 129, dtype, seed=seed) for seed in range(5)]
            kinds = (layout, other, layout, other, layout)
            x, residual, gate, scale, shift = alike(*(arrange(t, kind) for t, kind in zip(tensors, kinds, strict=True)))
            leaves = [t.detach().requires_grad_() for t in (x, residual, gate, scale, shift)]
            outputs = modulated_norm(
                leaves[0], 129, None, EPS, residual=leaves[1], gate=leaves[2], scale=leaves[3], shift=leaves[4]
            )
            grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(outputs[0]), outputs[0].detach() / 64])
            results.append([*outputs, gated_add(*leaves[:3]), *grads])
        for one, two in zip(*results, strict=True):
            if target != "reference":
                assert same_bits(one.reshape(two.shape), two), (layout, other)
    both = torch.randn(2, 3 * 129, generator=torch.Generator().manual_seed(0)).to(dtype)
    x, _ = inputs(7, 129, dtype)
    chunks = both.chunk(3, 1)
    apart = [t.clone() for t in chunks]
    one, two = (modulated_norm(x, 129, scale=scale, shift=shift) for shift, scale, _ in (chunks, apart))
    assert same_bits(one, two)
    assert same_bits(one, modulated_norm(x, 129, scale=apart[1][:, None], shift=apart[0][:, None]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_alone(native_target, dtype):
    """Same bits for any batch; a sample's gradients are those of the sample alone."""
    x, residual = inputs(300, 129, dtype)
    m = modulations("sample", 300, 129, dtype)
    for statistic in STATISTICS:
        output, total = fused(x, residual, m, statistic)
        grads = differentiate(fused, x, residual, m, statistic)
        second = {name: t[1:] for name, t in m.items()}
        alone = fused(x[1:], residual[1:], second, statistic)
        assert same_bits(output[1:], alone[0])
        assert same_bits(total[1:], alone[1])
        one = fused(x[1:, 7:8], residual[1:, 7:8], second, statistic)
        assert same_bits(output[1:, 7:8], one[0])
        assert all(t.isfinite().all() for t in grads.values())
        dy = torch.ones_like(x)
        shared = [t.clone().requires_grad_() for t in (m["scale"], m["shift"])]
        y = modulated_norm(x, 129, None, EPS, scale=shared[0], shift=shared[1], statistic=statistic)
        whole = torch.autograd.grad(y, shared, dy)
        shared = [t[1:].clone().requires_grad_() for t in (m["scale"], m["shift"])]
        y = modulated_norm(x[1:], 129, None, EPS, scale=shared[0], shift=shared[1], statistic=statistic)
        for a, b in zip(whole, torch.autograd.grad(y, shared, dy[1:]), strict=True):
            assert same_bits(a[1:], b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_threads(native_target, threads, dtype):
    """150 rows of each sample are five chunks: 3 threads and 5 begin within a sample."""
    x, residual = inputs(150, 576, dtype)
    for shared in SHARED:
        m = modulations(shared, 150, 576, dtype)
        results = []
        for count in (1, 2, 3, 5):
            threads(count)
            results.append([*fused(x, residual, m, "layer"), *differentiate(fused, x, residual, m, "layer").values()])
        for result in results[1:]:
            assert all(map(same_bits, results[0], result))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_tensors(native_target, everything_is_large, dtype):
    """What goes past the caches: the same bits, aligned or not."""
    everything_is_large()
    for columns, statistic in product((96, 576, 4096, 1027), STATISTICS):
        x, residual = inputs(35, columns, dtype)
        m = modulations("sample", 35, columns, dtype)
        assert all(map(same_bits, fused(x, residual, m, statistic), steps(x, residual, m, statistic)))
        assert all(map(same_bits, fused(x, None, only(m, "scale shift"), statistic), steps(x, None, m, statistic)))
        assert same_bits(gated_add(x, residual, m["gate"], casting_mode="llama"), residual + m["gate"] * x)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_size(target, dtype, statistic):
    """Rows whose squares over- or underflow, zeros, NaN and Inf: as the steps, and their gradients finite."""
    info = torch.finfo(dtype)
    sizes = [0.0, info.max / 8, info.smallest_normal * 4, info.smallest_normal * info.eps, torch.nan, torch.inf, 1.0]
    x, _ = inputs(len(sizes), 129, dtype)
    for i, size in enumerate(sizes):
        x[0, i] = (sample(1, 129).sign() * size).to(dtype)
        if not torch.tensor(size).isfinite():
            x[0, i, 1:] = 1
    for shared in SHARED:
        m = only(modulations(shared, len(sizes), 129, dtype), "scale shift")
        (got,), (wanted,) = fused(x, None, m, statistic), steps(x, None, m, statistic)
        if target != "reference":
            assert torch.equal(got.isnan(), wanted.isnan())
            assert same_bits(got.nan_to_num(), wanted.nan_to_num())
            small = differentiate(fused, x[:, [0, 2, 3, 6]], None, {n: t[:, :1] for n, t in m.items()}, statistic)
            assert small["shift"].isfinite().all()
            alone = differentiate(fused, x[:1, 6:], None, {n: t[:1, -1:] for n, t in m.items()}, statistic)["x"]
            same = differentiate(fused, x, None, m, statistic)["x"]
            assert same[0, :4].isnan().sum() == 0 or dtype is torch.float16
            assert alone.isfinite().all()


def test_types_that_no_kernel_has(target):
    """Modulations of other types, a weight: the steps, promoted as torch does, or rounded to the input's type."""
    for dtype, kind in product((torch.float32, *HALVES), (torch.float32, torch.float64, torch.bfloat16)):
        x, residual = inputs(3, 31, dtype)
        m = modulations("sample", 3, 31, kind)
        got, wanted = fused(x, residual, m, "rms"), steps(x, residual, m, "rms")
        assert got[1].dtype is torch.promote_types(dtype, kind) or got[1].dtype is wanted[1].dtype
        y, s = fused(x, residual, m, "rms", "torch")
        assert y.dtype is s.dtype is dtype
    x, residual = inputs(3, 31, torch.float32)
    m, w = modulations("sample", 3, 31, torch.float32), torch.linspace(0.5, 2, 31)
    got = modulated_norm(x, 31, w, EPS, residual=residual, **m)
    s = residual + m["gate"] * x
    assert same_bits(got[1], s)
    assert same_bits(got[0], rms_norm(s, 31, w, EPS) * (1 + m["scale"]) + m["shift"])
    leaf = w.clone().requires_grad_()
    modulated_norm(x, 31, leaf, EPS, scale=m["scale"]).sum().backward()
    assert leaf.grad is not None


def test_modulations_that_are_shared_in_several_ways(target):
    """A scale of each sample, a shift of each token, a gate of all; a scale of each token but of no sample."""
    x, residual = inputs(5, 31, torch.float64)
    m = {name: modulations(shared, 5, 31, torch.float64)[name] for name, shared in
         (("scale", "sample"), ("shift", "token"), ("gate", "all"))}  # fmt: skip
    for scale in (m["scale"], m["scale"][:1].expand(1, 5, 31).clone()):
        given = m | {"scale": scale}
        for one, two in zip(fused(x, residual, given, "rms"), steps(x, residual, given, "rms"), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            *(differentiate(f, x, residual, given, "rms") for f in (fused, steps)), rtol=1e-9, atol=1e-9
        )
