"""Proves that ``install()`` puts our kernels behind torch's own operator, with torch's derivatives and transforms
around them, hands back what they don't take, refuses by name, and can be undone.
"""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, EPS, LAYOUTS, Truth, gains, incoming, lay_out, same_bits, sample
from torch.utils.checkpoint import checkpoint

import rmsnorm
from rmsnorm import _install, _native, install, installed, uninstall

pytestmark = pytest.mark.skipif(
    not _native.cpu_targets(), reason="without the native library there is nothing to install"
)


@pytest.fixture(autouse=True)
def _undone():
    yield
    uninstall()


def runs_on_our_kernels() -> bool:
    """By what autograd records: torch's fused operator where it has a kernel, else the last of its eight operators."""
    x = torch.ones(2, 4, requires_grad=True)
    return type(F.rms_norm(x, (4,))).__name__ == "Tensor" and "FusedRmsNorm" in F.rms_norm(x, (4,)).grad_fn.name()


def test_importing_changes_nothing():
    assert not runs_on_our_kernels()
    assert not rmsnorm.info().installed


def test_install_uninstall_installed():
    install()
    install()
    assert runs_on_our_kernels()
    assert rmsnorm.info().installed
    with installed():
        assert runs_on_our_kernels()
    assert runs_on_our_kernels(), "the context manager leaves what it found"
    uninstall()
    uninstall()
    assert not runs_on_our_kernels()
    with pytest.raises(ZeroDivisionError), installed():
        _ = 1 / 0
    assert not runs_on_our_kernels()
    for _ in range(100):  # each a library object made and destroyed
        with installed():
            pass
    assert not runs_on_our_kernels()


@pytest.mark.parametrize("columns", [0, 1, 3, 127, 576])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_ours(native_target, dtype, columns):
    """Forward and both gradients, in every layout, with and without weight: torch's function is ours."""
    x, grad = sample(6, columns, dtype), incoming(6, columns, dtype)
    for weight in (None, gains(columns, dtype=dtype)):
        for layout in LAYOUTS:
            results = []
            with installed():
                for function in (F.rms_norm, rmsnorm.rms_norm):
                    leaves = [lay_out(x, layout).requires_grad_()]
                    leaves += [] if weight is None else [weight.clone().requires_grad_()]
                    y = function(leaves[0], (columns,), *(leaves[1:] or [None]), EPS)
                    results.append([y.detach(), *torch.autograd.grad(y, leaves, grad.view(y.shape))])
            assert all(map(same_bits, *results)), layout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_the_gradients_asked_for(dtype):
    with installed():
        for need_x, need_w in ((True, False), (False, True), (True, True)):
            x = sample(4, 64, dtype).requires_grad_(need_x)
            weight = gains(64, dtype=dtype).requires_grad_(need_w)
            F.rms_norm(x, (64,), weight, EPS).sum().backward()  # an expanded gradient
            assert (x.grad is not None) == need_x
            assert (weight.grad is not None) == need_w
        dx, dw = torch.ops.aten._fused_rms_norm_backward(
            x.detach(),
            x.detach(),
            [64],
            torch.ones(4, 1, dtype=torch.promote_types(dtype, torch.float32)),
            None,
            [True, True],
        )
        assert dx.shape == x.shape
        assert dw is None


def test_gradients_of_rows_at_the_ends_of_the_range():
    """torch doesn't tell backward its eps. Where 1/rms is a normal number it isn't needed; else it can't matter."""
    for scale in (1e-42, 1e-38, 1e-30, 1e-20, 1e20, 1e30, 1e37):
        x = (sample(3, 64).clamp(-2, 2) * scale).float()
        for eps in (0.0, 1e-6):
            grad = incoming(3, 64, torch.float32) * min(max(scale, 1e-30), 1e30)
            with installed():
                leaf = x.clone().requires_grad_()
                (dx,) = torch.autograd.grad(F.rms_norm(leaf, (64,), None, eps), leaf, grad)
            ours = x.clone().requires_grad_()
            (wanted,) = torch.autograd.grad(rmsnorm.rms_norm(ours, 64, None, eps), ours, grad)
            assert same_bits(dx, wanted), (scale, eps)
            exact = Truth(x.double(), eps)
            h = grad.double().numpy()
            truth = exact.r * (h - exact.normalised * (h * exact.normalised).mean(-1, keepdims=True))
            error = (dx.double().numpy() - truth) / (exact.r * abs(h).max(-1, keepdims=True) + 1e-300)
            assert abs(error).max() <= 1e-5, (scale, eps)


