"""Rows of the table in test_home.py in which a norm becomes part of a graph: fx, TorchScript, make_fx."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from home_compare import Advice, Failed, attempt, learn, loss
from home_norms import COLUMNS, Chain, Norm, row
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp

# Warnings of torch's machinery about itself; the rows that need one name it.
JIT = (".torch.jit", DeprecationWarning)  # TorchScript as a whole, which inductor too is made with
OBSERVERS = ("Please use quant_min and quant_max", UserWarning)  # of torch's own default mapping
QUANTIZE = (".*torch.ao.quantization", DeprecationWarning)  # the module as a whole
TRACER = (".*", torch.jit.TracerWarning)  # a size of the example becomes a constant: of transformers' and ours
FUNCTION = (".*Function'> should not be instantiated", DeprecationWarning)  # dynamo makes an autograd.Function
GRAD = ("The .grad attribute of a Tensor that is not a leaf", UserWarning)  # dynamo reads it
LEAF = (".*LeafSpec", FutureWarning)  # torch.export's own use of pytree


@row("fx.symbolic_trace")
def symbolic_trace(norm: Norm) -> Any:
    results = []
    for columns in COLUMNS:
        traced = fx.symbolic_trace(norm.module(columns))
        results += [learn(traced, norm.args(*shape, columns, grad=True)) for shape in ((2, 5), (3,))]
    return results


@row("fx.symbolic_trace, of a model that has it")
def symbolic_trace_of_model(norm: Norm) -> Any:
    traced = fx.symbolic_trace(Chain(*(norm.module(seed=seed) for seed in range(2))), _absent(norm))
    return learn(traced, norm.args(grad=True))


def _absent(norm: Norm) -> dict[str, None] | None:
    """Chain's second argument, where norms have one only."""
    return {"other": None} if norm.arity == 1 else None


@row("fx ShapeProp")
def shape_prop(norm: Norm) -> Any:
    traced, args = fx.symbolic_trace(norm.module()), norm.args()
    ShapeProp(traced).propagate(*args)
    [output] = [node for node in traced.graph.nodes if node.op == "output"]
    meta = output.meta["tensor_meta"]
    return [(m.shape, m.dtype) for m in ([meta] if hasattr(meta, "shape") else meta)]


@row("fx, its code again from text")
def symbolic_trace_code(norm: Norm) -> Any:
    traced, args = fx.symbolic_trace(norm.module()), norm.args()
    traced.recompile()
    return traced(*args)


@row("prepare_fx", QUANTIZE, OBSERVERS)
def prepare_fx(norm: Norm) -> Any:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    results = []
    for model in (norm.module(), Chain(norm.module()) if norm.arity == 2 else nn.Sequential(norm.module())):
        prepared = prepare_fx(model.eval(), get_default_qconfig_mapping("x86"), norm.args())
        results.append(learn(prepared, norm.args(grad=True))["result"])
    return results


def through_a_file(module: Any) -> Any:
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


def jit_trace(norm: Norm, mode: Callable[[], Any]) -> Any:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        module = norm.module(dtype=dtype)
        with mode():
            traced = torch.jit.trace(module, norm.args(dtype=dtype))
        loaded = through_a_file(traced)
        results += [learn(m, norm.args(3, 16, dtype=dtype, grad=True)) for m in (traced, loaded)]
    return results


@row("jit.trace with gradients, saved and loaded", JIT, TRACER)
def jit_trace_grad(norm: Norm) -> Any:
    return jit_trace(norm, nullcontext)


@row("jit.trace without gradients, saved and loaded", JIT, TRACER)
def jit_trace_no_grad(norm: Norm) -> Any:
    return jit_trace(norm, torch.no_grad)


@row("jit.trace has aten's operators only", JIT, TRACER)
def jit_trace_operators(norm: Norm) -> Any:
    """The road to OpenVINO and to Core ML: their converters know aten's operators and no Python."""
    module, kinds = norm.module().eval().requires_grad_(False), set()
    for mode in (nullcontext, torch.no_grad):
        with mode():
            kinds |= {node.kind() for node in torch.jit.trace(module, norm.args()).inlined_graph.nodes()}
    return sorted(kind for kind in kinds if not kind.startswith(("aten::", "prim::")) or kind == "prim::PythonOp")


@row("jit.script, or an error with advice", JIT)
def jit_script(norm: Norm) -> Any:
    scripted = attempt(lambda: torch.jit.script(norm.module()))
    if norm.ours and isinstance(scripted, Failed) and "torch.jit.trace" in scripted.text:
        return Advice(scripted.text)
    return scripted if isinstance(scripted, Failed) else learn(scripted, norm.args(grad=True))


def traced_by_make_fx(norm: Norm, mode: str, ahead: bool = False) -> Any:
    """The call, and its gradients, with the weights as arguments; run at other values. ``ahead``: before autograd, so
    that there are no gradients to record."""
    module = norm.module()
    names = [name for name, _ in module.named_parameters()]

    def call(*tensors: Tensor) -> Any:
        args, weights = tensors[: norm.arity], tensors[norm.arity :]
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), args)

    def gradients(*tensors: Tensor) -> Any:
        return torch.autograd.grad(loss(call(*tensors)), tensors)

    def leaves(*shape: int, seed: int) -> tuple[Tensor, ...]:
        args = norm.args(*shape, grad=True, seed=seed)
        return (*args, *(p.detach().requires_grad_() for p in norm.module(seed=seed).parameters()))

    def traced(function: Any) -> Any:
        return make_fx(function, tracing_mode=mode, pre_dispatch=ahead)(*leaves(2, 5, 16, seed=0))

    results = []
    for function in (call,) if ahead else (call, gradients):
        results.append(traced(function)(*leaves(*((3, 4, 16) if mode == "symbolic" else (2, 5, 16)), seed=1)))
    with torch.no_grad():
        results.append(traced(call)(*leaves(2, 5, 16, seed=1)))
    return results


def _make_fx_rows() -> None:
    for mode in ("real", "fake", "symbolic"):
        row(f"make_fx, {mode}")(lambda norm, mode=mode: traced_by_make_fx(norm, mode))
        row(f"make_fx before autograd, {mode}")(lambda norm, mode=mode: traced_by_make_fx(norm, mode, True))


_make_fx_rows()
