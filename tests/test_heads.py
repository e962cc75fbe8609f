"""Proves that heads come out normed and turned as models do it: values against a float64 oracle, bits against the
separate steps and the functions of transformers, gradients and transforms against the formula.
"""

from __future__ import annotations

import importlib
from itertools import product

import pytest
import torch
from heads_oracle import Form, formula
from oracle import DTYPES, HALVES, MODES, bound, gains, same_bits, sample
from torch import Tensor

from rmsnorm import heads_rms_norm_rope, rms_norm, rope
from rmsnorm.forms import heads_ops

FORMS = [Form(mode=mode, interleaved=interleaved) for mode, interleaved in product(MODES, (False, True))]
# head_dim and the columns that are turned: none, all, some; pairs that end within a vector, and beyond one.
WIDTHS = [
    (1, 0),
    (2, 2),
    (3, 2),
    (31, 6),
    (64, 64),
    (80, 80),
    (127, 126),
    (128, 128),
    (129, 64),
    (576, 288),
    (1027, 74),
]


def heads(batch: int, count: int, tokens: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """As a projection leaves them: [batch, heads, tokens, head_dim], and the heads of a token side by side."""
    rows = sample(batch * count * tokens + seed, columns, dtype)[seed:]
    return rows.view(batch, tokens, count, columns).transpose(1, 2)


def angles(tokens: int, turned: int, dtype: torch.dtype, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Of no pattern: the two columns of a pair differ."""
    generator = torch.Generator().manual_seed(tokens + turned)
    angle = 6.3 * torch.rand(*batch, tokens, turned, generator=generator, dtype=torch.float64)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def angle_types(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return (dtype, torch.float32) if dtype in HALVES else (dtype,)


def projected(columns: int, dtype: torch.dtype, tokens: int = 5) -> tuple[Tensor, Tensor]:
    return heads(2, 4, tokens, columns, dtype), heads(2, 2, tokens, columns, dtype, 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_values(target, dtype, form):
    """Awkward widths, weights of other types, an offset, angles of both types, with a batch and without."""
    for columns, turned in WIDTHS:
        both, batch = projected(columns, dtype), (2,) if columns % 2 else ()
        for kind in angle_types(dtype):
            cos, sin = angles(5, turned, kind, batch)
            own = gains(columns, dtype=dtype)
            weights = [(None, None), (own, own.flip(0)), (own, None)]
            if form.mode == "torch" and dtype in HALVES:
                weights.append((gains(columns, dtype=torch.float32), own))
            for pair in weights:
                got = heads_rms_norm_rope(*both, cos, sin, *pair, **form.options())
                for x, weight, z in zip(both, pair, got, strict=True):
                    assert z.transpose(-3, -2).is_contiguous()
                    form.bounds(x, weight, cos, sin, bound(target, dtype)).check(z, (columns, turned, kind))
            got = rope(*both, cos, sin, interleaved=form.interleaved)
            for x, z in zip(both, got, strict=True):
                assert z.transpose(-3, -2).is_contiguous()
                form.bounds(x, None, cos, sin, None).check(z, (columns, turned, kind, "no norm"))
    with_offset, own, both = Form(1.0, form.mode, form.interleaved), gains(576, dtype=dtype), projected(576, dtype)
    cos, sin = angles(5, 576, dtype)
    for x, z in zip(both, call(with_offset, *both, cos, sin, own), strict=True):
        with_offset.bounds(x, own, cos, sin, bound(target, dtype)).check(z, "offset")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_and_many_columns(target, dtype):
    """More rows than a batch, in one head and in many; heads beyond L1. And the weight's gradient, in chunks."""
    for shape, turned in (
        ((1, 1, 1025, 64), 64),
        ((1, 205, 5, 64), 32),
        ((1, 2, 1, 5137), 5136),
        ((1, 3, 1, 5137), 256),
    ):
        columns, form = shape[-1], Form(mode="llama", interleaved=turned == 256)
        x = heads(shape[0], shape[1], shape[2], columns, dtype).requires_grad_()
        cos, sin = angles(shape[2], turned, dtype)
        weight = gains(columns, dtype=dtype).requires_grad_()
        z, _ = call(form, x, x[:, :1], cos, sin, weight)
        form.bounds(x.detach(), weight.detach(), cos, sin, bound(target, dtype)).check(z, shape)
        got = torch.autograd.grad(z, weight, torch.ones_like(z))[0].double()
        wide = [t.detach().double() for t in (x, cos, sin, weight)]
        truth = formula(form, *wide[:3], wide[3].requires_grad_())
        wanted = torch.autograd.grad(truth, wide[3], torch.ones_like(truth))[0]
        margin = 0.51 * torch.finfo(dtype).eps * wanted.abs()
        margin += 64 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * wanted.abs().max()
        assert ((got - wanted).abs() <= margin).all(), shape


def call(form: Form, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None = None):
    return heads_rms_norm_rope(query, key, cos, sin, weight, weight, **form.options())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_those_of_the_steps(native_target, dtype):
    """The norm alone, then rope; and rope is the lines that models have."""
    for form, (columns, turned) in product((*FORMS, Form(1.0)), WIDTHS):
        both, weights = projected(columns, dtype), (gains(columns, dtype=dtype), None)
        for kind in angle_types(dtype):
            cos, sin = angles(5, turned, kind)
            normed = [
                rms_norm(x, columns, w, form.eps, offset=form.offset, casting_mode=form.mode)
                for x, w in zip(both, weights, strict=True)
            ]
            steps = rope(*normed, cos, sin, interleaved=form.interleaved)
            whole = heads_rms_norm_rope(*both, cos, sin, *weights, **form.options())
            lines = heads_ops.rope(*normed, cos, sin, form.interleaved)
            for a, b, c in zip(whole, steps, lines, strict=True):
                assert same_bits(a, b), (columns, turned, kind)
                assert same_bits(b, c), (columns, turned, kind)


def bfloat16(first: int, last: int) -> Tensor:
    """All numbers whose magnitudes have these bits, of both signs, as heads of 64."""
    magnitudes = torch.arange(first, last, dtype=torch.int32)
    both = torch.cat((magnitudes, magnitudes - 2**15)).to(torch.int16).view(torch.bfloat16)
    return both[torch.randperm(both.numel(), generator=torch.Generator().manual_seed(1))].view(1, 4, -1, 64)


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_of_all_numbers(native_target, interleaved):
    """bf16 products are rounded in fewer steps where no number is unusual: all that aren't, by angles from 2^-40 on;
    then all that there are, by any angle. A NaN is a NaN."""
    for first, last, angle in ((64 << 7, 192 << 7, (87 << 7, 128 << 7)), (0, 1 << 15, (0, 1 << 15))):
        x, some = bfloat16(first, last), bfloat16(*angle).flatten()[: 2 * 64 * 256]
        tokens = x.shape[-2]
        cos, sin = (some.roll(k)[: tokens * 64].view(tokens, 64) for k in (0, 9))
        cos, sin = (torch.where(torch.arange(tokens)[:, None] % 5 == k, 0.0, t) for k, t in ((3, cos), (4, sin)))
        got = rope(x, x[:, :2], cos.bfloat16(), sin.bfloat16(), interleaved=interleaved)
        wanted = heads_ops.rope(x, x[:, :2], cos.bfloat16(), sin.bfloat16(), interleaved)
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            assert same_bits(a.nan_to_num(1.0), b.nan_to_num(1.0))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("model", ["llama", "qwen3", "gemma3", "olmo2", "glm"])
def test_functions_of_transformers(native_target, dtype, model):
    """``apply_rotary_pos_emb`` of each, bit for bit, at one token and at several; OLMo 2's behind its own norm."""
    pytest.importorskip("transformers")
    theirs = importlib.import_module(f"transformers.models.{model}.modeling_{model}").apply_rotary_pos_emb
    for tokens, (width, turned) in product(
        (1, 37), ((128, 64), (64, 64)) if model == "glm" else ((128, 128), (80, 80))
    ):
        both = projected(width, dtype, tokens)
        frequencies = torch.outer(torch.arange(tokens) + 3.0, 1e4 ** -(torch.arange(turned // 2) * 2.0 / turned))
        embedding = torch.cat((frequencies, frequencies), -1)[None]
        cos, sin = embedding.cos().to(dtype), embedding.sin().to(dtype)
        wanted = theirs(*both, cos, sin)
        if model == "glm":
            cos, sin = (angle[..., : turned // 2].repeat_interleave(2, -1) for angle in (cos, sin))
        for a, b in zip(rope(*both, cos, sin, interleaved=model == "glm"), wanted, strict=True):
            assert same_bits(a, b)


def functions(form: Form, normed: bool, cos: Tensor, sin: Tensor):
    """Ours, and the truth, of query, key and weights."""

    def ours(q, k, *w):
        if normed:
            return heads_rms_norm_rope(q, k, cos, sin, *w, **form.options())
        return rope(q, k, cos, sin, interleaved=form.interleaved)

    def truth(q, k, v=None, w=None):
        wide = cos.double(), sin.double()
        return formula(form, q, *wide, v, normed), formula(form, k, *wide, w, normed)

    return ours, truth


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [*FORMS, Form(1.0)], ids=str)
def test_gradients(target, dtype, form):
    """Against autograd of the formula in float64: errors are those of the arithmetic, on the size of what is summed."""
    for (columns, turned), normed in product(((3, 2), (80, 80), (128, 64), (1027, 74)), (True, False)):
        kind = torch.float32 if dtype in HALVES and columns == 80 else dtype
        cos, sin = angles(5, turned, kind)
        leaves = [*projected(columns, dtype), gains(columns, dtype=dtype), gains(columns, dtype=dtype).flip(0)][
            : 4 if normed else 2
        ]
        grads = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype) for x in leaves[:2]]

        results = []
        for function, to in zip(functions(form, normed, cos, sin), (dtype, torch.float64), strict=True):
            inputs = [t.to(to).clone(memory_format=torch.preserve_format).requires_grad_() for t in leaves]
            results.append(torch.autograd.grad(function(*inputs), inputs, [g.to(to) for g in grads]))
        eps, unit = torch.finfo(dtype).eps, torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        for got, wanted, leaf in zip(*results, leaves, strict=True):
            assert got.dtype is dtype
            if leaf.dim() > 1:  # back to where a projection wrote
                assert got.transpose(1, 2).is_contiguous()
            size = wanted.abs().amax(-1, keepdim=True)
            margin = 0.51 * eps * wanted.abs() + 64 * unit * size + 2 * torch.finfo(dtype).smallest_normal * eps
            assert ((got.double() - wanted).abs() <= margin).all(), (columns, turned, normed)


def test_a_gradient_of_one_output(target):
    """Of the query alone, with a weight that doesn't learn: nothing else gets one, and the bits are the same."""
    cos, sin = angles(5, 64, torch.float32)
    query, key = (x.requires_grad_() for x in projected(64, torch.float32))
    weight = gains(64, dtype=torch.float32)
    q, _ = heads_rms_norm_rope(query, key, cos, sin, weight, weight, 1e-6)
    (only,) = torch.autograd.grad(q.sum(), query)
    twin = heads_rms_norm_rope(query, key, cos, sin, weight, weight, 1e-6)
    both = torch.autograd.grad(twin[0].sum() + twin[1].sum(), (query, key))
    assert same_bits(only, both[0])
    q, _ = heads_rms_norm_rope(query.detach(), key.detach(), cos, sin, weight.requires_grad_(), None, 1e-6)
    assert torch.autograd.grad(q.sum(), weight)[0].shape == (64,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_depend_on_the_row_alone(native_target, dtype):
    """Not on other tokens, heads or samples, threads or strides, of what comes in and of the gradient."""
    query, key = heads(2, 8, 130, 64, dtype), heads(2, 1, 130, 64, dtype)
    cos, sin = angles(130, 64, dtype, (2,))
    weight = gains(64, dtype=dtype)
    grad = torch.randn(query.shape, generator=torch.Generator().manual_seed(3)).to(dtype)

    def run(q, k, c, s, g):
        q = q.detach().requires_grad_()
        z, w = heads_rms_norm_rope(q, k, c, s, weight, weight, 1e-6, casting_mode="llama")
        x, y = rope(q, k, c, s)
        return z.detach(), w, torch.autograd.grad(z, q, g)[0], x.detach(), y, torch.autograd.grad(x, q, g)[0]

    whole = run(query, key, cos, sin, grad)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert all(map(same_bits, whole, run(query, key, cos, sin, grad)))
    finally:
        torch.set_num_threads(threads)
    expanded = torch.stack((grad, grad), -1)[..., 0]
    dense = query.contiguous(), key.contiguous(), torch.stack((cos, cos), -1)[..., 0], sin, expanded
    assert all(map(same_bits, whole, run(*dense)))
    one = run(query[1:, :, 77:78], key[1:, :, 77:78], cos[1:, 77:78], sin[1:, 77:78], grad[1:, :, 77:78])
    assert all(same_bits(a[1:, :, 77:78], b) for a, b in zip(whole, one, strict=True))
    some = run(query[:, 3:5], key, cos, sin, grad[:, 3:5])
    assert all(same_bits(a[:, 3:5], b) for a, b in zip(whole[::2], some[::2], strict=True) if a.shape[1] == 8)


def test_every_target_has_the_same_bits(restored_target):
    from rmsnorm import _native

    def run(dtype: torch.dtype) -> list[Tensor]:
        found = []
        for form, (columns, turned), kind in product((*FORMS, Form(1.0)), WIDTHS, angle_types(dtype)):
            leaves = [x.requires_grad_() for x in (*projected(columns, dtype), gains(columns, dtype=dtype))]
            cos, sin = angles(5, turned, kind)
            for q, k in (
                call(form, *leaves[:2], cos, sin, leaves[2]),
                rope(*leaves[:2], cos, sin, interleaved=form.interleaved),
            ):
                found += [q.detach(), k.detach()]
                found += torch.autograd.grad(
                    (q, k), leaves[: 3 if q.grad_fn.name().startswith("Heads") else 2], (q.detach(), k.detach())
                )
        return found

    names = _native.cpu_targets()
    for dtype in DTYPES:
        first, *others = [run(dtype) for name in names if _native.set_cpu_target(name) or True]
        for other in others:
            assert all(map(same_bits, first, other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_a_plain_kernel_cannot_do(target, dtype):
    """Squares that over- or underflow, zeros, NaN, Inf: each as the separate steps, and only in its row."""
    largest, smallest = torch.finfo(dtype).max / 4, torch.finfo(dtype).smallest_normal
    rows = torch.randn(6, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64).clamp(-2, 2)
    rows = (rows * torch.tensor([1.0, largest / 2, smallest, 0.0, 1.0, 1.0], dtype=torch.float64)[:, None]).to(dtype)
    rows[4, 3], rows[5, 60] = torch.nan, torch.inf
    x, weight = rows.view(1, 6, 1, 64), gains(64, dtype=dtype)
    cos, sin = angles(1, 64, dtype)
    for form in FORMS:
        z, _ = call(form, x, x, cos, sin, weight)
        normed = rms_norm(x, 64, weight, form.eps, casting_mode=form.mode)
        wanted = rope(normed, normed, cos, sin, interleaved=form.interleaved)[0]
        torch.testing.assert_close(z, wanted, rtol=0, atol=0, equal_nan=True)
        if target != "reference":
            form.bounds(x[:, :4], weight, cos, sin, bound(target, dtype)).check(z[:, :4], form)
        leaf = x.clone().requires_grad_()
        z, _ = call(form, leaf, leaf, cos, sin, weight)
        dx = torch.autograd.grad(z.sum(), leaf)[0]
        assert dx[:, [0, 1, 3]].isfinite().all()


def test_no_rows_and_no_columns(target):
    for shape in ((0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)):
        x, weight = torch.zeros(shape, requires_grad=True), torch.ones(shape[-1:], requires_grad=True)
        cos = torch.ones(shape[-2:])
        for q, k in (heads_rms_norm_rope(x, x, cos, cos, weight, weight), rope(x, x, cos, cos)):
            assert q.shape == k.shape == shape
            assert torch.autograd.grad(q.sum() + k.sum(), x)[0].shape == shape
