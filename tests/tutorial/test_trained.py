"""The model that is trained in the page, against autograd; the same seed gives the same curve."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import F64

import rmsnorm
from rmsnorm.tutorial import build

pytestmark = pytest.mark.xdist_group("browser")


def test_random_numbers_are_random_and_the_same_for_the_same_seed(script):
    model = script("model.create", "rms", list(range(27)), 3)
    again = script("model.create", "layer", list(range(27)), 3)
    assert model["weights"] == again["weights"]
    assert script("model.create", "rms", list(range(27)), 4)["weights"] != model["weights"]
    w = np.array(model["weights"]["w0"]) / math.sqrt(2 / 32)
    assert abs(w.mean()) < 4 / math.sqrt(w.size)  # four standard errors
    assert abs(w.std() - 1) < 4 / math.sqrt(2 * w.size)


def test_the_same_seed_gives_the_same_curve(script):
    """And no norm runs away where the others learn."""
    data = script("lesson.model.encode(a)", build.read("corpus.txt"))
    code = (
        "(() => { const m = lesson.model.create(a, b, c); for (let i = 0; i < 150; i++) lesson.model.step(m, d); "
        "return m.losses })()"
    )
    first = script(code, "rms", data, 1, 0.3)
    assert first == script(code, "rms", data, 1, 0.3) != script(code, "rms", data, 2, 0.3)
    letters = script("lesson.model.frequencies(a)", data)
    assert letters == pytest.approx(
        torch.distributions.Categorical(torch.bincount(torch.tensor(data)).double()).entropy()
    )
    assert np.mean(first[-25:]) < letters
    assert not max(script(code, "none", data, 1, 0.3)) < 2 * math.log(28)
    assert np.mean(script(code, "none", data, 1, 0.05)[-25:]) < letters


def torch_loss(kind: str, weights: dict[str, torch.Tensor], windows: torch.Tensor) -> torch.Tensor:
    """The page's model, written again for autograd."""

    def norm(x, gain):
        if kind == "batch":
            return F.batch_norm(x, None, None, gain, None, training=True, eps=1e-5)
        if kind == "layer":
            return F.layer_norm(x, (32,), gain, eps=1e-5)
        return rmsnorm.rms_norm(x, (32,), gain, 1e-5) if kind == "rms" else x * gain

    x = weights["embed"].view(28, 4)[windows[:, :8]].flatten(1)
    for layer in range(4):
        x = x + norm(x, weights[f"g{layer}"]).relu() @ weights[f"w{layer}"].view(32, 32)
    return F.cross_entropy(norm(x, weights["last"]) @ weights["out"].view(32, 28), windows[:, 8])


@pytest.mark.parametrize("kind", ["none", "batch", "layer", "rms"])
def test_the_models_backward_is_autograds(script, kind):
    data = torch.randint(28, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    model = script("model.create", kind, data, 1)
    places = list(range(0, 280, 9))
    code = (
        "(() => { const m = lesson.model.create(a, b, 1); return { loss: lesson.model.loss(m, c), grads: m.grads } })()"
    )
    found = script(code, kind, data, places)
    weights = {name: torch.tensor(v, dtype=F64).requires_grad_() for name, v in model["weights"].items()}
    windows = torch.tensor([data[place : place + 9] for place in places])
    loss = torch_loss(kind, weights, windows)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-12)
    loss.backward()
    for name, weight in weights.items():
        np.testing.assert_allclose(found["grads"][name], weight.grad, rtol=1e-9, atol=1e-12, err_msg=name)