def test_a_negative_eps_gives_nan_as_torchs_formula_does():
    x = torch.full((2, 4), 0.5, requires_grad=True)
    with installed():
        y = F.rms_norm(x, (4,), None, -1.0)
        y.sum().backward()
    assert y.isnan().all()
    assert x.grad.isnan().all()


def _calls():
    """Calls that our kernels don't take, and what torch does with them."""
    x, half = sample(3, 4, torch.float32), sample(3, 4, torch.bfloat16)
    yield lambda: F.rms_norm(x.to(torch.complex64), (4,))
    yield lambda: F.rms_norm(half, (4,), gains(4, dtype=torch.float32))
    yield lambda: F.rms_norm(x, (4,), gains(4, dtype=torch.bfloat16))
    yield lambda: torch._fused_rms_norm(half, [4], gains(4, dtype=torch.float32), EPS)[0]
    yield lambda: F.rms_norm(sample(4, 6, torch.float32).view(2, 2, 3, 2).to(memory_format=torch.channels_last), (2,))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_the_rest_keeps_torchs_formula():
    for call in _calls():
        before = call()
        with installed():
            after = call()
        assert after.dtype is before.dtype
        assert torch.equal(after, before)
    # Backward has no kernel at all without ours; torch's decomposition of it is the formula that serves.
    half, weight = sample(3, 4, torch.bfloat16), gains(4, dtype=torch.float32)
    rstd = torch.full((3, 1), 0.5)
    with installed():
        dx, dw = torch.ops.aten._fused_rms_norm_backward(half, half, [4], rstd, weight, [True, True])
    wide = half.float()
    h, x_hat = wide * weight, wide * rstd
    torch.testing.assert_close(dx, ((h - x_hat * (h * x_hat).mean(-1, keepdim=True)) * rstd).bfloat16())
    torch.testing.assert_close(dw.float(), (wide * x_hat).sum(0), rtol=1e-2, atol=1e-2)


def _changed_before_backward():
    x = torch.ones(2, 3, requires_grad=True)
    kept = x * 1
    y = F.rms_norm(kept, (3,))
    kept.add_(1)
    y.sum().backward()


def _twice():
    y = F.rms_norm(torch.ones(2, 3, requires_grad=True), (3,)).sum()
    y.backward()
    y.backward()


