"""What each figure of the lesson computes, against PyTorch, the library, the paper's table and the study."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import DTYPES, F64, near
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rmsnorm
from rmsnorm.tutorial.ten_lines import TenLines

pytestmark = pytest.mark.xdist_group("browser")

ROOT = Path(__file__).parents[2]


def test_ruler_moves_what_shares_a_ruler(figure):
    seen = figure("ruler")
    x = torch.tensor(seen.batch, dtype=F64)
    y = rmsnorm.rms_norm(x, (4,), eps=1e-12)
    near(seen.norms["rms"]["y"], y)
    near(seen.norms["layer"]["y"], F.layer_norm(x, (4,), eps=1e-12))
    near(seen.norms["batch"]["y"], F.batch_norm(x, None, None, training=True, eps=1e-12))
    assert {kind: one["elsewhere"] for kind, one in seen.norms.items()} == {"batch": 2, "layer": 0, "rms": 0}
    original = [[1, 2, 3, 6], [10, 20, 30, 60], [6, 7, 8, 11]]
    norms = figure("ruler", batch=original).norms
    assert {kind: (one["scale"], one["shift"]) for kind, one in norms.items()} == {
        "batch": (False, False),
        "layer": (True, True),
        "rms": (True, False),
    }


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("factor", [0.1, 2, 100])
def test_layer_lights_up_with_what_the_ten_lines_compute(figure, name, factor):
    x = [0.1, 0.1, 0.2, 0.3]
    seen = figure("layer", dtype=name, factor=factor)
    given = (torch.tensor(x).to(DTYPES[name]).double() * factor).to(DTYPES[name])
    layer = TenLines(4, 1e-6).to(DTYPES[name])
    assert seen.input == given.double().tolist()
    assert seen.square == given.float().pow(2).double().tolist()
    if name == "float32":  # whose sum is rounded in another order than torch's
        assert seen.y == pytest.approx(layer(given).tolist(), rel=2**-23)
    else:
        assert seen.y == layer(given).double().tolist()
    assert seen.y == pytest.approx(rmsnorm.RMSNorm(4, 1e-6)(given.float()).tolist(), rel=2**-7)
    assert seen.ulps <= (0.51 if name != "float32" else 2)


def test_layers_mistakes_are_mistakes(figure):
    lost = figure("layer", dtype="float16", factor=1000, mistake="float")
    assert lost.y == [0, 0, 0, 0]
    assert lost.ulps > 1000
    assert figure("layer", dtype="float16", factor=1000).ulps <= 0.51
    right, half = figure("layer"), figure("layer", mistake="rsqrt")
    near(half.y, (np.array(right.y) / 2).astype(np.float32))
    assert all(map(math.isnan, figure("layer", factor=0, mistake="eps").y))
    assert figure("layer", factor=0).y == [0, 0, 0, 0]
    twice = figure("layer", dtype="bfloat16", mistake="type_as", weight=[1.1, 0.9, 1.3, 0.7])
    given = torch.tensor(twice.input, dtype=torch.bfloat16)
    weight = torch.tensor([1.1, 0.9, 1.3, 0.7], dtype=torch.bfloat16)
    assert twice.y == rmsnorm.rms_norm(given, (4,), weight, 1e-6, casting_mode="llama").double().tolist()


@pytest.mark.parametrize("eps", [0, 1e-8, 1e-5, 1])
def test_eps_bends_at_its_root(figure, eps):
    seen = figure("eps", eps=eps, size=1e-3)
    sizes = [10 ** (-7 + i / 3) for i in range(31)]
    np.testing.assert_allclose(seen.inside, [s / math.sqrt(s * s + eps) for s in sizes], rtol=1e-5)
    np.testing.assert_allclose(seen.outside, [s / (s + eps) for s in sizes], rtol=1e-5)
    zeros = torch.zeros(1, 4, dtype=F64, requires_grad=True)
    out = rmsnorm.rms_norm(zeros, (4,), eps=eps)
    (gradient,) = torch.autograd.grad(out[0, 0], zeros)
    np.testing.assert_allclose(seen.zero, out[0, 0].item())
    np.testing.assert_allclose(seen.gradient, gradient[0, 0].item())
    assert seen.half == float(np.float16(eps))


@pytest.mark.parametrize("shift", [-3, -0.2, 1, 4])
def test_sphere_and_circle(figure, shift):
    seen = figure("sphere", shift=shift)
    x = torch.tensor([1.2, -0.6, 0.3], dtype=F64) + shift
    near(seen.root, rmsnorm.rms_norm(x, (3,), eps=0.0))
    near(seen.layer, F.layer_norm(x, (3,), eps=0.0))
    assert seen.theta == pytest.approx(
        math.degrees(F.cosine_similarity(x, torch.ones(3, dtype=F64), dim=0).acos()), rel=1e-6
    )
    assert seen.gap < 1e-14
    assert figure("sphere", x=[1, -1, 0], shift=0).apart < 1e-14


# Zhang & Sennrich 2019, Table 1, as the authors' repository prints it.
HOLDS = {
    "scale_weights": {"BatchNorm", "WeightNorm", "LayerNorm", "RMSNorm", "pRMSNorm"},
    "shift_weights": {"LayerNorm"},
    "scale_neuron": {"BatchNorm", "WeightNorm"},
    "scale_data": {"BatchNorm", "LayerNorm", "RMSNorm", "pRMSNorm"},
    "shift_data": {"BatchNorm"},
    "scale_case": {"LayerNorm", "RMSNorm", "pRMSNorm"},
}


@pytest.mark.parametrize("factor", [0.1, 7, 100])
def test_the_board_is_the_papers_table(figure, factor):
    moved = figure("invariance", factor=factor).moved
    for change, row in moved.items():
        assert {norm for norm, away in row.items() if away < 1e-6} == HOLDS[change]
        assert all(away < 1e-12 for norm, away in row.items() if norm in HOLDS[change])  # float64, 32 terms a sum
    assert all(row["RMSNorm"] > 1e-6 for row in figure("invariance", factor=0.1, eps=1).moved.values())


@pytest.mark.parametrize("eps", [0, 1e-3, 1])
@pytest.mark.parametrize("size", [0.01, 10])
def test_gradient_is_autograds(figure, size, eps):
    seen = figure("gradient", size=size, eps=eps)
    x = torch.tensor(seen.x, dtype=F64, requires_grad=True)
    (dx,) = torch.autograd.grad(rmsnorm.rms_norm(x, (2,), eps=eps), x, torch.tensor([0.9, 0.5], dtype=F64))
    near(seen.dx, dx)
    assert seen.length == pytest.approx(dx.norm().item(), rel=1e-12)
    if eps == 0:
        assert abs(seen.cosine) < 1e-14


class Traffic(TorchDispatchMode):
    """Counts how often an operator reads or writes a tensor as long as the input."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.times = numel, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        leaves = tree_leaves((args, result))
        self.times += sum(isinstance(leaf, torch.Tensor) and leaf.numel() == self.numel for leaf in leaves)
        return result


