"""Proves that the layer goes where models go: torch.compile with and without max-autotune, torch.export and back,
AOTInductor, ONNX and onnxruntime, autocast, checkpointing, parametrization, and torch's FLOP counter.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, EPS, MODES, Truth, gains, same_bits, sample
from thinned import heavy_but
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from rmsnorm import RMSNorm, add_rms_norm, rms_norm

# torch warns about its own code: TorchScript inside inductor and forward AD, autograd.Function inside dynamo, and
# LeafSpec inside export.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]
needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler")
OPTIONS = [{}, {"offset": 1.0}, {"casting_mode": "llama"}, {"offset": 1.0, "casting_mode": "llama"}]


class Block(torch.nn.Module):
    """A pre-norm block: norm, linear, then add and norm."""

    def __init__(self, dtype: torch.dtype = torch.float32, **options) -> None:
        super().__init__()
        self.first, self.second = (RMSNorm(64, EPS, dtype=dtype, **options) for _ in range(2))
        self.linear = torch.nn.Linear(64, 64, dtype=dtype)
        for norm in (self.first, self.second):
            torch.nn.init.normal_(norm.weight)

    def forward(self, x):
        y, x = self.second(self.linear(self.first(x)), x)
        return y * 2 + x


class Norm(torch.nn.Module):
    """One layer, with the weight of another dtype where asked for."""

    def __init__(self, dtype: torch.dtype, affine: bool = True, **options) -> None:
        super().__init__()
        self.norm = RMSNorm((3, 64), EPS, affine, dtype=dtype, **options)
        if affine:
            self.norm.weight.data = gains(3, 64, dtype=dtype)

    def forward(self, x, residual=None):
        return self.norm(x) if residual is None else self.norm(x, residual)


@needs_compiler
@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_compiled_block(mode):
    """Forward and backward of a block in one graph, for changing sizes, in both modes."""
    torch.compiler.reset()
    block = Block()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, mode=mode)
    for rows in (5, 9, 33):
        results = []
        for function in (block, compiled):
            block.zero_grad()
            x = sample(rows, 64, torch.float32).requires_grad_()
            y = function(x)
            y.square().mean().backward()
            results.append([y.detach(), x.grad, *(p.grad for p in block.parameters())])
        torch.testing.assert_close(*results)
    torch.compiler.reset()


@pytest.mark.parametrize("transform", ["vmap", "grad", "vmap of grad", "jvp"])
def test_compiled_transforms(transform):
    """torch.func inside torch.compile: the reference serves, in the same graph."""
    torch.compiler.reset()
    x, weight = sample(4, 5), gains(5)
    scalar = lambda a: rms_norm(a, 5, weight, EPS).square().sum()  # noqa: E731
    function = {
        "vmap": torch.func.vmap(lambda b: rms_norm(b, 5, weight, EPS)),
        "grad": torch.func.grad(scalar),
        "vmap of grad": torch.func.vmap(torch.func.grad(scalar)),
        "jvp": lambda a: torch.func.jvp(lambda b: rms_norm(b, 5, weight, EPS), (a,), (a,))[1],
    }[transform]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_export_and_back(options, tmp_path):
    """An exported program holds torch's operators alone, also when it was exported without gradients: it runs where
    nobody has heard of us, at other sizes, and can be trained. In bfloat16 the formula rounds where the kernels do, so
    that nearly all results are theirs: its fp32 statistic may move one to its neighbour, which later layers pass on."""
    block = Block(torch.bfloat16, **options)
    rows = torch.export.Dim("rows", min=2, max=1024)
    with torch.no_grad():
        program = torch.export.export(block, (sample(6, 64, torch.bfloat16),), dynamic_shapes=({0: rows},))
    assert not [node for node in program.graph.nodes if "rmsnorm" in str(node.target)]
    torch.export.save(program, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2").module()
    x = sample(11, 64, torch.bfloat16)
    with torch.no_grad():
        got, wanted = loaded(x), block(x)
    assert (got == wanted).double().mean() > 0.95
    torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.05)

    block, x = Block(**options), sample(11, 64, torch.float32)
    training = torch.export.export(block, (sample(6, 64, torch.float32),), dynamic_shapes=({0: rows},))
    assert not [node for node in training.graph.nodes if "rmsnorm" in str(node.target)]
    results = []
    for function in (block, training.module()):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.sum().backward()
        results.append([y.detach(), leaf.grad])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)  # dx cancels: two orders of fp32 sums


@pytest.mark.heavy
@needs_compiler
def test_aot_inductor_package(tmp_path):
    """Compiled ahead of time, loaded from the file, run at another size."""
    block, rows = Block().eval(), torch.export.Dim("rows", min=2, max=1024)
    with torch.no_grad():
        program = torch.export.export(block, (sample(6, 64, torch.float32),), dynamic_shapes=({0: rows},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
        x = sample(11, 64, torch.float32)
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), block(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # onnxscript's and torch's, about each other
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("options", "affine"), [({}, False), *((options, True) for options in OPTIONS)], ids=str)
@pytest.mark.parametrize("dtype", heavy_but(DTYPES[:2], DTYPES[:3]), ids=str)
def test_onnx(dtype, options, affine, tmp_path):
    """The standard operator in the graph; onnxruntime, which has no bfloat16 on CPU, gives our results. Its float32
    arithmetic is allowed 4 ulp; a half type's rounding may then fall either way, rarely."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    layer, x = Norm(dtype, affine, **options).eval(), sample(10, 192, dtype).view(2, 5, 3, 64)
    batch = torch.export.Dim.DYNAMIC
    exported = torch.onnx.export(
        layer, (x,), dynamo=True, opset_version=23, dynamic_shapes=({0: batch},), verbose=False
    )
    kinds = [node.op_type for node in exported.model.graph]
    assert kinds.count("RMSNormalization") == 1
    assert not {"ReduceMean", "Sqrt", "Reciprocal", "Pow"} & set(kinds)
    with torch.no_grad():
        x = sample(15, 192, dtype).view(3, 5, 3, 64)
        wanted = layer(x)
    if dtype in (torch.float32, torch.float16):
        exported.save(tmp_path / "layer.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
        [got] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        got = torch.from_numpy(got)
        assert got.dtype is wanted.dtype
        eps = torch.finfo(dtype).eps
        error = (got.double() - wanted.double()).abs()
        same = (got == wanted).double().mean()
        assert (error <= (4 if dtype is torch.float32 else 1) * eps * wanted.double().abs() + 1e-7).all(), error.max()
        assert dtype is torch.float32 or same > 0.999
    onnx.checker.check_model(exported.model_proto, full_check=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_onnx_of_add(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    layer = Norm(torch.float32).eval()
    x, residual = (sample(10, 192, torch.float32, seed=i).view(2, 5, 3, 64) for i in (0, 1))
    exported = torch.onnx.export(layer, (x, residual), dynamo=True, opset_version=23, verbose=False)
    assert [node.op_type for node in exported.model.graph] == ["Add", "RMSNormalization"]
    exported.save(tmp_path / "layer.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    got = session.run(None, dict(zip(names, (x.numpy(), residual.numpy()), strict=True)))
    for g, wanted in zip(got, layer(x, residual), strict=True):
        np.testing.assert_allclose(g, wanted.detach().numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, None], ids=str)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's own, of F.rms_norm
def test_autocast_is_that_of_torch(dtype, weight_dtype):
    """Autocast leaves F.rms_norm alone on CPU: the input's dtype in, the same out; so do we, and the values agree."""
    x = sample(6, 64, dtype)
    weight = None if weight_dtype is None else gains(64, dtype=weight_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        linear = F.linear(x.to(torch.float32), torch.eye(64))
        assert linear.dtype is torch.bfloat16
        for input in (x, linear):
            ours, theirs = rms_norm(input, 64, weight, EPS), F.rms_norm(input, (64,), weight, EPS)
            assert ours.dtype is theirs.dtype is input.dtype
            torch.testing.assert_close(ours, theirs)
            leaf = input.detach().requires_grad_()
            rms_norm(leaf, 64, weight, EPS).sum().backward()
            assert leaf.grad.dtype is input.dtype


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(mode, reentrant):
    results = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=reentrant)):
        torch.manual_seed(0)
        block = Block(casting_mode=mode)
        x = sample(6, 64, torch.float32).requires_grad_()
        y = wrap(block, x)
        y.sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in block.parameters())])
    assert all(map(same_bits, *results))


def test_parametrized_weight():
    """A weight that is computed: the gradient reaches what it is computed from."""
    layer = RMSNorm(64, EPS, dtype=torch.float64)
    parametrize.register_parametrization(layer, "weight", torch.nn.Softplus())
    x = sample(6, 64)
    Truth(x, EPS).forward(layer.weight.detach(), 0.0, "torch", 2.0).check(layer(x).detach(), "parametrized")
    layer(x).sum().backward()
    assert layer.parametrizations.weight.original.grad.abs().min() > 0
    parametrize.remove_parametrizations(layer, "weight")
    assert isinstance(layer.weight, torch.nn.Parameter)


def test_flop_counter():
    """Norms count nothing, as torch's own do; the matrix products beside them still do, forward and backward."""
    x = sample(6, 64, torch.float32).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        block = Block()
        block(x).sum().backward()
        add_rms_norm(x, x, 64)
    assert counter.get_total_flops() == 3 * 2 * 6 * 64 * 64
