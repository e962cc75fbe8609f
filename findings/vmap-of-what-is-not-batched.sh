#!/usr/bin/env bash
# A good guess: vmap(f, in_dims, out_dims) puts the batch where out_dims says, whatever f does; a result that doesn't
# depend on what is batched is repeated there.
# Instead: such a result is repeated along the first dimension, whatever out_dims says.
#   1. With out_dims=1 and as many samples as the result has elements, the numbers are silently transposed.
#   2. With any other number of samples the call raises, of sizes that nobody gave.
#   3. With out_dims=-1 (documented: from the end) it raises of a size like 34359738369: memory beside the sizes is read.
# Who is hurt: whoever batches over one of several arguments, and gets several results: rotary embedding of query and
# key, of which the key alone is batched; a norm of which the weights are (an ensemble), and whose sum isn't.
# What to do: out_dims=0 (the default), then movedim; or make the result depend on a batched argument.
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
from torch.func import vmap


def both(fixed, batched):
    return fixed * 2, batched * 2


fixed, batched = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, 5)
by_loop = torch.stack([both(fixed, sample)[0] for sample in batched], dim=1)
found = vmap(both, in_dims=(None, 0), out_dims=1)(fixed, batched)[0]
depends = vmap(lambda fixed, batched: (fixed * 2 + 0 * batched.sum(), batched), (None, 0), 1)(fixed, batched)[0]


def said(samples, out_dims):
    try:
        vmap(both, in_dims=(None, 0), out_dims=out_dims)(fixed, torch.zeros(samples, 5))
    except RuntimeError as error:
        return str(error)
    return "nothing"


print("Python", sys.version.split()[0], "torch", torch.__version__)
print("by a loop:\n", by_loop, "\nby vmap:\n", found, sep="")
four, last = said(4, 1), said(3, -1)
print("4 samples, out_dims=1:", four)
print("3 samples, out_dims=-1:", last)
transposed = torch.equal(found, by_loop.T) and not torch.equal(found, by_loop)
same = transposed and torch.equal(depends, by_loop) and "expanded size" in four and last != "nothing"
sys.exit(0 if same else "this has changed")
E