_X, _LEAF, _ONES = torch.ones(2, 3), torch.ones(2, 3, requires_grad=True), torch.ones(3)
WRONG = {
    "other columns": lambda: F.rms_norm(_X, (4,)),
    "other columns, to be differentiated": lambda: F.rms_norm(_LEAF, (4,)),
    "no columns": lambda: F.rms_norm(_X, ()),
    "negative columns": lambda: F.rms_norm(_X, (-1,)),
    "more dimensions than there are": lambda: F.rms_norm(_X, (2, 2, 3)),
    "a weight of other columns": lambda: F.rms_norm(_X, (3,), torch.ones(4)),
    "a weight of other dimensions": lambda: F.rms_norm(_X, (3,), torch.ones(2, 3)),
    "such a weight, to be differentiated": lambda: F.rms_norm(_LEAF, (3,), torch.ones(4)),
    "the operator with such a weight": lambda: torch._fused_rms_norm(_X, [3], torch.ones(4), 1e-6),
    "the operator with more dimensions": lambda: torch._fused_rms_norm(_X, [1, 2, 3], None, 1e-6),
    "int64": lambda: F.rms_norm(torch.ones(2, 3, dtype=torch.int64), (3,)),
    "int64 with an int64 weight": lambda: F.rms_norm(_X.long(), (3,), _ONES.long()),
    "the operator with int64": lambda: torch._fused_rms_norm(_X.long(), [3], None, None),
    "bool": lambda: F.rms_norm(torch.ones(2, 3, dtype=torch.bool), (3,)),
    "float8": lambda: F.rms_norm(_X.to(torch.float8_e4m3fn), (3,)),
    "bits": lambda: F.rms_norm(torch.empty(2, 3, dtype=torch.bits8), (3,)),
    "the layer with int64": lambda: torch.nn.RMSNorm(3)(_X.long()),
    "the layer without weight with int64": lambda: torch.nn.RMSNorm(3, elementwise_affine=False)(_X.long()),
    "an integer weight": lambda: F.rms_norm(_X, (3,), _ONES.long()),
    "a weight on meta": lambda: F.rms_norm(_X, (3,), _ONES.to("meta")),
    "an input on meta": lambda: F.rms_norm(_X.to("meta"), (3,), _ONES),
    "a weight on meta, to be differentiated": lambda: F.rms_norm(_LEAF, (3,), _ONES.to("meta")),
    "sparse": lambda: F.rms_norm(_X.to_sparse(), (3,)),
    "mkldnn": lambda: F.rms_norm(_X.to_mkldnn(), (3,)),
    "a sparse weight": lambda: F.rms_norm(_X, (3,), _ONES.to_sparse()),
    "a list": lambda: F.rms_norm([1.0, 2.0], (2,)),
    "a numpy array": lambda: F.rms_norm(_X.numpy(), (3,)),
    "None": lambda: F.rms_norm(None, (3,)),
    "a weight as list": lambda: F.rms_norm(_X, (3,), [1.0, 1.0, 1.0]),
    "an int as shape": lambda: F.rms_norm(_X, 3),
    "floats as shape": lambda: F.rms_norm(_X, (3.0,)),
    "a string as eps": lambda: F.rms_norm(_X, (3,), None, "a"),
    "a list to the layer": lambda: torch.nn.RMSNorm(3)([1.0, 2.0, 3.0]),
    "a gradient of another shape": lambda: F.rms_norm(_LEAF, (3,)).backward(_ONES),
    "a gradient on meta": lambda: F.rms_norm(_LEAF, (3,)).backward(_X.to("meta")),
    "a complex gradient": lambda: F.rms_norm(_LEAF, (3,)).backward(_X.to(torch.complex64)),
    "no gradient": lambda: F.rms_norm(_LEAF, (3,)).backward(),
    "backward twice": _twice,
    "backward after a change": _changed_before_backward,
}


@pytest.mark.filterwarnings("ignore")  # torch warns of sparse layouts and of types that don't match
@pytest.mark.parametrize("wrong", WRONG)
def test_errors_are_torchs_own(wrong):
    """Type and text, to the letter; what torch takes is taken. torch without us is the oracle."""

    def outcome():
        try:
            return str(WRONG[wrong]())
        except Exception as error:
            return type(error), str(error)

    before = outcome()
    with installed():
        assert outcome() == before


def test_an_error_of_torchs_formula_is_raised_as_it_was():
    """Each thread has its own, and an earlier one isn't told again."""
    with installed():
        for call, kind, message in (
            (lambda: F.rms_norm(_X.long(), (3,)), NotImplementedError, "\"rms_norm\" not implemented for 'Long'"),
            (lambda: torch._fused_rms_norm(_X, [3], torch.ones(4), 1e-6), RuntimeError, "The size of tensor a"),
            (lambda: F.rms_norm(_X.bool(), (3,)), NotImplementedError, "\"rms_norm\" not implemented for 'Bool'"),
        ):
            with pytest.raises(RuntimeError, match=f"^{message}") as error:
                call()
            assert error.type is kind
            assert "\n" not in str(error.value)


NEGATED = {"negated": torch._neg_view, "imaginary": lambda t: torch.complex(torch.zeros_like(t), t).conj().imag}


