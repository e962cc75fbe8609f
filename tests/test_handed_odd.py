"""What must not pass torch's dispatcher by (src/rmsnorm/_handed.py): each question that is asked there stands between
one of these calls and a wrong number, a wrong error or a broken memory. The oracle is the formula, or torch's own."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import rmsnorm

X = torch.linspace(-2.0, 3.0, 12).view(3, 4)
WEIGHT = torch.tensor([1.0, 0.5, -2.0, 3.0])


def formula(x, weight=None, dims=1, eps=1e-6):
    """In float64, or complex128."""
    wide = torch.complex128 if x.is_complex() else torch.float64
    x = x.to(wide)
    y = x * torch.rsqrt(x.square().mean(tuple(range(-dims, 0)), keepdim=True) + eps)
    return y if weight is None else y * weight.to(wide)


def close(y, want):
    torch.testing.assert_close(y.to(want.dtype), want, rtol=1e-2 if y.dtype.itemsize == 2 else 1e-5, atol=1e-6)


# Without a weight, nothing else tells their types from those of the kernels.
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["no weight", "a weight"])
def test_whole_numbers(dtype, weight):
    with pytest.raises(NotImplementedError, match="floating or complex"):
        rmsnorm.rms_norm(X.to(dtype), 4, weight, 1e-6)
    with pytest.raises(RuntimeError):
        rmsnorm.add_rms_norm_(X.to(dtype), X.to(dtype), weight, 1e-6)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_numbers(dtype):
    x = torch.complex(X, X.flip(0) / 2).to(dtype)
    close(rmsnorm.rms_norm(x, 4, None, 1e-6).to(torch.complex128), formula(x))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_numbers_of_8_bits(dtype):
    with pytest.raises(NotImplementedError, match="at least 16 bits"):
        rmsnorm.rms_norm(X.to(dtype), 4, None, 1e-6)


# Those of which DLPack has no view: what it raises must be gone.
WITHOUT_STRIDES = {
    "sparse": X.to_sparse,
    "compressed": X.to_sparse_csr,
    "of oneDNN": X.to_mkldnn,
    "nested": lambda: torch.nested.nested_tensor([X, X[:2]], layout=torch.strided),
    "quantised": lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")  # torch's, of what is in beta or going
@pytest.mark.parametrize("name", WITHOUT_STRIDES)
def test_layouts_without_strides(name):
    x = WITHOUT_STRIDES[name]()
    with pytest.raises(RuntimeError) as theirs:
        F.rms_norm(x, (4,), WEIGHT, 1e-6)
    with pytest.raises(RuntimeError) as ours:
        rmsnorm.rms_norm(x, 4, WEIGHT, 1e-6)
    assert isinstance(ours.value, type(theirs.value))  # who catches torch's catches ours
    with pytest.raises(RuntimeError):
        rmsnorm.rms_norm(X, 4, WEIGHT, 1e-6, out=x)
    with pytest.raises(RuntimeError):
        rmsnorm.rms_norm(X, 4, x, 1e-6)


def test_meta():
    x = X.to("meta")
    assert rmsnorm.rms_norm(x, 4, None, 1e-6).is_meta
    with pytest.raises(RuntimeError, match="on cpu and weight on meta"):
        rmsnorm.rms_norm(X, 4, WEIGHT.to("meta"), 1e-6)
    with pytest.raises(RuntimeError, match="device"):
        rmsnorm.add_rms_norm(X, x, 4, WEIGHT, 1e-6)
    with pytest.raises(RuntimeError, match="device"):
        rmsnorm.rms_norm(X, 4, WEIGHT, 1e-6, out=x)


class Sizes:
    """A sequence that breaks when it is read."""

    def __init__(self, length=1, error=ZeroDivisionError):
        self.length, self.error = length, error

    def __len__(self):
        if self.length is None:
            raise self.error
        return self.length

    def __getitem__(self, at):
        raise self.error


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(None), Sizes(65)], ids=["an item", "the length", "many"])
def test_sizes_that_cannot_be_read(sizes):
    with pytest.raises(ZeroDivisionError):
        rmsnorm.rms_norm(X, sizes, None, 1e-6)


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["no weight", "a weight"])
@pytest.mark.parametrize("sizes", [(), [], 3, (3,), (4, 4), (2, 3, 4), (12,), -1, (4.5,), (10**30,), 10**30], ids=str)
def test_sizes_that_do_not_fit(sizes, weight):
    with pytest.raises(RuntimeError, match="normalized_shape"):
        rmsnorm.rms_norm(X, sizes, weight, 1e-6)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        rmsnorm.add_rms_norm(X, X, sizes, weight, 1e-6)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        rmsnorm.rms_norm(X[0], sizes, weight, 1e-6)  # of fewer dimensions than sizes


def test_more_sizes_than_there_is_room_for():
    with pytest.raises(RuntimeError, match="normalized_shape"):
        rmsnorm.rms_norm(X, [4] * 100_000, None, 1e-6)


MANY = X[:1].reshape((1,) * 66 + (4,))
CALLS = {
    "rms_norm": lambda x: rmsnorm.rms_norm(x, 4, WEIGHT, 1e-6, offset=1.0),
    "out": lambda x: rmsnorm.rms_norm(x.detach(), 4, WEIGHT, 1e-6, out=torch.empty_like(x)),
    "all normalised": lambda x: rmsnorm.rms_norm(x, x.shape, None, 1e-6),
    "add_rms_norm": lambda x: rmsnorm.add_rms_norm(x, x, 4, WEIGHT, 1e-6)[0],
    "add_rms_norm_": lambda x: rmsnorm.add_rms_norm_(x.detach().clone(), x.detach().clone(), WEIGHT, 1e-6)[0],
    "bias": lambda x: rmsnorm.rms_norm(x, 4, WEIGHT, 1e-6, bias=WEIGHT),
    "lean": lambda x: rmsnorm.rms_norm(x, 4, WEIGHT, 1e-6, memory="lean"),
    "gated_rms_norm": lambda x: rmsnorm.gated_rms_norm(x, x, 4, WEIGHT, 1e-6),
    "layer_norm": lambda x: rmsnorm.layer_norm(x, 4, WEIGHT, None, 1e-6),
    "l2_norm": lambda x: rmsnorm.l2_norm(x, 4),
    "inverse_rms": lambda x: rmsnorm.inverse_rms(x, 4),
    "sandwich_rms_norm": lambda x: rmsnorm.sandwich_rms_norm(x, x, 4, WEIGHT, WEIGHT, 1e-6)[0],
    "modulated_norm": lambda x: rmsnorm.modulated_norm(x, 4, None, 1e-6, scale=x),
    "gated_add": lambda x: rmsnorm.gated_add(x, x, x),
    "quantised_rms_norm": lambda x: rmsnorm.quantised_rms_norm(x.detach(), 4, WEIGHT, 1e-6)[0],
    "rope": lambda x: rmsnorm.rope(x, x, torch.ones(1, 4), torch.zeros(1, 4))[0],
    "heads_rms_norm_rope": lambda x: rmsnorm.heads_rms_norm_rope(x, x, torch.ones(1, 4), torch.zeros(1, 4))[0],
}


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_more_dimensions_than_kernels_have(name, recorded):
    """Served as fewer are, or refused as torch's own norm does, never written beyond what there is room for."""
    x, few = (t.clone().requires_grad_(recorded) for t in (MANY, X[:1].view(1, 1, 4)))
    want = CALLS[name](few)
    try:
        y = CALLS[name](x)
    except RuntimeError as error:
        assert "only tensors with up to 64 dim" in str(error)  # noqa: PT017 - either is right
        return
    torch.testing.assert_close(y.reshape(want.shape), want)
    if recorded and y.requires_grad:
        y.float().sum().backward()
        want.float().sum().backward()
        torch.testing.assert_close(x.grad.view(1, 1, 4), few.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("learnt", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_weight_of_another_type(dtype, learnt):
    x, weight = X.to(dtype), WEIGHT.to(learnt)
    y = rmsnorm.rms_norm(x, 4, weight, 1e-6)
    assert y.dtype is dtype
    close(y, formula(x, weight))
    rounded = rmsnorm.rms_norm(x, 4, weight, 1e-6, casting_mode="llama")
    assert rounded.dtype is torch.promote_types(dtype, learnt)


@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (4, 1), (2, 4), (), (5,), (8,)], ids=str)
def test_a_weight_of_other_sizes(shape):
    """One with the sizes of more dimensions is a gain for each head; else it is refused."""
    weight = torch.randn(shape)
    if shape == (3, 4):
        close(rmsnorm.rms_norm(X, 4, weight, 1e-6), formula(X, weight))
        return
    with pytest.raises(RuntimeError, match="weight"):
        rmsnorm.rms_norm(X, 4, weight, 1e-6)


@pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 1), (2, 3, 4), (1, 3, 4), (4, 3), (12,), (3, 8)], ids=str)
def test_results_and_residuals_of_another_shape(shape):
    other = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=r"out must have shape \[3, 4\]"):
        rmsnorm.rms_norm(X, 4, WEIGHT, 1e-6, out=other)
    for call in (
        lambda: rmsnorm.add_rms_norm(X, other, 4, WEIGHT, 1e-6),
        lambda: rmsnorm.add_rms_norm(X, other, 4, None, 1e-6),
        lambda: rmsnorm.add_rms_norm_(X.clone(), other, WEIGHT, 1e-6),
    ):
        with pytest.raises(RuntimeError, match="residual must have the shape"):
            call()
    assert not other.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32], ids=str)
def test_results_and_residuals_of_another_type(dtype):
    with pytest.raises(RuntimeError, match=r"out must have .*dtype torch.float32"):
        rmsnorm.rms_norm(X, 4, WEIGHT, 1e-6, out=torch.zeros(3, 4, dtype=dtype))
    if dtype is torch.int32:
        return
    residual = X.to(dtype)
    y, s = rmsnorm.add_rms_norm(X, residual, 4, None, 1e-6)
    assert s.dtype is torch.promote_types(torch.float32, dtype)
    close(y, formula(X + residual))


