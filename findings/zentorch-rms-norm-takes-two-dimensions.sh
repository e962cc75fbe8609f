#!/usr/bin/env bash
# A good guess: torch.ops.zentorch.zentorch_rms_norm(input, weight, eps) normalises the last dimension of any tensor, as
# nn.RMSNorm does, or raises where it can't. Its result has the input's shape, of three dimensions too.
# Instead: of [batch, tokens, hidden] it writes the first `batch` rows and returns the rest of the memory as it was found.
# Strides aren't read: of x[::2] it normalises the rows of x. float16, on a CPU without AVX512-FP16, is a line on stderr:
# the norm returns memory as it was found, and the add + norm in place leaves both tensors as they were. Nothing raises.
# Who is hurt: a model of batch 1 whose layers are replaced by this operator: its first token alone is normalised, and no
# shape tells. A test that has just freed the right result of this size may even find it in the memory.
# What to do: input.reshape(-1, hidden).contiguous(); and ask zentorch_is_fp16_supported() before handing over float16.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! grep -qm1 avx512f /proc/cpuinfo; then echo "zentorch's kernels want a CPU with AVX-512" && exit 0; fi
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q numpy==2.4.6 deprecated==1.3.1 wrapt==2.5.2
"$folder/venv/bin/pip" install -q --no-deps zentorch==2.13.0.2
cd "$folder"
venv/bin/python - <<'E'
import sys

import torch
import torch.nn.functional as F
import zentorch

print("Python", sys.version.split()[0], "torch", torch.__version__, "zentorch", zentorch.__version__)
torch.manual_seed(0)
ops, hidden = torch.ops.zentorch, 4096
weight = torch.ones(hidden)


def right(got, x):
    """Which rows of it are the norms of x."""
    rows = zip(got.view(-1, hidden), F.rms_norm(x, (hidden,), weight, 1e-6).view(-1, hidden), strict=True)
    return [torch.allclose(a, b, atol=1e-5) for a, b in rows]


x = torch.randn(6, hidden)
flat, deep = (right(ops.zentorch_rms_norm(y, weight, 1e-6), y) for y in (x, x.view(2, 3, hidden)))
print("[6, 4096]:   ", flat)
print("[2, 3, 4096]:", deep)
assert all(flat) and all(deep[:2]) and not any(deep[2:])

wide = torch.randn(12, hidden)
strided = ops.zentorch_rms_norm(wide[::2], weight, 1e-6)
print("x[::2]:      ", right(strided, wide[::2]), "beside the rows of x:", right(strided, wide[:6]))
assert not any(right(strided, wide[::2])[1:]) and all(right(strided, wide[:6]))

if ops.zentorch_is_fp16_supported():
    print("this CPU has AVX512-FP16: float16 is served")
else:
    half = x.half()
    normed, residual = half.clone(), half.clone()
    ops.zentorch_add_rms_norm_(normed, weight.half(), residual, 1e-6)  # would leave the norm of 2x and 2x
    print("float16, add + norm: both tensors as they were:", normed.equal(half), residual.equal(half))
    assert normed.equal(half) and residual.equal(half)
E