@pytest.mark.parametrize("where", ["input", "other", "weight", "gradient"])
@pytest.mark.parametrize("how", NEGATED)
def test_negated_views(how, where):
    """Their memory holds the negative of what they show; every function, and torch's own, sees what they show."""
    x, other, weight, grad = sample(3, 8), sample(3, 8, seed=1), gains(8), incoming(3, 8, torch.float64)
    functions = {
        "rms_norm": lambda a, b, w: rmsnorm.rms_norm(a, 8, w, EPS) * b,
        "llama": lambda a, b, w: rmsnorm.rms_norm(a, 8, w, EPS, offset=1.0, casting_mode="llama") * b,
        "no weight": lambda a, b, w: rmsnorm.rms_norm(a, 8, None, EPS) * b * w,
        "add_rms_norm": lambda a, b, w: sum(rmsnorm.add_rms_norm(a, b, 8, w, EPS)),
        "gated_rms_norm": lambda a, b, w: rmsnorm.gated_rms_norm(a, b, 8, w, EPS),
        "gate first": lambda a, b, w: rmsnorm.gated_rms_norm(a, b, 8, w, EPS, norm_before_gate=False, group_size=4),
        "layer_norm": lambda a, b, w: rmsnorm.layer_norm(a, 8, w, b[0], EPS),
        "torch": lambda a, b, w: F.rms_norm(a, (8,), w, EPS) * b,
    }
    with installed():
        for name, function in functions.items():
            results = []
            for make in (NEGATED[how], lambda t: -t):
                leaves = [
                    (make(t) if where == place else t.clone()).detach().requires_grad_()
                    for place, t in (("input", x), ("other", other), ("weight", weight))
                ]
                y = function(*leaves)
                seed = make(grad) if where == "gradient" else grad
                assert seed.is_neg() or any(leaf.is_neg() for leaf in leaves) or make is not NEGATED[how]
                results.append([y, *torch.autograd.grad(y, leaves, seed.view_as(y))])
            torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
            with torch.no_grad():
                torch.testing.assert_close(function(*leaves), results[1][0].detach(), rtol=1e-12, atol=1e-12)


# torch warns about its own code: forward AD and inductor still use TorchScript.
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchs_derivatives_and_transforms_around_our_kernels():
    """In float64, where ours and torch's formula differ by rounding alone. A loop over the batch would warn."""
    x, w, dx = sample(4, 5).clamp(-2, 2), gains(5), sample(4, 5, seed=1)
    f = lambda a, b: F.rms_norm(a, (5,), b, EPS)  # noqa: E731
    scalar = lambda *a: f(*a).square().sum()  # noqa: E731
    transforms = [
        lambda: torch.func.jvp(f, (x, w), (dx, w)),
        lambda: torch.func.jacrev(f, (0, 1))(x, w),
        lambda: torch.func.jacfwd(f, (0, 1))(x, w),
        lambda: torch.func.hessian(scalar, (0, 1))(x, w),
        lambda: torch.func.vmap(f, (0, None))(x, w),
        lambda: torch.func.vmap(torch.func.grad(scalar, (0, 1)), (0, None))(x, w),
        lambda: torch.func.vmap(torch.func.grad(scalar, (0, 1)), (None, 0))(x, gains(3, 5)),
        lambda: torch.func.grad(lambda a: torch.func.vmap(torch.func.grad(scalar, 1), (0, None))(a, w).square().sum())(
            x
        ),
        lambda: torch.autograd.functional.jacobian(f, (x, w), vectorize=True),
        lambda: torch.autograd.functional.hvp(scalar, (x, w), (dx, w)),
        lambda: torch.autograd.functional.hessian(scalar, (x, w), vectorize=True),
    ]
    for i, transform in enumerate(transforms):
        wanted = transform()
        with installed():
            got = transform()
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8, msg=lambda m, i=i: f"transform {i}: {m}")
    with installed():
        leaves = (x.clone().requires_grad_(), w.clone().requires_grad_())
        assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_compile_and_checkpoint():
    layer = torch.nn.RMSNorm(64, EPS)
    x = sample(5, 64, torch.float32)
    with installed():
        wanted = layer(x)
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-6, atol=1e-6)
        leaf = x.clone().requires_grad_()
        assert same_bits(checkpoint(layer, leaf, use_reentrant=False).detach(), wanted.detach())
        compiled(leaf).sum().backward()
        assert leaf.grad.isfinite().all()
    torch.compiler.reset()


