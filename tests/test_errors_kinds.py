"""Proves that a tensor of another layout and a number that is none get one error each, whatever the form: which names
the argument, says what came, and the fix."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_errors import EACH, FORMS, HEADS, X

import rmsnorm
from rmsnorm import _ops

LAYOUTS = {
    "sparse": (torch.Tensor.to_sparse, "is of layout torch.sparse_coo; convert it, e.g. {}.to_dense()"),
    "compressed": (
        lambda t: t[None].to_sparse_csr() if t.dim() == 1 else t.to_sparse_csr(),
        "is of layout torch.sparse_csr; convert it, e.g. {}.to_dense()",
    ),
    "of oneDNN": (torch.Tensor.to_mkldnn, "is of layout torch._mkldnn; convert it, e.g. {}.to_dense()"),
    "quantised": (
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        "is quantised; convert it, e.g. {}.dequantize()",
    ),
    "nested": (
        lambda t: torch.nested.nested_tensor([t, t]),
        "is an older nested tensor; convert it, e.g. torch.nested.as_nested_tensor({}.unbind(), layout=torch.jagged)",
    ),
}
OF_TORCH = {("layer_norm", 0, "nested")}  # whose own layer_norm has a way for it


@pytest.mark.filterwarnings("ignore")  # torch's, of what is in beta or going
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "which"), EACH)
def test_layouts_without_places(name, which, layout):
    """They were served as dense ones by some forms, and refused with torch's words for what stood first in others."""
    if (name, which, layout) in OF_TORCH:
        return
    call, tensors = FORMS[name]
    make, words = LAYOUTS[layout]
    given = [make(t) if i == which else t for i, t in enumerate(tensors)]
    for grad in (False, True):
        if grad and which and name not in ("add_rms_norm_", "quantised_rms_norm"):
            given[0] = given[0].clone().requires_grad_()
        with pytest.raises(NotImplementedError) as error:
            call(*given)
        public, label = re.match(r"(\w+): (\w+) must be dense, but ", str(error.value)).groups()
        assert public == name.partition(",")[0]
        assert str(error.value) == f"{public}: {label} must be dense, but {words.format(label)}"


