"""Proves who serves which call on which device, by the dispatcher's own table and by forcing a GPU's route upon CPU
tensors; that Triton is imported by nobody who doesn't need it; and that nothing breaks where it is missing.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, EPS, Truth, bound, gains, sample

from rmsnorm import _form, _ops, reference, rms_norm
from rmsnorm.forms import sandwich
from rmsnorm.gpu import forms, general, heads, launcher, neighbours, route, serve

ROWS = [made for made in _form.registered if made.form.define is not None]
FORMS = [made for made in ROWS if made.form.name != "rms_norm" and made.form.same is None]
OPERATORS = [made.form.name + end for made in ROWS for end in made.schemas]
OPERATORS += ["rms_norm_out", "add_rms_norm_"]
OURS = ("CUDA", "XPU")
_x, _w = torch.arange(24.0).view(3, 8) - 7, torch.arange(8.0) / 5
_heads = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
CALLS = {
    "add_rms_norm": (_x, _x + 1, _w, 1, EPS, 1.0, True),
    "rms_norm_add": (_x, _x + 1, _w, 1, EPS, 1.0, True),
    "sandwich_rms_norm": (_x, _x + 1, _w, _w, 1, EPS, 1.0, True, None),
    "gated_rms_norm": (_x, _x + 1, _w, 1, EPS, 1.0, True, True, True),
    "quantised_rms_norm": (_x, None, _x + 1, _w, 1, EPS, 1.0, False, True, True, True),
    "general_rms_norm": (_x, _w, _w, 1, EPS, 1.0, True, 4, True, True, torch.float64),
    "general_add_rms_norm": (_x, _x + 1, _w, _w, 1, EPS, 1.0, True, 4, False, None),
    "gated_add": (_x, _x + 1, _w, True),
    "modulated_norm": (_x, None, None, _w, _w + 1, None, 1, EPS, 0.0, False, False),
    "rope": (_heads, _heads, _heads[:, 0], _heads[:, 1], False),
    "heads_rms_norm_rope": (_heads, _heads, _heads[:, 0], _heads[:, 1], _w, _w, EPS, 0.0, False, True),
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_dispatchers_table(operator):
    """CUDA (and ROCm, which is CUDA to torch) and XPU have kernels of their own, for every form by its row; all else
    takes the default, which is the definition."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    default = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    for key in OURS:
        assert has(f"rmsnorm::{operator}", key), key
    for key in ("MPS", "HPU", "PrivateUse1"):
        assert not has(f"rmsnorm::{operator}", key), key
        assert default(f"rmsnorm::{operator}", key), key