def test_refusals_leave_torch_as_it_was(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(_install._SCHEMAS, "_fused_rms_norm", "aten::_fused_rms_norm(Tensor input) -> Tensor")
        with pytest.raises(RuntimeError, match=r"torch 2.* has aten::_fused_rms_norm\(Tensor input, int\[\]"):
            install()
    with monkeypatch.context() as patch:
        patch.setitem(_install._SCHEMAS, "_no_such_operator", "aten::_no_such_operator() -> ()")
        with pytest.raises(RuntimeError, match="has None, and these kernels are for aten::_no_such_operator"):
            install()
    with monkeypatch.context() as patch:
        patch.setattr(_native, "why_not", lambda: "it rained")
        with pytest.raises(RuntimeError, match="no native kernels: it rained"):
            install()
    other = torch.library.Library("aten", "IMPL")
    other.impl("_fused_rms_norm", lambda *a: None, "CPU")
    try:
        with pytest.raises(RuntimeError, match="another library has a CPU kernel for aten::_fused_rms_norm already"):
            install()
    finally:
        other._destroy()
    assert not runs_on_our_kernels()
    install()
    assert runs_on_our_kernels()


def test_a_recorded_graph_outlives_the_installation():
    x = sample(4, 64, torch.float32).requires_grad_()
    with installed():
        y = F.rms_norm(x, (64,), None, EPS)
        (wanted,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert same_bits(dx, wanted)
    install()  # and the slot of the backward operator, which is still ours, is no reason to refuse


def test_from_many_threads():
    """Installing and running at once, from eight threads."""
    x, weight = sample(8, 129, torch.float32), gains(129, dtype=torch.float32)
    expected = F.rms_norm(x, (129,), weight, EPS)
    wrong = []

    def work() -> None:
        for _ in range(50):
            install()
            if not torch.allclose(F.rms_norm(x, (129,), weight, EPS), expected, rtol=1e-5, atol=1e-6):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert runs_on_our_kernels()


PROBE = """
import sys
import torch
before = 'rmsnorm' in sys.modules
x = torch.ones(2, 4, requires_grad=True)
print(before, torch.nn.functional.rms_norm(x, (4,)).grad_fn.name(), sys.argv[1:])
"""


def test_for_programs_that_do_not_know_us(python, tmp_path):
    """``RMSNORM_INSTALL=1`` and ``python -m rmsnorm run``; nothing of ours is imported without them."""
    assert python(PROBE).stdout.startswith("False MulBackward0"), "torch's composite"
    assert python(PROBE, RMSNORM_INSTALL="0").stdout.startswith("False MulBackward0")
    assert python(PROBE, RMSNORM_INSTALL="1").stdout.startswith("True FusedRmsNormBackward0")
    first = "import rmsnorm; print(rmsnorm.info().installed)"
    assert python(first, RMSNORM_INSTALL="1").stdout.strip() == "True", "whichever import comes first"
    refused = python(PROBE, RMSNORM_INSTALL="1", RMSNORM_NATIVE="0")
    assert refused.stdout.startswith("True MulBackward0")
    assert "RMSNORM_INSTALL=1 asks for it, but" in refused.stderr
    assert "RMSNORM_NATIVE=0 turned it off" in refused.stderr

    script = tmp_path / "script.py"
    script.write_text(PROBE)
    run = "import sys, runpy; sys.argv = ['rmsnorm', 'run', {!r}, '--flag', '3']; "
    run += "runpy.run_module('rmsnorm', run_name='__main__')"
    result = python(run.format(str(script)))
    assert result.stdout.strip() == "True FusedRmsNormBackward0 ['--flag', '3']", result.stderr
    assert python(run.format("missing.py")).returncode == 2
    refused = python(run.format(str(script)), RMSNORM_NATIVE="0")
    assert refused.returncode == 2
    assert "RMSNORM_NATIVE=0 turned it off" in refused.stderr
