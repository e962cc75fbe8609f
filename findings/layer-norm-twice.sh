#!/usr/bin/env bash
# A good guess: derivatives of derivatives of F.layer_norm are right wherever torch gives some. gradgradcheck passes, and
# torch.func documents that its transforms nest.
# Instead: two of them are silently wrong, with relative errors of the order of 1, in float64 too.
#   1. Forward mode within forward mode: jvp of jvp, so jacfwd of jacfwd (known: pytorch issue 196700, open).
#   2. The gradient of the weight under vmap, differentiated by the input: a penalty on per-sample gradients
#      (vmap of grad, then backward), or jacrev by the weight, then jacrev by the input.
# The same formula in four lines of plain operators is right in both, as are grad of grad, and hessian (jacfwd of jacrev)
# by the input.
# Who is hurt: second-order optimisers, curvature and Taylor-mode code on Transformers with LayerNorm, and whoever
# regularises per-sample gradients: losses fall as if nothing was wrong.
# What to do: write the norm as a formula there (F.rms_norm is one, and right).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q numpy==2.4.6
cd "$folder"
venv/bin/python - <<'E'
import sys

import torch
from torch.func import grad, jvp, vmap
from torch.nn.functional import layer_norm

torch.manual_seed(0)
COLUMNS = 5
x, direction = torch.randn(2, 4, 3, COLUMNS, dtype=torch.float64)
weight, bias = torch.randn(2, COLUMNS, dtype=torch.float64)


def formula(x, weight):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def torchs(x, weight):
    return layer_norm(x, (COLUMNS,), weight, bias, 1e-5)


def second_tangent(norm):
    def first(x):
        return jvp(lambda x: norm(x, weight), (x,), (direction,))[1]

    return jvp(first, (x,), (direction,))[1]


def penalty(norm):
    """The gradient, by the input, of the sum of squares of each sample's gradient of the weight."""

    def of_weight(sample):
        return grad(lambda weight: norm(sample, weight).sin().sum())(weight)

    return grad(lambda x: vmap(of_weight)(x).square().sum())(x)


def twice(norm):
    """The same without vmap."""

    def of_weight(sample):
        return grad(lambda weight: norm(sample, weight).sin().sum())(weight)

    return grad(lambda x: torch.stack([of_weight(sample) for sample in x]).square().sum())(x)


def error(function):
    right, found = function(formula), function(torchs)
    return ((right - found).abs().max() / right.abs().max()).item()


# The oracle: the formula's second tangent against a central difference of first ones.
step = 1e-6
tangents = [jvp(lambda x: formula(x, weight), (x + s * direction,), (direction,))[1] for s in (step, -step)]
difference = (tangents[0] - tangents[1]) / (2 * step)
oracle = ((second_tangent(formula) - difference).abs().max() / difference.abs().max()).item()

print("Python", sys.version.split()[0], "torch", torch.__version__)
print(f"the formula's jvp of jvp, against a central difference: relative error {oracle:.0e}")
found = {"jvp of jvp": error(second_tangent), "per-sample penalty, vmap": error(penalty), "the same by a loop": error(twice)}
for name, value in found.items():
    print(f"{name}, F.layer_norm against the formula: relative error {value:.1e}")
same = oracle < 1e-6 and found["jvp of jvp"] > 0.1 and found["per-sample penalty, vmap"] > 0.1
sys.exit(0 if same and found["the same by a loop"] < 1e-12 else "this has changed")
E