def test_the_everyday_call_is_rms_norm_elsewhere():
    """Operators with fewer arguments have kernels in C++ alone; on each other device they become `rms_norm`."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    few = [f"{add}rms_norm_{mode}" for add in ("", "add_") for mode in ("weighted", "rounded")]
    for name in (f"rmsnorm::{name}" for name in (*few, "rms_norm_weighted_out", "rms_norm_weighted_backward")):
        assert has(name, "CompositeImplicitAutograd")
        assert not any(has(name, key) for key in (*OURS, "MPS", "Meta") if key != "CUDA" or not launcher.available())
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, kinds, arguments=(), options=None):
            seen.append(operator)
            return operator(*arguments, **options or {})

    with Mode():
        x, weight = torch.empty(3, 5, 8, device="meta"), torch.empty(5, 8, device="meta")
        for name in few:
            getattr(_ops, name)(*(x, x) if "add" in name else (x,), weight, EPS)
        _ops.rms_norm_weighted_out(x, weight, EPS, torch.empty_like(x))
    assert seen.count(_ops.rms_norm) == 2
    assert seen.count(_ops.add_rms_norm) == 2
    assert _ops.rms_norm_out in seen


def test_the_definition_serves_other_devices():
    """meta has shapes and no numbers; forced on CPU, the default kernels are right (see ``target`` in conftest.py for
    all their axes)."""
    x, weight = torch.empty(3, 5, 8, device="meta"), torch.empty(8, device="meta")
    assert rms_norm(x, 8, weight).shape == x.shape
    assert reference.rms_norm(x, weight, 1, EPS, 0.0, False)[1].shape == (3, 5, 1)
    x, weight = sample(3, 129, torch.float32), gains(129, dtype=torch.float32)
    y = _ops._rms_norm(x, weight, 1, EPS, 1.0, True)
    Truth(x, EPS).forward(weight, 1.0, "torch", bound("reference", torch.float32)).check(y, "default")


@pytest.mark.parametrize(("chosen", "runs"), list(product(route.CHOICES, (True, False))))
def test_the_rule(monkeypatch, chosen, runs):
    """What torch's fused kernel means goes to torch unless RMSNORM_CUDA=triton; the rest to Triton if it runs there."""
    monkeypatch.setattr(route, "choice", lambda: chosen)
    monkeypatch.setattr(route, "runs_triton", lambda device: runs)
    x, weight = torch.ones(2, 4, 8), torch.ones(8)
    ours, plain = "triton" if runs else "reference", "triton" if runs and chosen == "triton" else "torch"

    def way(input, weight, offset=0.0, round_first=False, more=None):
        return route.route(input, weight, 1, route.fused_by_torch(input, weight, 1, offset, round_first, more))

    for dtype in DTYPES:
        assert way(x.to(dtype), weight.to(dtype)) == plain, dtype
    assert way(x, None) == plain
    assert way(x, None, 1.0, True) == plain, "without a weight there is nothing to offset, nor a second rounding"
    assert way(x, weight, 1.0) == ours
    assert way(x, weight, 0.0, True) == ours
    assert way(x, weight, more=x) == ours
    assert way(x.bfloat16(), weight) == ours, "another type of weight"
    assert way(x, torch.ones(4, 8)) == ours, "a weight for each head"
    assert way(x, weight.double()) == "reference", "fp64 gains for fp32"
    assert way(torch.ones(0, 8), weight) == "reference"
    assert way(torch.ones(1, 2**16, 1), torch.ones(2**16, 1)) == "reference", "more heads than a grid has places"


def test_torchs_kernel_is_called_with_torchs_meaning(monkeypatch):
    monkeypatch.setattr(route, "choice", lambda: "torch")
    monkeypatch.setattr(route, "runs_triton", lambda device: False)
    x, weight = torch.randn(2, 3, 4, 5), torch.randn(4, 5)
    y, rstd = route.rms_norm_forward(x, weight, 2, EPS)
    assert torch.equal(y, F.rms_norm(x, (4, 5), weight, EPS))
    assert rstd.shape == reference.rms_norm(x, weight, 2, EPS, 0.0, False)[1].shape
    out = torch.empty(2, 3, 5, 4).mT
    route.rms_norm_out(x, weight, 2, EPS, 0.0, False, out)
    assert torch.equal(out, y)
    seen = []

    def fused(grad, input, shape, rstd, weight, mask):
        seen.append((shape, mask))
        return grad, None

    monkeypatch.setattr(torch.ops.aten._fused_rms_norm_backward, "default", fused)
    dx, dw = route.rms_norm_backward(x, None, x, rstd, weight, 2, EPS, 0.0, True, False)
    assert seen == [(torch.Size([4, 5]), [True, False])]
    assert (dx.shape, dw.shape) == (x.shape, (0,))


def test_without_triton_the_definition_serves_all_options(monkeypatch):
    monkeypatch.setattr(route, "runs_triton", lambda device: False)
    x, other, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    y, total, rstd = serve.serving(_ops.ADD_RMS_NORM, "_forward")(x, other, weight, 1, EPS, 1.0, True)
    wanted, wanted_rstd = reference.rms_norm(x + other, weight, 1, EPS, 1.0, True)
    assert torch.equal(y, wanted)
    assert torch.equal(total, x + other)
    assert torch.equal(rstd, wanted_rstd)
    dx, dw = route.rms_norm_backward(x, other, x, rstd, weight, 1, EPS, 1.0, True, True)
    wanted_dx, wanted_dw = reference.rms_norm_backward(x, x, weight, 1, EPS, 1.0)
    assert torch.equal(dx, wanted_dx + other)
    assert torch.equal(dw, wanted_dw)


