"""Rows of the table in test_home.py about ONNX: both of torch's exporters, onnx's checker, and onnxruntime.

torch 2.13's exporter takes opset 18 to 25 (below 18 it writes 18, above 25 it writes a model of no valid opset), and
its old one, of TorchScript, 7 to 20. Both are tried at their ends and at 20, torch's default; ONNX has had
RMSNormalization since 23.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from home_compare import Either, Failed, attempt, tensors_of
from home_export import WARNS
from home_graphs import TRACER
from home_norms import Filter, Norm, row

OPSETS = (18, 20, 22, 23, 25)
OLD_OPSETS = tuple(range(7, 21))
NEW: tuple[Filter, ...] = (
    *WARNS,
    ("", FutureWarning),  # onnxscript's and torch's, about each other
    ("", DeprecationWarning),
)
OLD: tuple[Filter, ...] = (
    *NEW,
    TRACER,
    ("You are using the legacy TorchScript-based ONNX export", UserWarning),  # the exporter as a whole
    ("Setting 'keep_initializers_as_inputs=False' for opset version8 or lower", UserWarning),
    ("Exporting a model while it is in training mode", UserWarning),
)


@contextmanager
def one_registry() -> Iterator[None]:
    """torch's exporter reads the source of 497 functions in each call: two thirds of the time of these rows."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(_cached(ONNXRegistry))):
        yield


@cache
def _cached(registry: Any) -> Any:
    return cache(registry.from_torchlib)


def example(norm: Norm) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    return norm.module().eval(), norm.args()


@cache
def exported(norm: Norm, opset: int, dynamo: bool) -> Any:
    """The model, or the error; the norm is in its context already."""
    module, args = example(norm)
    if not dynamo:
        file = io.BytesIO()
        failed = attempt(lambda: torch.onnx.export(module, args, file, dynamo=False, opset_version=opset))
        return failed if isinstance(failed, Failed) else file.getvalue()
    with one_registry():
        program = attempt(lambda: torch.onnx.export(module, args, dynamo=True, opset_version=opset, verbose=False))
    return program if isinstance(program, Failed) else program.model_proto.SerializeToString()


def run(model: bytes, norm: Norm) -> list[torch.Tensor]:
    """The results of onnxruntime, of a model that onnx's checker finds valid."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    feed = dict(zip(names, (t.numpy() for t in norm.args()), strict=True))
    return [torch.from_numpy(t) for t in session.run(None, feed)]


def through_onnx(norm: Norm, opset: int, dynamo: bool) -> Any:
    model = exported(norm, opset, dynamo)
    result = model if isinstance(model, Failed) else attempt(lambda: run(model, norm))
    if norm.ours or dynamo or not isinstance(result, Failed):
        return result
    assert issubclass(result.kind, torch.onnx.errors.UnsupportedOperatorError), result
    module, args = example(norm)
    with torch.no_grad():
        return Either(result, [t.clone() for t in tensors_of(module(*args))])


@row("ONNX, every opset", *NEW)
def onnx_new(norm: Norm) -> Any:
    pytest.importorskip("onnxscript")
    return {opset: through_onnx(norm, opset, dynamo=True) for opset in OPSETS}


@row("ONNX, every opset of the TorchScript exporter", *OLD)
def onnx_old(norm: Norm) -> Any:
    """torch has no translation of F.rms_norm there; where ours goes through, its values are right."""
    return {opset: through_onnx(norm, opset, dynamo=False) for opset in OLD_OPSETS}


def kinds(model: bytes) -> set[str]:
    onnx = pytest.importorskip("onnx")
    return {node.op_type for node in onnx.load_from_string(model).graph.node}


@row("ONNX, with the operators that runtimes know a norm by", *NEW)
def onnx_operators(norm: Norm) -> Any:
    """Below opset 23, Sqrt and Div, by which onnxruntime recognises the norm (torch's own writes Reciprocal); from
    there on RMSNormalization."""
    layer = norm.public == "layer_norm"
    wanted = [
        {"LayerNormalization"} if layer else {"Sqrt", "Div"} if opset < 23 else {"RMSNormalization"} for opset in OPSETS
    ]
    if not norm.ours:
        return [(True, False)] * len(OPSETS)
    found = [exported(norm, opset, True) for opset in OPSETS]
    found = [f if isinstance(f, Failed) else kinds(f) for f in found]
    return [f if isinstance(f, Failed) else (w <= f, "Reciprocal" in f) for f, w in zip(found, wanted, strict=True)]


@row("ONNX, fused by onnxruntime", *NEW)
def onnx_fused(norm: Norm) -> Any:
    """What onnxruntime makes of the graph of opset 20: one operator for the norm."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    if not norm.ours:
        return True
    model = exported(norm, 20, True)
    if isinstance(model, Failed):
        return model
    with tempfile.TemporaryDirectory() as folder:
        options, path = onnxruntime.SessionOptions(), Path(folder) / "optimized.onnx"
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        fused = {node.op_type for node in onnx.load(path).graph.node}
    return bool(fused & {"SimplifiedLayerNormalization", "LayerNormalization"})
