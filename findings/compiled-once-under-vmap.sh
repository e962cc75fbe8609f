#!/usr/bin/env bash
# A good guess: whether a call is compiled depends on that call. torch can't compile inside of torch.func.vmap with
# Inductor, so vmap(torch.compile(f)) runs f as it is; torch.compile(f) elsewhere is compiled as ever.
# Instead: f is marked, and no torch.compile of it compiles anything from then on, with any backend, nothing being said.
#   1. torch.compile(f)(x) runs eagerly: right numbers, no speed.
#   2. torch.compile(f, fullgraph=True) raises that it "found no compiled frames".
#   3. What calls f, compiled, is compiled, f too: only f itself is skipped. torch._dynamo.reset() forgets it.
# Who is hurt: a long-running process, or a test run, in which one caller batches a compiled function (per-sample
# losses, ensembles) and another calls it: who comes first decides. torch.func.jvp does the same with any backend.
# What to do: compile outside, torch.compile(vmap(f)); and fullgraph=True where speed matters, which makes it loud.
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

x = torch.randn(4, 3)


def first(x):
    return x.sin() + 1


def other(x):
    return x.sin() + 1


def outer(x):
    return first(x) * 2


def graphs(function):
    """How many torch.compile makes of it."""
    made = []
    torch.compile(function, backend=lambda graph, _: made.append(graph) or graph.forward)(x)
    return len(made)


def said(function):
    try:
        torch.compile(function, backend="eager", fullgraph=True)(x)
    except RuntimeError as error:
        return str(error)
    return "nothing"


print("Python", sys.version.split()[0], "torch", torch.__version__)
torch.vmap(torch.compile(first))(x)
found, unmarked, around, loud = graphs(first), graphs(other), graphs(outer), said(first)
torch._dynamo.reset()
again = graphs(first)
print("graphs of a function that was called once as vmap(torch.compile(f)):", found)
print("of the same code under another name:", unmarked)
print("of a function that calls it:", around)
print("of it, after torch._dynamo.reset():", again)
print("fullgraph=True says:", loud)
same = (found, unmarked, around, again) == (0, 1, 1, 1) and "no compiled frames" in loud
sys.exit(0 if same else "this has changed")
E
