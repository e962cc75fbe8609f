#!/usr/bin/env bash
# A good guess: a torch tensor that is exported by DLPack has, for whoever imports it, the values that it shows. The
# export refuses what it can't say: conjugated tensors, with a BufferError.
# Instead: the imaginary part of a conjugated tensor, z.conj().imag, which is a view with a flag that says "negated",
# is exported as its memory lies, without the flag. np.from_dlpack and torch.from_dlpack give the opposite sign, and
# nothing raises. Tensor.numpy() refuses the same tensor.
# Who is hurt: code that moves spectra or other complex results between libraries (from_dlpack is the array API
# standard's only way), and extensions that read tensors through DLPack, as the C exchange table shows the same memory.
# What to do: resolve_neg() before the export.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q numpy==2.4.6
cd "$folder"
venv/bin/python - <<'E'
import sys

import numpy as np
import torch

z = torch.complex(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
part = z.conj().imag


def said(function):
    try:
        return str(function().tolist())
    except (BufferError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


print("Python", sys.version.split()[0], "torch", torch.__version__, "numpy", np.__version__)
print("z.conj().imag shows      ", part.tolist())
found = {
    "np.from_dlpack of it     ": lambda: np.from_dlpack(part),
    "torch.from_dlpack of it  ": lambda: torch.from_dlpack(part),
    "... after resolve_neg()  ": lambda: np.from_dlpack(part.resolve_neg()),
    "its .numpy()             ": part.numpy,
    "np.from_dlpack(z.conj()) ": lambda: np.from_dlpack(z.conj()),
}
results = {name: said(function) for name, function in found.items()}
for name, result in results.items():
    print(name, result)
by_numpy, by_torch, resolved, numpy, conjugated = results.values()
wrong = by_numpy == by_torch == "[3.0, 4.0]" and resolved == "[-3.0, -4.0]" == str(part.tolist())
refused = numpy.startswith("RuntimeError") and conjugated.startswith("BufferError")
sys.exit(0 if wrong and refused else "this has changed")
E
