"""Rows of the table in test_home.py about torch.compile."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from home_compare import attempt, learn, loss, tensors_of
from home_graphs import FUNCTION, GRAD, JIT
from home_norms import Chain, Norm, row
from home_tensors import NESTED, learn_jagged
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter


def compiled_and_learned(norm: Norm, backend: Any = "aot_eager", **options: Any) -> Any:
    results = []
    for columns in (16, 129):
        module = norm.module(columns)
        compiled = torch.compile(module, fullgraph=True, backend=backend, **options)
        with torch.no_grad():
            results.append(compiled(*norm.args(2, 5, columns)))
        results.append(learn(compiled, norm.args(2, 5, columns, grad=True), module))
    return results


@row("compile, static", FUNCTION)
def compile_static(norm: Norm) -> Any:
    return compiled_and_learned(norm, dynamic=False)


def several(norm: Norm, count: int, backend: str) -> Any:
    model = Chain(*(norm.module(seed=seed) for seed in range(count)))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    results = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 9, 33):
            results.append(learn(compiled, norm.args(rows, 16, grad=True), model))
            model.zero_grad()
    return results


@row("compile, dynamic, several norms in a recorded graph", FUNCTION)
def compile_dynamic(norm: Norm) -> Any:
    return several(norm, 3, "aot_eager")


@row("compile, region by region", FUNCTION, GRAD)
def compile_regions(norm: Norm) -> Any:
    """Twelve blocks of one kind are one graph, or as many as torch's own are; a model compiles for as long."""
    model = Chain(*(norm.module(seed=seed) for seed in range(12)))
    blocks, counter = nn.ModuleList([Chain(block) for block in model.norms]), CompileCounter()
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    args = norm.args(grad=True)
    result = args[0]
    for block in blocks:
        result = block(result, *args[1:])
    loss(result).backward()
    return [result, [t.grad for t in args], [p.grad for p in blocks.parameters()], counter.frame_count]


@row("compile, one tensor passed twice", FUNCTION)
def compile_twice(norm: Norm) -> Any:
    first, second = norm.module(), norm.module(seed=1)
    both = nn.ModuleList([first, second])

    def function(x: Tensor) -> Any:
        args = [x] * norm.arity
        return [a + b for a, b in zip(tensors_of(first(*args)), tensors_of(second(*args)), strict=True)]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        inferred = compiled(norm.args()[0])
    return [inferred, learn(compiled, norm.args(grad=True)[:1], both)]


@row("compile, a jagged NestedTensor", NESTED, FUNCTION, GRAD)
def compile_jagged(norm: Norm) -> Any:
    module = norm.module()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    return attempt(lambda: learn_jagged(compiled, norm, module, 16))


@row("compile, max-autotune", JIT, FUNCTION)
def compile_max_autotune(norm: Norm) -> Any:
    if not shutil.which("c++"):
        pytest.skip("inductor needs a C++ compiler")
    module = norm.module()
    compiled = torch.compile(module, fullgraph=True, mode="max-autotune")
    return learn(compiled, norm.args(grad=True), module)


@row("compile, dynamic by inductor", JIT, FUNCTION)
def compile_inductor(norm: Norm) -> Any:
    if not shutil.which("c++"):
        pytest.skip("inductor needs a C++ compiler")
    return several(norm, 2, "inductor")


@row("compiled autograd", FUNCTION, GRAD)
def compiled_autograd(norm: Norm) -> Any:
    """The backward pass is itself traced, of a model that is compiled and of one that isn't."""
    results = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="aot_eager")):
        torch.compiler.reset()
        module = norm.module()

        def step(*args: Tensor, module: nn.Module = module, wrap: Any = wrap) -> Any:
            result = wrap(module)(*args)
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
                loss(result).backward()
            return result

        args = norm.args(grad=True)
        results.append([step(*args), [t.grad for t in args], [p.grad for p in module.parameters()]])
    return results