@pytest.mark.parametrize("made", FORMS, ids=lambda made: made.form.name)
@pytest.mark.parametrize("runs", [False, True])
def test_without_a_kernel_a_form_is_its_definition(monkeypatch, made, runs):
    """Where Triton is missing, or its function takes nothing: bits of the definition, whose norms are the route's."""
    monkeypatch.setattr(route, "runs_triton", lambda device: runs)
    if runs:
        monkeypatch.setattr(serve, "_normalised", reference.rms_norm)
        for room in (forms, general, heads, neighbours):
            monkeypatch.setattr(room, made.form.name, lambda *arguments: None, raising=False)
            monkeypatch.setattr(room, f"{made.form.name}_backward", lambda *arguments: None, raising=False)
    arguments = CALLS[made.form.name]
    wanted = made.form.define(*arguments)
    for end in ("", "_forward") if "_forward" in made.schemas else ("",):
        got = serve.serving(made, end)(*arguments)
        for one, two in zip(got if isinstance(got, tuple) else [got], wanted, strict=bool(end)):
            torch.testing.assert_close(one.double(), two.double(), equal_nan=True)


def test_backward_of_a_sandwich_is_two_of_norms(monkeypatch):
    """In every way to ask for some of the gradients."""
    monkeypatch.setattr(route, "runs_triton", lambda device: False)
    monkeypatch.setattr(route, "fused_by_torch", lambda *arguments: False)  # torch has no such kernel for the CPU
    x, other, weight, *_ = CALLS["sandwich_rms_norm"]
    grad, total, rstd = torch.randn(3, 8), x + other, torch.ones(3, 1)
    options = (1, EPS, 0.0, None)
    wanted = sandwich.SANDWICH.defaults["_backward"](
        grad, other, x, total, rstd, rstd, weight, weight, *options, *[True] * 4
    )
    for needs in product((False, True), repeat=4):
        got = serve.sandwich_rms_norm_backward(grad, other, x, total, rstd, rstd, weight, weight, *options, *needs)
        for one, two, need in zip(got, wanted, needs, strict=True):
            if need:
                torch.testing.assert_close(one, two)
            else:
                assert one.shape == (0,) or needs == (False,) * 4, needs


ASK = "import rmsnorm; print(rmsnorm.info().cuda)"


def test_the_variable(python):
    assert python(ASK).stdout.strip() == "torch"
    assert python(ASK, RMSNORM_CUDA="triton").stdout.strip() == "triton"
    wrong = python(ASK, RMSNORM_CUDA="cuda")
    assert "ValueError: RMSNORM_CUDA='cuda' is not a choice: set it to torch or triton, or unset it" in wrong.stderr
    assert python("import rmsnorm", RMSNORM_CUDA="cuda").returncode == 0, "an error at first use, not at import"


def test_where_triton_is_missing(python):
    """A finder that knows no triton stands for an environment without it."""
    hide = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else real(name, *rest)
"""
    result = python(hide + "import torch, rmsnorm; print(rmsnorm.gpu.route.runs_triton(torch.device('cuda')))\n" + ASK)
    assert result.stdout.split() == ["False", "torch"], result.stderr
    result = python(hide + ASK, RMSNORM_CUDA="triton")
    assert "RMSNORM_CUDA=triton has no effect: Triton is missing; pip install 'triton" in result.stderr


CUDA_BUILD = """
import warnings
warnings.simplefilter("error")
import torch
torch.version.cuda = "13.0"
import rmsnorm
from rmsnorm import _form, _native
has = torch._C._dispatch_has_kernel_for_dispatch_key
names = [made.form.name + end for made in _form.registered if made.form.define is not None for end in made.schemas]
names += ["rms_norm_out", "add_rms_norm_"]
ours = _native.gpu_operators()
print(*(name for name in {*names, *ours} if not has(f"rmsnorm::{name}", "CUDA")), "none missing")
print(*sorted({*names} - {*ours}), "alone in Python")
print(*(has(f"rmsnorm::_python_{name}", "CUDA") for name in names if name in ours))
"""


@pytest.mark.skipif(not launcher._native.gpu_operators(), reason="without C++ there is nothing to take over")
def test_cpp_takes_over_where_torch_has_cuda(python):
    """A build of torch for CUDA: each operator has a kernel there, and what C++ has stands in front of Python's."""
    result = python(CUDA_BUILD)
    missing, alone, behind = result.stdout.splitlines() or [result.stderr] * 3
    assert missing == "none missing"
    assert alone == "alone in Python", "every form has its operators in C++"
    assert set(behind.split()) == {"True"}