@pytest.mark.parametrize("shared", [0, 1, 3, 4])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("written", ["out", "input", "residual"])
def test_a_weight_within_what_is_written(written, before, shared):
    """Of its four elements so many, at the beginning or the end."""
    memory = torch.randn(64)
    place = memory[16:28].view(3, 4)
    weight = memory[12 + shared :][:4] if before else memory[28 - shared :][:4]
    x, residual = torch.randn(2, 3, 4)
    if written == "out":
        want = formula(x, weight.clone())
        close(rmsnorm.rms_norm(x, 4, weight, 1e-6, out=place), want)
        return
    x, residual = (place, residual) if written == "input" else (x, place)
    want, found = formula(x + residual, weight.clone()), memory.clone()
    if not shared:
        close(rmsnorm.add_rms_norm_(x, residual, weight, 1e-6)[0], want)
        return
    with pytest.raises(RuntimeError, match="share"):
        rmsnorm.add_rms_norm_(x, residual, weight, 1e-6)
    assert torch.equal(memory, found)


@pytest.mark.parametrize("by", [-11, -4, -1, 1, 4, 11])
def test_an_output_over_a_part_of_the_input(by):
    memory = torch.randn(64)
    x, out = memory[16:28].view(3, 4), memory[16 + by :][:12].view(3, 4)
    want = formula(x.clone(), WEIGHT)
    close(rmsnorm.rms_norm(x, 4, WEIGHT, 1e-6, out=out), want)
    found = memory.clone()
    with pytest.raises(RuntimeError, match="share"):
        rmsnorm.add_rms_norm_(x, out, WEIGHT, 1e-6)
    assert torch.equal(memory, found)


def test_input_and_residual_that_are_one():
    x = X.clone()
    with pytest.raises(RuntimeError, match="share"):
        rmsnorm.add_rms_norm_(x, x, WEIGHT, 1e-6)
    assert torch.equal(x, X)
    y, s = rmsnorm.add_rms_norm(x, x, 4, WEIGHT, 1e-6)
    close(y, formula(2 * X, WEIGHT))
    assert torch.equal(s, 2 * X)
    assert s.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("eps", [-1.0, -1e-9, float("nan"), float("-inf")])
def test_an_eps_that_is_none(eps):
    """As torch's formula has it, a negative one is added, and the others make NaNs."""
    y = rmsnorm.rms_norm(X, 4, WEIGHT, eps)
    torch.testing.assert_close(y, F.rms_norm(X, (4,), WEIGHT, eps), equal_nan=True)


