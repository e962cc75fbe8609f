#!/usr/bin/env bash
# A good guess: in a compiled function `a in (1, b)` is `a == 1 or a == b`, as in Python; linters offer to write one as the
# other (pylint's R1714, ruff's PLR1714).
# Instead: where a is a constant and b a size that torch.compile has made symbolic (with the default dynamic=None: once it
# has changed), dynamo answers False without a guard, also when they are equal. Nothing is said: the compiled function
# takes the wrong branch. So with a list, and with a shape: `7 in x.shape`. The two comparisons, a set, a dictionary,
# .index(), .count(), and a symbolic size in a tuple of constants are right.
# Who is hurt: whoever checks by hand what may be broadcast (`size in (1, rows)`): compiled code refuses tensors that fit,
# or silently computes what is meant for those that don't, from the third batch size on.
# What to do: write the comparisons out, or a set.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q numpy==2.4.6
cd "$folder"
cat >program.py <<'E'
import sys

import torch

print("Python", sys.version.split()[0], "torch", torch.__version__)

FUNCTIONS = {
    "c.shape[0] in (1, x.shape[0])": lambda x, c: x + (1 if c.shape[0] in (1, x.shape[0]) else 100),
    "c.shape[0] in [1, x.shape[0]]": lambda x, c: x + (1 if c.shape[0] in [1, x.shape[0]] else 100),
    "c.shape[0] in x.shape": lambda x, c: x + (1 if c.shape[0] in x.shape else 100),
    "7 in (1, x.shape[0])": lambda x, c: x + (1 if 7 in (1, x.shape[0]) else 100),
    "c.shape[0] == 1 or c.shape[0] == x.shape[0]": (
        lambda x, c: x + (1 if c.shape[0] == 1 or c.shape[0] == x.shape[0] else 100)
    ),
    "c.shape[0] in {1, x.shape[0]}": lambda x, c: x + (1 if c.shape[0] in {1, x.shape[0]} else 100),
    "x.shape.count(c.shape[0])": lambda x, c: x + (1 if x.shape.count(c.shape[0]) else 100),
    "x.shape[0] in (1, c.shape[0])": lambda x, c: x + (1 if x.shape[0] in (1, c.shape[0]) else 100),
}
wrong = []
for name, function in FUNCTIONS.items():
    torch._dynamo.reset()
    compiled, c, found = torch.compile(function, backend="eager"), torch.zeros(7), []
    for rows in (5, 6, 7):  # the second makes the size symbolic
        x = torch.zeros(rows)
        found.append((function(x, c)[0].item(), compiled(x, c)[0].item()))
    assert found[:2] == [(100.0, 100.0)] * 2 and found[2][0] == 1.0
    if found[2][1] != 1.0:
        wrong.append(name)
    print(f"{name:45} of 7 rows: eager {found[2][0]:3.0f}, compiled {found[2][1]:3.0f}")
assert wrong == list(FUNCTIONS)[:4], wrong
E
venv/bin/python program.py
