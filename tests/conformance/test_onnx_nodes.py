"""Proves that rms_norm is ONNX's RMSNormalization (opset 23): the operator's own backend tests, every axis, rank and
epsilon that the onnx package has, in every CPU target and in the reference definition.

The package holds the cases as code that makes input, scale and output from a fixed seed (``case/node``), the output by
the operator's reference implementation, in numpy's fp32; there are no files of them any more. A case is one node.
"""

from __future__ import annotations

from importlib import import_module

import numpy as np
import onnx
import pytest
import torch
from oracle import MODES, same_bits
from torch import Tensor

from rmsnorm import RMSNorm, rms_norm

# Importing the operator's module registers its cases. onnx's public collect_testcases imports those of all operators,
# which takes 20 s and warns of overflows in casts.
import_module("onnx.backend.test.case.node.rmsnormalization")
_registered = import_module("onnx.backend.test.case.node")._NodeTestCases
ALL = {case.name: case for case in _registered if case.name.startswith("test_rms_normalization_")}
CASES = {name: case for name, case in ALL.items() if not name.endswith("_expanded")}
# onnx 1.23.2 ships 8 axes of a 4-dimensional input, its default axis, 4 axes of a 2-dimensional one, and 6 axes of a
# 3-dimensional one with epsilon 0.1.
SHIPPED = 19

# Relative, with u = 2^-24, for rows of up to 120 columns. Theirs: the square 1, numpy's sum over 8 lanes at most
# 120/8 + 3 (a short row: 4), the mean and eps 2, all halved by the root; root, reciprocal, product and gain 4: 14.5.
# Ours: 2 ulp, or 5 for the reference, and an ulp is at most 2u. No absolute error: nothing cancels. onnx allows 1e-3.
UNITS = {"native": 14.5 + 2 * 2, "reference": 14.5 + 2 * 5}


def attribute(node: onnx.NodeProto, name: str) -> float | int:
    """The node's attribute, or the operator's default."""
    default = onnx.defs.get_schema("RMSNormalization", 23).attributes[name].default_value
    given = next((a for a in node.attribute if a.name == name), default)
    return onnx.helper.get_attribute_value(given)


def check(got: Tensor, expected: np.ndarray, target: str) -> None:
    assert (got.dtype, tuple(got.shape)) == (torch.float32, expected.shape)
    allowed = UNITS["reference" if target == "reference" else "native"] * 2.0**-24
    wide = expected.astype(np.float64)
    error = np.abs(got.detach().double().numpy() - wide) / np.abs(wide)
    assert np.max(error) <= allowed, f"relative error {np.max(error):.3g}, allowed {allowed:.3g}"


def test_all_shipped_cases_are_here():
    """The expanded cases are the same arrays, for a graph of primitive operators instead of one node."""
    assert len(CASES) == SHIPPED, f"another onnx? It has {sorted(CASES)}"
    for name, case in CASES.items():
        (inputs, outputs), (same_inputs, same_outputs) = case.data_sets[0], ALL[f"{name}_expanded"].data_sets[0]
        assert all(a is b for a, b in zip((*inputs, *outputs), (*same_inputs, *same_outputs), strict=True)), name
    epsilons = {attribute(case.model.graph.node[0], "epsilon") for case in CASES.values()}
    assert sorted(epsilons) == [float(np.float32(1e-5)), float(np.float32(0.1))]


@pytest.mark.parametrize("name", CASES)
def test_node(target, name):
    """The function in both casting modes (one function in fp32), and the layer, with and without autograd."""
    case = CASES[name]
    (node,) = case.model.graph.node
    assert node.op_type == "RMSNormalization"
    assert attribute(node, "stash_type") == onnx.TensorProto.FLOAT, "statistics are asked for in fp32"
    ((inputs, (expected,)),) = case.data_sets
    x, scale = (torch.from_numpy(array.copy()) for array in inputs)
    shape, eps = x.shape[attribute(node, "axis") :], attribute(node, "epsilon")
    assert scale.shape == shape
    y = rms_norm(x, shape, scale, eps)
    check(y, expected, target)
    for mode in MODES:
        assert same_bits(rms_norm(x, shape, scale, eps, casting_mode=mode), y), mode
        layer = RMSNorm(shape, eps, casting_mode=mode)
        layer.weight.data.copy_(scale)
        assert same_bits(layer(x).detach(), y), f"layer, {mode}"
