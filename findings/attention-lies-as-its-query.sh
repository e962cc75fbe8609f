#!/usr/bin/env bash
# A good guess: it makes no difference to F.scaled_dot_product_attention on a CPU how query lies in memory, or contiguous
# [batch, heads, tokens, head_dim] is best, as a kernel that turns or norms queries would write it. The output is a new
# tensor, laid out the same way each time.
# Instead: the output has the layout of query. Where query is a projection's memory, transposed, the output can be viewed
# as [batch, tokens, heads * head_dim], and the next linear layer reads it in place. Where query is contiguous, that view
# is a copy, in each layer, and autograd keeps both: attention's output for its own backward, the copy for the linear's.
# Who is hurt: who writes a fused rotary embedding or head norm with a contiguous result, or calls .contiguous() on
# queries "for speed": the same numbers, one more tensor of [tokens, hidden] per layer, and no profile names the reason.
# What to do: write turned heads as [batch, tokens, heads, head_dim], and hand over the transposed view.
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
tokens, heads, head_dim = 128, 9, 64
weight = torch.randn(heads * head_dim, heads * head_dim)
projected = [torch.randn(1, tokens, heads, head_dim, requires_grad=True) for _ in range(3)]


def run(contiguous):
    """The output's strides, whether the linear layer reads it in place, its result, and the bytes kept for backward."""
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    query, key, value = (x.transpose(1, 2) for x in projected)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        query = query.contiguous() if contiguous else query
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        row = y.transpose(1, 2).reshape(1, tokens, heads * head_dim)
        z = F.linear(row, weight.requires_grad_())
    return y.stride(), row.data_ptr() == y.data_ptr(), z, sum(storages.values())


plain, dense = run(False), run(True)
for name, (strides, in_place, _, size) in (("transposed", plain), ("contiguous", dense)):
    print(f"query {name}: output's strides {strides}, read in place: {in_place}, kept for backward: {size} bytes")
more = tokens * heads * head_dim * 4
torch.testing.assert_close(plain[2], dense[2])
assert plain[1] and not dense[1]
assert plain[0] == (tokens * heads * head_dim, head_dim, heads * head_dim, 1)
assert dense[0] == (tokens * heads * head_dim, tokens * head_dim, head_dim, 1)
assert dense[3] - plain[3] == more, "one more tensor of [tokens, hidden]"
print("one tensor of [tokens, hidden] more:", more, "bytes")
E
