"""What the lesson measures: a quiet machine's times, a real model's norms, kernels' errors in ulps."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from rmsnorm import _smollm
from rmsnorm.tutorial import measured, ulp


def test_a_busy_machine_has_no_timing(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    assert "busy" in measured.cost(1, "float32")["why"]


class LlamaRMSNorm(torch.nn.Module):
    """A norm of the name that transformers' has."""

    def forward(self, x):
        return 3 * x + 1


def test_depth_measures_what_each_norm_is_given(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Embedding(9, 8), LlamaRMSNorm(), LlamaRMSNorm())
    words = torch.tensor([[1, 5, 2]])
    monkeypatch.setattr(measured, "model", lambda: (lambda text, return_tensors: {"input_ids": words}, model))
    found = measured.depth("three tokens")
    for part, rows in (("all", [1, 5, 2]), ("rest", [5, 2])):
        first = model[0].weight.detach().double().numpy()[rows]
        seen = found[part]
        assert seen["tokens"] == len(rows)
        assert len(_smollm.norms_of(model)) == len(seen["rms"]) == 2
        for place, x in enumerate((first, 3 * first + 1)):
            rms = np.sqrt((x**2).mean(-1))
            assert seen["rms"][place] == pytest.approx(np.sqrt((x**2).mean()), rel=1e-6)
            assert seen["largest"][place] == pytest.approx(abs(x).max(), rel=1e-6)
            assert seen["share"][place] == pytest.approx((abs(x.mean(-1)) / rms).mean(), rel=1e-5)


def test_kernels_err_by_less_than_was_promised():
    found = measured.ulps()
    assert found["bfloat16"] <= 0.51  # docs/numerics.md
    assert found["float16"] <= 0.51
    assert found["float32"] <= 2


@pytest.mark.parametrize(("dtype", "numpy"), [(torch.float32, np.float32), (torch.float16, np.float16)])
def test_gaps_are_numpys_spacing(dtype, numpy):
    values = np.array([1, 1.5, 2, 3.99, 1000, 6e-5, 1e-7, 0], dtype=numpy)
    exact = torch.from_numpy(values.astype(np.float64))
    assert ulp.gaps(exact, dtype).tolist() == np.spacing(values).astype(np.float64).tolist()


def test_gaps_of_bfloat16_are_float32s_without_16_bits():
    exact = torch.tensor([1.0, 3.0, 1e-30, 500.0], dtype=torch.float64)
    assert torch.equal(ulp.gaps(exact, torch.bfloat16), 2.0**16 * ulp.gaps(exact, torch.float32))


def test_errors_count_what_is_not_finite_as_infinite():
    exact = torch.tensor([1.0, 70000.0, np.inf, 1.0], dtype=torch.float64)
    rounded = torch.tensor([1.0 + 2**-10, np.inf, np.inf, np.nan], dtype=torch.float16)
    found = ulp.errors(rounded, exact).tolist()
    assert found[:2] == [1.0, np.inf]
    assert found[3] == np.inf