@pytest.mark.filterwarnings("ignore")
def test_nested_tensors_of_torchs_own_layer_norm():
    x, row = torch.nested.nested_tensor([X[0], X[1]]), torch.ones(5)
    for got, want in zip(rmsnorm.layer_norm(x, 5, row, row).unbind(), F.layer_norm(X, (5,), row, row), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", [made.form.name for made in rmsnorm._form.registered if made.form.define is not None])
def test_operators_refuse_them_themselves(name):
    """An everyday call leaves it to them: what refuses is the definition, which torch asks for such tensors."""
    made = next(made for made in rmsnorm._form.registered if made.form.name == name)
    for end, default in made.defaults.items():
        if end in ("", "_forward") and end in made.schemas:
            with pytest.raises(NotImplementedError, match=f"^{name}: .* must be dense"):
                default(*[X.to_sparse()] * made.form.tensors, *[1] * len(made.form.known))


# Functions of one number.
NUMBERS = {
    "rms_norm eps": lambda n: rmsnorm.rms_norm(X, 5, X[0, 0], n),
    "rms_norm eps, strided": lambda n: rmsnorm.rms_norm(X.mT.contiguous().mT, 5, None, n),
    "rms_norm eps, out": lambda n: rmsnorm.rms_norm(X, 5, None, n, out=torch.empty_like(X)),
    "rms_norm eps, learning": lambda n: rmsnorm.rms_norm(X.clone().requires_grad_(), 5, X[0, 0], n),
    "rms_norm eps, lean": lambda n: rmsnorm.rms_norm(X.clone().requires_grad_(), 5, X[0, 0], n, memory="lean"),
    "rms_norm eps, complex": lambda n: rmsnorm.rms_norm(X.cfloat(), 5, None, n),
    "rms_norm offset": lambda n: rmsnorm.rms_norm(X, 5, X[0, 0], 1e-6, offset=n),
    "rms_norm offset, strided": lambda n: rmsnorm.rms_norm(X.mT.contiguous().mT, 5, X[0, 0], 1e-6, offset=n),
    "rms_norm eps, bias": lambda n: rmsnorm.rms_norm(X, 5, X[0, 0], n, bias=X[0, 0]),
    "rms_norm offset, bias": lambda n: rmsnorm.rms_norm(X, 5, X[0, 0], 1e-6, bias=X[0, 0], offset=n),
    "rms_norm partial": lambda n: rmsnorm.rms_norm(X, 5, X[0, 0], 1e-6, partial=n),
    "add_rms_norm eps": lambda n: rmsnorm.add_rms_norm(X, X, 5, X[0, 0], n),
    "add_rms_norm offset": lambda n: rmsnorm.add_rms_norm(X, X.mT.contiguous().mT, 5, X[0, 0], 1e-6, offset=n),
    "add_rms_norm offset, out_dtype": lambda n: rmsnorm.add_rms_norm(
        X, X, 5, X[0, 0], 1e-6, offset=n, out_dtype=torch.bfloat16
    ),
    "add_rms_norm_ eps": lambda n: rmsnorm.add_rms_norm_(X.clone(), X.clone(), X[0, 0], n),
    "add_rms_norm_ offset": lambda n: rmsnorm.add_rms_norm_(X.clone(), X.clone(), X[0, 0], 1e-6, offset=n),
    "rms_norm_add eps": lambda n: rmsnorm.rms_norm_add(X, X, 5, X[0, 0], n),
    "sandwich_rms_norm eps": lambda n: rmsnorm.sandwich_rms_norm(X, X, 5, None, None, n),
    "sandwich_rms_norm next_eps": lambda n: rmsnorm.sandwich_rms_norm(X, X, 5, None, None, 1e-6, next_eps=n),
    "gated_rms_norm eps": lambda n: rmsnorm.gated_rms_norm(X, X, 5, X[0, 0], n),
    "gated_rms_norm offset": lambda n: rmsnorm.gated_rms_norm(X, X, 5, X[0, 0], 1e-6, offset=n),
    "modulated_norm eps": lambda n: rmsnorm.modulated_norm(X, 5, None, n, scale=X),
    "quantised_rms_norm eps": lambda n: rmsnorm.quantised_rms_norm(X, 5, X[0, 0], n),
    "l2_norm eps": lambda n: rmsnorm.l2_norm(X, 5, None, n),
    "l2_norm offset": lambda n: rmsnorm.l2_norm(X, 5, X[0, 0], offset=n),
    "inverse_rms eps": lambda n: rmsnorm.inverse_rms(X, 5, n),
    "layer_norm eps": lambda n: rmsnorm.layer_norm(X, 5, X[0, 0], None, n),
    "heads_rms_norm_rope eps": lambda n: rmsnorm.heads_rms_norm_rope(HEADS, HEADS, HEADS[0, 0], HEADS[0, 0], eps=n),
    "heads_rms_norm_rope offset": lambda n: rmsnorm.heads_rms_norm_rope(
        HEADS, HEADS, HEADS[0, 0], HEADS[0, 0], HEADS[0, 0, 0], None, 1e-6, offset=n
    ),
    "RMSNorm eps": lambda n: rmsnorm.RMSNorm(5, n)(X),
    "RMSNorm offset": lambda n: rmsnorm.RMSNorm(5, offset=n)(X),
}
EXAMPLES = {"partial": "0.5"}


@pytest.mark.parametrize("kind", [torch.tensor, lambda value, **more: torch.nn.Parameter(torch.tensor([value]))])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_learns(name, kind):
    """Its gradient was lost without a word; torch's own norms refuse it, whether or not gradients are recorded."""
    function, label = name.partition(",")[0].split()
    words = f"{function}: {label} must be a float, but is a tensor that requires grad, and has none here; pass "
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded), pytest.raises(TypeError) as error:
            NUMBERS[name](kind(0.5, requires_grad=True))
        assert str(error.value) == f"{words}{label}.item()"


