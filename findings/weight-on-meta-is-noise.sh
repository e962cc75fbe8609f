#!/usr/bin/env bash
# A good guess: a layer whose weight was never loaded, and still lies on the meta device, raises when it is called with
# tensors on the CPU: "Tensor on device meta is not on the expected device cpu", as layer_norm, rms_norm and x + w do.
# Instead: a linear layer without bias, x @ w of matrices and convolutions return a tensor on the CPU that nobody has
# written: memory as it was found, without an error or a warning, with gradients too. One argument on meta is enough for
# torch to ask the operator's meta function, which finds shapes, and makes its empty tensor of the input's kind. An
# operator of one's own does it as well, written as the documentation has it: torch.library.custom_op with
# register_fake. (The embedding of indices on meta: pytorch issue 109781.)
# Who is hurt: who builds a model on meta and fills it from a checkpoint with a key too few: LLaMA's projections have no
# bias, so it writes noise instead of stopping; who writes operators, whose users are.
# What to do: after loading, any(p.is_meta for p in model.parameters()); in an operator's fake function, raise where
# devices differ. In torch.use_deterministic_algorithms(True) such memory is NaN, which shows here that it is unwritten.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
cd "$folder"
venv/bin/python - 2>log <<'E' || { cat log >&2; exit 1; }
import sys

import torch
from torch.nn import functional as F


@torch.library.custom_op("demo::scaled", mutates_args=())
def scaled(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * w


@scaled.register_fake
def _(x, w):
    return torch.empty_like(x)


def outcome(call):
    try:
        found = call()
    except (RuntimeError, NotImplementedError) as error:
        return type(error).__name__
    return "a tensor on " + str(found.device) + (", unwritten" if found.isnan().all() else "")


print("Python", sys.version.split()[0], "torch", torch.__version__)
torch.use_deterministic_algorithms(True)  # fills memory that is new with NaN
x, image = torch.ones(4, 8), torch.ones(1, 8, 5)
w, kernel = torch.ones(8, 8, device="meta"), torch.ones(8, 8, 3, device="meta")
calls = {
    "x + w": lambda: x + w[:4],
    "F.layer_norm(x, w)": lambda: F.layer_norm(x, (8,), w[0]),
    "F.rms_norm(x, w)": lambda: F.rms_norm(x, (8,), w[0]),
    "nn.Linear(8, 8), on meta": lambda: torch.nn.Linear(8, 8, device="meta")(x),
    "nn.Linear(8, 8, bias=False), on meta": lambda: torch.nn.Linear(8, 8, bias=False, device="meta")(x),
    "nn.Linear, of [1, 4, 8]": lambda: torch.nn.Linear(8, 8, bias=False, device="meta")(x[None]),
    "x @ w": lambda: x @ w,
    "F.conv1d(image, kernel)": lambda: F.conv1d(image, kernel),
    "an operator of one's own": lambda: scaled(x, w[:4]),
}
found = {name: outcome(call) for name, call in calls.items()}
for name, said in found.items():
    print(f"{name}: {said}")
assert [said for said in found.values()] == ["RuntimeError"] * 4 + ["a tensor on cpu, unwritten"] * 5
E
