"""Rows of the table in test_home.py about torch.export, and what is done to its programs."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from home_compare import Advice, Failed, attempt, learn, tensors_of
from home_graphs import FUNCTION, JIT, LEAF
from home_norms import COLUMNS, Filter, Norm, row
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

WARNS: tuple[Filter, ...] = (LEAF, JIT, FUNCTION)


def export(norm: Norm, columns: int = 16, strict: bool = False) -> ExportedProgram:
    """With a number of rows that isn't the example's alone."""
    module = norm.module(columns)
    rows = ({0: Dim.DYNAMIC},) * norm.arity
    return torch.export.export(module, norm.args(3, 5, columns), dynamic_shapes=rows, strict=strict)


def infer(module: nn.Module, norm: Norm, columns: int = 16) -> Any:
    with torch.no_grad():
        return [tensors_of(module(*norm.args(n, 5, columns))) for n in (3, 4, 7)]


def exported(norm: Norm, strict: bool) -> Any:
    """For inference and for training, and trained afterwards."""
    with torch.no_grad():
        results = [infer(export(norm, columns, strict).module(), norm, columns) for columns in COLUMNS]
    trained = export(norm, strict=strict).module()
    return [*results, infer(trained, norm), learn(trained, norm.args(4, 5, 16, grad=True))]


@row("export", *WARNS)
def export_plain(norm: Norm) -> Any:
    return exported(norm, strict=False)


@row("export, strict", *WARNS)
def export_strict(norm: Norm) -> Any:
    return exported(norm, strict=True)


@row("export under no_grad, then trained", *WARNS)
def export_no_grad_trained(norm: Norm) -> Any:
    """The gradients of torch's program or an error, but no weight whose gradient is silently None."""
    with torch.no_grad():
        module = export(norm).module()
    result = attempt(lambda: learn(module, norm.args(4, 5, 16, grad=True)))
    if norm.ours and isinstance(result, Failed) and not issubclass(result.kind, Warning):
        return Advice(result.text)
    return result


class Live(nn.Module):
    """A norm whose weight, and so the size that it normalises over, is an argument."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.function, self.norm, self.arity = norm.live, norm.module(), norm.arity
        self.names = [name for name, _ in self.norm.named_parameters()]

    def forward(self, *tensors):
        if self.function is not None:
            return self.function(*tensors)
        weights = dict(zip(self.names, tensors[self.arity :], strict=True))
        return torch.func.functional_call(self.norm, weights, tensors[: self.arity])


@row("export, normalised over a size that isn't known", *WARNS)
def export_live(norm: Norm) -> Any:
    """Functions take it; of a layer, whose size is a constant, torch refuses to make it dynamic."""
    module = Live(norm)

    def tensors(columns: int) -> tuple[Tensor, ...]:
        weights = [p.detach().clone() for p in norm.module(columns).parameters()]
        return (*norm.args(2, 5, columns), *weights)

    columns = Dim("columns", min=2, max=4096)
    shapes = (*({2: columns},) * norm.arity, *({0: columns},) * len(module.names))
    results = []
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            program = attempt(lambda: torch.export.export(module, tensors(16), dynamic_shapes=(shapes,)))
        if isinstance(program, Failed):
            results.append(program)
            continue
        results.append([program.module()(*tensors(columns)) for columns in (16, 5, 129)])
    return results


@row("export, saved and loaded", *WARNS)
def export_saved(norm: Norm) -> Any:
    file = io.BytesIO()
    torch.export.save(export(norm), file)
    file.seek(0)
    module = torch.export.load(file).module()
    return [infer(module, norm), learn(module, norm.args(4, 5, 16, grad=True))]


@row("run_decompositions", *WARNS)
def run_decompositions(norm: Norm) -> Any:
    results = []
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            module = export(norm).run_decompositions().module()
        results.append(infer(module, norm))
    return [*results, learn(module, norm.args(4, 5, 16, grad=True))]


def targets(program: ExportedProgram) -> list[Any]:
    """The operators of a program; getitem takes results apart and isn't one."""
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return [target for target in calls if isinstance(target, torch._ops.OpOverload)]


@row("decomposed it is core ATen, as ExecuTorch takes it", *WARNS)
def core_aten(norm: Norm) -> Any:
    """ExecuTorch's road, which is exported under no_grad and decomposed, and ends at operators it has no kernel for."""
    with torch.no_grad():
        operators = targets(export(norm).run_decompositions())
    return [str(op) for op in operators if op.namespace != "aten" or torch.Tag.core not in op.tags]


@row("exported, it has aten's operators only", *WARNS)
def aten_only(norm: Norm) -> Any:
    """Exported with gradients, as torch's guides do it: the road to OpenVINO and to Core ML."""
    return [str(op) for op in targets(export(norm)) if op.namespace != "aten"]


@row("exported and compiled", *WARNS)
def export_compiled(norm: Norm) -> Any:
    module = export(norm).module()
    compiled: Callable[..., Any] = torch.compile(module, backend="aot_eager", fullgraph=True)
    return learn(compiled, norm.args(4, 5, 16, grad=True), module)