def test_passes_are_what_operators_read_and_write(figure):
    passes = figure("passes", step=12).all
    x, w = torch.randn(8, 64), torch.ones(64)
    for name, function in (("chain", F.rms_norm), ("rms", rmsnorm.rms_norm), ("layer", F.layer_norm)):
        with torch.no_grad(), Traffic(x.numel()) as counted:
            function(x, (64,), w, eps=1e-6)
        assert passes[name] == counted.times, name
        assert figure("passes", engine=name, step=12).crossed == counted.times
    assert figure("passes", engine="rms", step=0).crossed == 0


def test_precision_has_the_borders_of_float16(figure):
    seen = figure("precision", size=256)
    assert math.isinf(seen.square)
    assert figure("precision", size=255).square == torch.tensor(255.0).half().square().item() == 65024
    assert max(seen.errors["once"]) <= 0.5
    assert 0.5 < max(seen.errors["twice"]) <= 1.5
    assert 0.2 < seen.differ < 0.3  # a quarter, as published
    for sums in seen.sums.values():
        assert len(sums) == 14
    assert all(error < 1e-5 for error in seen.sums["float32"])


def test_a_token_grows_as_the_literature_says(figure):
    for kind in ("rms", "layer"):
        ends = {place: figure("network", place=place, kind=kind).end for place in ("none", "pre", "post", "peri")}
        assert ends["pre"] == pytest.approx(5, rel=0.15)  # √(1 + 24); the matrices are one draw
        assert ends["post"] == pytest.approx(1)
        assert ends["none"] > 500
        loud = {place: figure("network", place=place, kind=kind, gain=3).end for place in ("pre", "peri")}
        assert loud["pre"] > 2 * ends["pre"]
        assert loud["peri"] == pytest.approx(ends["peri"], rel=0.2)
    assert figure("network", layer=9).at["read"] == pytest.approx(1)


def test_depth_reads_what_was_measured(figure):
    seen = {"tokens": 3, "rms": [0.1, 9.0], "largest": [1.0, 661.7], "share": [0.01, 0.03]}
    found = figure("depth", {"measured": {"depth": {"all": seen, "rest": seen}}})
    assert (found.most, found.where, found.overflows) == (661.7, 2, 1)
    assert found.average == pytest.approx(0.02)
    assert figure("depth", {"measured": {"depth": {"why": "no model"}}}).why == "no model"


def test_the_studys_numbers_are_the_studys(figure):
    from rmsnorm.study import pages
    from rmsnorm.study.results import Study

    kept = (ROOT / "src/rmsnorm/tutorial/study.json").read_text()
    assert kept == pages.lesson(Study.load(ROOT / "docs/study/results.json"))
    rows = {row["name"]: row for row in figure("study", {"study": json.loads(kept)}, view="loss").rows}
    assert f"{rows['layer']['middle']:.4f} ± {rows['layer']['band']:.4f}" in (ROOT / "docs/study/README.md").read_text()
