"""Proves that torch.compile makes one graph with the bits of eager mode, forward and backward, for fixed and for
changing sizes; and that every operator keeps the rules of torch.library.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from oracle import EPS, gains, incoming, lay_out, same_bits, sample
from torch import Tensor

from rmsnorm import RMSNorm, _ops, add_rms_norm, gated_add, heads_rms_norm_rope, modulated_norm, rms_norm, rope

# torch warns about its own code: inductor still uses TorchScript, and dynamo makes an autograd.Function.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]


def compiled_functions(weight: Tensor) -> dict[str, object]:
    layer = RMSNorm(129, EPS, offset=1.0, dtype=weight.dtype)
    options = {"eps": EPS, "offset": 1.0, "casting_mode": "llama"}
    return {
        "rms_norm": lambda x, w: rms_norm(x, 129, w, **options),
        "add_rms_norm": lambda x, w: add_rms_norm(x, x * 2, 129, w, **options),
        "layer": lambda x, w: torch.func.functional_call(layer, {"weight": w}, (x, x * 2)),
    }


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", compiled_functions(torch.ones(129)))
def test_compiled_equals_eager(name, dynamic, backend):
    """One graph; forward and backward have the bits of eager mode, at every size. Recompiling for a new number of
    rows is an error under dynamic=True."""
    if backend == "inductor" and not shutil.which("c++"):
        pytest.skip("inductor needs a C++ compiler")
    for dtype in (torch.float32, torch.bfloat16):
        torch.compiler.reset()
        eager = compiled_functions(gains(129, dtype=dtype))[name]
        compiled = torch.compile(eager, fullgraph=True, dynamic=dynamic, backend=backend)
        for rows in (6, 17, 3):
            results = []
            for function in (compiled, eager):
                leaves = [sample(rows, 129, dtype).requires_grad_(), gains(129, dtype=dtype).requires_grad_()]
                with torch._dynamo.config.patch(error_on_recompile=dynamic is True):
                    y = function(*leaves)
                y = y if isinstance(y, tuple) else (y,)
                grads = [incoming(rows, 129, dtype)] * len(y)
                results.append([*(t.detach() for t in y), *torch.autograd.grad(y, leaves, grads)])
                with torch.no_grad():
                    again = function(*leaves)
                    results[-1] += again if isinstance(again, tuple) else (again,)
            assert all(map(same_bits, *results)), f"{dtype}, {rows} rows"


SOME = {  # by name: the call, and shapes; sizes of 1 and of the input's
    "rope": (lambda q, cos: rope(q, q, cos, cos)[0], (2, 5, 6, 8), [(1, 6, 8), (6, 8), (2, 6, 8), (2, 1, 8)]),
    "heads": (
        lambda q, cos: heads_rms_norm_rope(q, q, cos, cos, None, None, EPS)[0],
        *((2, 5, 6, 8), [(6, 8), (2, 6, 8)]),
    ),
    "modulated": (
        lambda x, scale: modulated_norm(x, 8, None, EPS, scale=scale, shift=scale),
        *((3, 5, 8), [(3, 8), (3, 1, 8), (1, 5, 8), (3, 5, 8)]),
    ),
    "gated add": (lambda x, gate: gated_add(x, x, gate), (3, 5, 8), [(3, 8), (1, 5, 8)]),
    "add": (lambda x, r: add_rms_norm(x, r, 8, None, EPS)[0], (3, 5, 8), [(3, 5, 8)]),
}


@pytest.mark.parametrize("changing", [(0,), (1,), (0, 1)], ids=["first", "second", "both"])
@pytest.mark.parametrize("name", SOME)
def test_sizes_of_which_some_change(name, changing):
    """A symbolic size beside an equal constant is the same size."""
    call, shape, others = SOME[name]
    for other in others:
        torch.compiler.reset()
        given = [torch.rand(shape), torch.rand(other)]
        for i in changing:
            for dim in range(given[i].dim() - 1):
                torch._dynamo.maybe_mark_dynamic(given[i], dim)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert same_bits(compiled(*given), call(*given)), other


def operator_samples() -> dict[str, tuple[object, ...]]:
    """No rows, no weight, a wider weight, two dimensions, strides; in every operator's arguments."""
    samples = {}
    for case, x, weight, dims in (
        ("plain", sample(6, 12), gains(12), 1),
        ("no rows", sample(0, 12, torch.float32), gains(12, dtype=torch.float32), 1),
        ("no weight", sample(6, 12, torch.bfloat16), None, 1),
        ("wider weight", sample(6, 12, torch.bfloat16), gains(12, dtype=torch.float32), 1),
        ("two dimensions", sample(6, 12, torch.float32).view(6, 3, 4), gains(3, 4, dtype=torch.float32), 2),
        ("strided", lay_out(sample(6, 12, torch.float16), "transposed"), gains(12, dtype=torch.float16), 1),
    ):
        for offset, first in ((0.0, False), (1.0, True)):
            options = weight, dims, EPS, offset, first
            wide = torch.promote_types(x.dtype, weight.dtype) if weight is not None and first else x.dtype
            rstd = torch.ones(*x.shape[:-dims], *[1] * dims, dtype=torch.promote_types(x.dtype, torch.float32))
            grad = lay_out(sample(6, 12, x.dtype), "transposed") if case == "strided" else torch.ones_like(x)
            tail = f"{case}, offset {offset}"
            for name in ("rms_norm", "rms_norm_forward"):
                samples[f"{name}, {tail}"] = (name, x, *options)
            if weight is not None and not offset:
                for name in ("rms_norm_weighted", "rms_norm_rounded"):
                    samples[f"{name}, {case}"] = (name, x, weight, EPS)
                    samples[f"add_{name}, {case}"] = (f"add_{name}", x, grad, weight, EPS)
                into = x, weight, EPS, torch.empty(x.shape, dtype=x.dtype)
                samples[f"rms_norm_weighted_out, {case}"] = ("rms_norm_weighted_out", *into)
                back = grad, x, weight, EPS, True, True
                samples[f"rms_norm_weighted_backward, {case}"] = ("rms_norm_weighted_backward", *back)
            samples[f"rms_norm_out, {tail}"] = ("rms_norm_out", x, *options, torch.empty(x.shape, dtype=wide))
            for name in ("add_rms_norm", "add_rms_norm_forward"):
                samples[f"{name}, {tail}"] = (name, x, grad, *options)
            for needs in ((True, True), (True, False), (False, True)):
                grad_sum = x if needs[1] and first else None
                arguments = grad, grad_sum, x, rstd, *options[:4], *needs
                samples[f"rms_norm_backward, {tail}, {needs}"] = ("rms_norm_backward", *arguments)
    return samples


