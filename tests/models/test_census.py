"""Proves that every RMS-type class of the installed transformers is either swapped and equal to its original, or listed
with a reason: on rows, gates and gradients of this file, against the class itself and against the formula in float64.
"""

from __future__ import annotations

import copy
from itertools import product

import census
import numpy as np
import pytest
import torch
from oracle import exact, incoming, sample, ulp
from thinned import heavy_but
from torch import Tensor, nn

import rmsnorm

pytestmark = pytest.mark.xdist_group("census")  # one process imports and patches all classes: 30 s
TYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 256
LEFT = {
    "axk2.AXK2GatedRMSNorm": "modules inside",  # its inner norm is swapped
    "deepseek_v4.DeepseekV4UnweightedRMSNorm": "in half precision",  # it rounds 1/rms
    "glm5_next.Glm5NextTextUnweightedRMSNorm": "in half precision",
    "gradium_phonon_tts.GradiumPhononTTSTimestepNorm": "in half precision",  # it computes in half precision
    "imagegpt.ImageGPTLayerNorm": "in half precision",
    "hy_v4.HYV4UnweightedRMSNorm": "no recipe",  # it returns 1/rms
    "vibevoice.VibeVoiceDiffusionHeadFinalLayer": "modules inside",
}
# Known by name alone: to load and patch them takes half a minute, and each process collects all tests.
SWAPPED = [(module, name) for module, name in census.names() if f"{module.split('.')[-2]}.{name}" not in LEFT]
# Of each meaning one class: of the others `make test` would need a minute.
ONE_EACH = {"LlamaRMSNorm", "Olmo2RMSNorm", "Gemma2RMSNorm", "MuseSparkTextCenteredRMSNorm", "Gemma4RMSNorm"}
ONE_EACH |= {"MuseSparkTextInputScaledRMSNorm", "MambaRMSNormGated", "FalconH1RMSNormGated", "Qwen3NextRMSNormGated"}
ONE_EACH |= {"KimiLinearRMSNormGated"}
USUAL = [where for where in SWAPPED if where[1] in ONE_EACH]


@pytest.mark.heavy
def test_at_least_93_percent_are_swapped_and_the_rest_has_reasons() -> None:
    lines = [census.line(cls) for cls in census.classes()]
    assert len(lines) >= 200, "the search has lost classes"
    left = {line.name: line.reason for line in lines if line.reason}
    assert len(lines) - len(left) >= 0.93 * len(lines)
    assert left.keys() <= LEFT.keys()
    assert all(LEFT[name] in reason for name, reason in left.items()), left
    for line in lines:
        if line.name in LEFT.keys() - left.keys():  # another torch swaps more
            check(line.cls)


@pytest.mark.heavy
def test_the_tables_in_the_docs_are_current() -> None:
    """Otherwise: ``make census``."""
    assert f"<!-- {census.LABEL} -->\n{census.tables()}<!-- end -->\n" in census.DOCS.read_text()


@pytest.mark.parametrize(("module", "name"), heavy_but(USUAL, SWAPPED), ids=[name for _, name in SWAPPED])
def test_swapped_and_equal_to_its_original(module: str, name: str) -> None:
    check(census.load(module, name))


def check(cls: type[nn.Module]) -> None:
    for module in census.instances(cls):
        theirs, ours = copy.deepcopy(module), copy.deepcopy(module)
        rmsnorm.patch(ours)
        gated = "gate" in census.line(cls).meanings[0]
        name = "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps"
        for eps in (getattr(module, name), 0.3):  # the second shows in every row
            setattr(theirs, name, eps)
            setattr(ours, name, eps)
            for x_type, w_type in product(TYPES, TYPES if list(module.parameters()) else TYPES[:1]):
                inputs = [sample(ROWS, census.SIZE, x_type)[None]]
                if gated:
                    inputs.append(incoming(ROWS, census.SIZE, x_type)[None] * 8)
                a, b = theirs.to(w_type)(*inputs), ours.to(w_type)(*inputs)
                assert (a.dtype, a.shape) == (b.dtype, b.shape), (x_type, w_type)
                compare(a.detach(), b.detach(), x_type, getattr(module, "bias", None) is not None, gated)
                if eps != 0.3:
                    same_gradients(theirs, ours, inputs, 40 if gated else 6)


def compare(theirs: Tensor, ours: Tensor, x_type: torch.dtype, biased: bool, gated: bool) -> None:
    """Half types: at least 99.9 % identical; the rest is one rounding of x·r to the input's type that fell the other
    way, which the weight and later roundings pass on as up to 2 ulp. float32: theirs sums and multiplies in float32 and
    errs by up to 5 ulp, ours by less than one, so 99 % are within 2 ulp, and none is further than theirs may err. A
    bias may cancel: errors are then relative to the row. A gate brings an exponential and a product more, to both."""
    a, b = exact(theirs), exact(ours)
    coarse = max(x_type, theirs.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    apart = np.abs(a - b) / ulp(np.abs(a).max(-1, keepdims=True) if biased else a, coarse)
    if coarse is torch.float32:
        near, far = (4, 10) if gated else (2, 6)
        assert np.mean(apart <= near) >= 0.99, np.mean(apart <= near)
        assert apart.max() <= far
    else:
        assert np.mean(a == b) >= 0.999, np.mean(a == b)
        assert apart.max() <= 2


def same_gradients(theirs: nn.Module, ours: nn.Module, inputs: list[Tensor], allowed: int) -> None:
    """Row by row for the input, in all for the weight; in norms, relative, in eps of the coarsest type: their chain of
    a dozen operators rounds at each, and a forgotten term would show as 0.1 to 1. A gate can leave a row with one large
    element, along which the gradient cancels: 19 seen."""
    gradients: list[tuple[Tensor, ...]] = []
    for module in (theirs, ours):
        leaves = [x.clone().requires_grad_() for x in inputs] + list(module.parameters())
        output = module(*leaves[: len(inputs)])
        grad = incoming(ROWS, census.SIZE, output.dtype).view(output.shape)
        gradients.append(torch.autograd.grad(output, leaves, grad))
    coarse = max(torch.finfo(t.dtype).eps for t in (*inputs, *ours.parameters()))
    for a, b in zip(*gradients, strict=True):
        assert a.dtype is b.dtype
        size, apart = a.double().norm(dim=-1), (a.double() - b.double()).norm(dim=-1)
        assert (apart <= allowed * coarse * size + torch.finfo(a.dtype).smallest_normal).all(), (
            apart / size
        ).max() / coarse
