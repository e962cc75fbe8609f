#!/usr/bin/env bash
# A good guess: F.normalize(x) has eps=1e-12 "to avoid division by zero", so a row of zeros stays zeros, in every dtype;
# and its rows have length 1 up to the rounding of single elements, which averages out.
# Instead: 1e-12 is 0 in float16, so a row of zeros becomes NaN (known: pytorch issue 32137, open since 2020). And the norm
# itself is rounded to bfloat16 or float16 before the division: all elements of a row are off by one common factor of up
# to 2^-8 or 2^-11, which doesn't average out.
# Who is hurt: RMS norms written as F.normalize(x) * sqrt(d), on padding; embeddings in half that are compared by dot product.
# What to do: normalise in float32 and round once: F.normalize(x.float(), dim=-1).to(x.dtype).
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
import torch.nn.functional as F

print("Python", sys.version.split()[0], "torch", torch.__version__)
torch.manual_seed(0)
torch.set_num_threads(1)


def wide(x):
    return F.normalize(x.float(), dim=-1).to(x.dtype)


for dtype in (torch.float32, torch.bfloat16, torch.float16):
    zeros = torch.zeros(1, 8, dtype=dtype)
    got = F.normalize(zeros, dim=-1)
    print(f"{dtype}: zeros become {got[0, :3].tolist()} ..., by way of float32 {wide(zeros)[0, :3].tolist()} ...")
    assert got.isnan().all() if dtype == torch.float16 else (got == 0).all()
    assert (wide(zeros) == 0).all()

for dtype in (torch.bfloat16, torch.float16):
    x = torch.randn(1000, 768).to(dtype)
    exact = F.normalize(x.double(), dim=-1)
    # What a row has in common with the exact one; errors of single elements average out.
    both = F.normalize(x, dim=-1), wide(x)
    direct, rounded_once = (((y.double() * exact).sum(-1) - 1).abs().max().item() for y in both)
    print(f"{dtype}: common factor of a row off by up to {direct:.1e}, by way of float32 {rounded_once:.1e}")
    assert direct > torch.finfo(dtype).eps / 4 and direct > 3 * rounded_once
E