@pytest.mark.parametrize("case", operator_samples())
def test_operators_keep_torchs_rules(case):
    """torch.library.opcheck: schema, aliasing, shapes without data, and tracing with dynamic shapes."""
    name, *arguments = operator_samples()[case]
    result = torch.library.opcheck(getattr(_ops, name), tuple(arguments))
    assert set(result.values()) == {"SUCCESS"}


ONE = torch.linspace(-1, 1, 16)[None]
# Of rows x: what shares rows has as many as x, or one.
SHARED = {
    "gated add": lambda x: gated_add(x, x + 1, x.detach()),
    "gated add, one row": lambda x: gated_add(x, x + 1, ONE),
    "modulated": lambda x: modulated_norm(x, 16, None, 1e-6, scale=ONE, shift=ONE),
    "modulated, both": lambda x: modulated_norm(x, 16, None, 1e-6, scale=x.detach(), shift=ONE),
    "rope": lambda x: rope(x[None, None], x[None, None], x.detach(), x.detach())[0],
    "heads": lambda x: heads_rms_norm_rope(x[None, None], x[None, None], ONE, x.detach(), eps=1e-6)[1],
}


@pytest.mark.parametrize("name", SHARED)
def test_rows_whose_number_data_decide(name, monkeypatch):
    """As those of a mask, in one graph: torch's own steps broadcast there without asking whether a size is 1."""
    monkeypatch.setattr(torch._dynamo.config, "capture_dynamic_output_shape_ops", True)
    torch.manual_seed(0)
    x = torch.randn(5, 16, requires_grad=True)
    ours = SHARED[name]
    compiled = torch.compile(lambda x, mask: ours(x[mask]), fullgraph=True)
    for mask in (torch.arange(5) % 2 == 0, torch.arange(5) > 9, torch.arange(5) == 3, torch.arange(5) < 9):
        both = compiled(x, mask), ours(x[mask])
        assert torch.equal(*both)
        assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in both))