@pytest.mark.parametrize("many", [10**400, -(10**400), Fraction(10**400, 3)], ids=["int", "below 0", "fraction"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_beyond_all_floats(name, many):
    function, label = name.partition(",")[0].split()
    came = "a fractions.Fraction" if isinstance(many, Fraction) else "an int"
    words = f"{function}: {label} must be a float, but is {came} beyond all of them; pass a number, e.g. "
    with pytest.raises(OverflowError) as error:
        NUMBERS[name](many)
    assert str(error.value) == words + EXAMPLES.get(label, "1e-6")


@pytest.mark.parametrize(
    "half", [Fraction(1, 2), np.float64(0.5), np.float32(0.5), np.array(0.5), torch.tensor(0.5)], ids=repr
)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_other_classes(name, half):
    """Some ways through a call took them, and others didn't."""
    results, want = NUMBERS[name](half), NUMBERS[name](0.5)
    both = zip(results, want, strict=True) if isinstance(want, tuple) else [(results, want)]
    for one, other in both:
        torch.testing.assert_close(one, other)


def freed(tensor: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """As FSDP frees what it has gathered: sizes stay, and with an offset the address isn't null."""
    memory = torch.ones(offset + tensor.numel(), dtype=tensor.dtype)
    view = memory[offset:].view(tensor.shape)
    memory.untyped_storage().resize_(0)
    return view


NO_MEMORY = "has elements, but no memory: its storage was freed"
NO_MEMORY += "|its data is not allocated yet|out of bounds for storage of size 0"  # torch's own, and of views
RSTD = torch.ones(2, 3, 1)
OPERATORS = {
    "rms_norm": ((X, X[0, 0]), (1, 1e-6, 0.0, False)),
    "rms_norm_weighted": ((X, X[0, 0]), (1e-6,)),
    "rms_norm_weighted_backward": ((X, X, X[0, 0]), (1e-6, True, True)),
    "rms_norm_backward": ((X, X, X, RSTD, X[0, 0]), (1, 1e-6, 0.0, True, True)),
    "add_rms_norm_lean_backward": ((X, X, RSTD, X, RSTD, X[0, 0]), (1, 0.0, True, True)),
    "layer_norm": ((X, X[0, 0], X[0, 0]), (1, 1e-6)),
    "gated_rms_norm_backward": ((X, X, X, RSTD, X[0, 0]), (1, 1e-6, 0.0, True, True, True, True, True)),
    "gated_add_backward": ((X, X, X), (True, True)),
    "gain_span": ((X[0, 0],), (0.0,)),
}
OF_OPERATORS = [(f"operator {name}", i) for name, (tensors, _) in OPERATORS.items() for i in range(len(tensors))]


@pytest.mark.skipif(not _ops.native, reason="torch's own arithmetic ends the process")
@pytest.mark.parametrize("offset", [0, 3, 100000])
@pytest.mark.parametrize(("name", "which"), EACH + OF_OPERATORS)
def test_freed_memory(name, which, offset):
    """Kernels took a null for an operand that isn't there, and read and wrote the rows of an earlier call; or ended the
    process."""
    if name in FORMS:
        call, tensors = FORMS[name]
    else:
        tensors, options = OPERATORS[operator := name.partition(" ")[2]]
        call = lambda *tensors: getattr(torch.ops.rmsnorm, operator)(*tensors, *options)  # noqa: E731
    call(*tensors)
    if name == "add_rms_norm_" and which < 2:  # what FORMS calls makes copies; see the next test
        return
    with pytest.raises(RuntimeError, match=NO_MEMORY):
        call(*(freed(t, offset) if i == which else t for i, t in enumerate(tensors)))


@pytest.mark.skipif(not _ops.native, reason="torch's own arithmetic ends the process")
@pytest.mark.parametrize("offset", [0, 3])
def test_freed_memory_to_write_to(offset):
    """What was written last was written again."""
    last = torch.zeros(X.shape)
    rmsnorm.rms_norm(X, 5, X[0, 0], out=last)
    wanted = last.clone()
    calls = [
        lambda: rmsnorm.rms_norm(3 * X, 5, X[0, 0], out=freed(X, offset)),
        lambda: torch.ops.rmsnorm.rms_norm_out(3 * X, None, 1, 1e-6, 1.0, False, freed(X, offset)),
        lambda: rmsnorm.add_rms_norm_(X.clone(), freed(X, offset), X[0, 0]),
        lambda: rmsnorm.add_rms_norm_(freed(X, offset), X.clone(), X[0, 0]),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=NO_MEMORY):
            call()
    assert torch.equal(last, wanted)


def test_tensors_without_elements_need_no_memory():
    none = torch.empty(0, 5)
    assert rmsnorm.rms_norm(none, 5, X[0, 0]).shape == (0, 5)
    assert rmsnorm.add_rms_norm(freed(none, 3), none, 5, X[0, 0])[0].shape == (0, 5)
    assert torch.equal(rmsnorm.add_rms_norm_(none, none.clone())[0], none)