@pytest.mark.parametrize("eps", [-1, 0, 1, True, 10**20])
def test_an_eps_of_a_whole_number(eps):
    torch.testing.assert_close(rmsnorm.rms_norm(X, 4, WEIGHT, eps), F.rms_norm(X, (4,), WEIGHT, eps), equal_nan=True)


@pytest.mark.parametrize("offset", [-1.0, -1, 0, 2])
def test_an_offset_of_minus_one(offset):
    """The number by which CPython says that something went wrong."""
    y = rmsnorm.rms_norm(X, 4, WEIGHT, 1e-6, offset=offset)
    close(y, formula(X, WEIGHT + offset))


class Broken:
    """No number, though it says so."""

    def __float__(self):
        raise ZeroDivisionError


@pytest.mark.parametrize("name", ["eps", "offset"])
def test_a_number_that_cannot_be_read(name):
    given = {"eps": 1e-6, "offset": 0.0} | {name: Broken()}
    with pytest.raises((ZeroDivisionError, TypeError, RuntimeError)):
        rmsnorm.rms_norm(X, 4, WEIGHT, **given)


def test_memory_of_a_writer_who_copies_late():
    """A lazy clone shares its memory until somebody writes."""
    own = X.clone()
    lazy = torch._lazy_clone(own)
    rmsnorm.rms_norm(X * 2 + 1, 4, WEIGHT, 1e-6, out=lazy)
    residual = torch._lazy_clone(own)
    rmsnorm.add_rms_norm_(X.clone(), residual, WEIGHT, 1e-6)
    assert torch.equal(own, X)
    close(lazy, formula(X * 2 + 1, WEIGHT))
    assert torch.equal(residual, 2 * X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [4, 129, 4096])
def test_memory_that_is_not_aligned(dtype, columns):
    x = torch.randn(5, columns).to(dtype)
    x = torch.frombuffer(bytearray(1) + x.view(torch.uint8).numpy().tobytes(), dtype=dtype, offset=1).view(5, -1)
    weight = torch.randn(columns).to(dtype)
    want = rmsnorm.rms_norm(x.clone(), columns, weight, 1e-6)
    out = torch.frombuffer(bytearray(1 + x.nbytes), dtype=dtype, offset=1).view(5, -1)
    assert torch.equal(rmsnorm.rms_norm(x, columns, weight, 1e-6), want)
    assert torch.equal(rmsnorm.rms_norm(x, columns, weight, 1e-6, out=out), want)


def test_no_reference_is_left_behind():
    """Not to a size in a list, its type, a result that wasn't used, or what is raised on the way."""
    size, x = int("300"), torch.randn(3, 300)
    sizes, wide, behind = [size], x.t().contiguous().t(), torch.zeros(2, 3, 300)

    def calls():
        rmsnorm.rms_norm(x, sizes, None, 1e-6)
        rmsnorm.rms_norm(x, size, None, 1e-6)
        rmsnorm.rms_norm(wide, sizes, None, 1e-6)
        rmsnorm.add_rms_norm(x, x, sizes, None, 1e-6)
        for given in ({"normalized_shape": [301]}, {"normalized_shape": sizes, "out": behind}):
            with pytest.raises(RuntimeError):
                rmsnorm.rms_norm(x, **given)

    counted = [size, sizes, x, wide, behind, list, int, torch.Tensor]
    calls()
    before = [sys.getrefcount(one) for one in counted]
    for _ in range(50):
        calls()
    after = [sys.getrefcount(one) for one in counted]
    assert all(b - a < 25 for a, b in zip(before, after, strict=True)), (before, after)  # pytest's own, few


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_no_memory_is_left_behind():
    """Results that were made, and then not handed out, or handed out twice."""
    code = """
import torch, rmsnorm
def kept():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
x = torch.randn(64, 4096)
def calls():
    rmsnorm.rms_norm(x, 4096)
    rmsnorm.add_rms_norm(x, x, 4096)
calls()
before = kept()
for _ in range(100):
    calls()
assert kept() - before < 50_000, kept() - before  # kB; 300 results are 300 MB
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
