#!/usr/bin/env bash
# A good guess: torch.onnx.export(..., opset_version=26) writes a model of opset 26, as it does for 25, or raises.
# Instead: with an nn.RMSNorm in the model it logs that a conversion failed, returns, and leaves an invalid model: nodes
# RMSNormalization (new in opset 23) under an import of opset 18. onnx.checker and onnxruntime refuse it. Without the norm
# the same call gives a valid model of opset 26.
# Who is hurt: whoever asks for the newest opset that their onnx has; the export succeeds, loading fails elsewhere.
# What to do: ask for 23, 24 or 25 for models with RMS norms; run onnx.checker.check_model after every export.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q onnx==1.23.2 onnxruntime==1.32.0 onnxscript==0.7.2 numpy==2.4.6
cd "$folder"
venv/bin/python - 2>log <<'E' || { cat log >&2; exit 1; }
import sys

import onnx
import onnxruntime
import onnxscript
import torch

print("Python", sys.version.split()[0], "torch", torch.__version__, "onnx", onnx.__version__)
print("onnxruntime", onnxruntime.__version__, "onnxscript", onnxscript.__version__)
print("newest opset that this onnx has:", onnx.defs.onnx_opset_version())


def checked(module, opset):
    program = torch.onnx.export(module.eval(), (torch.randn(2, 8),), dynamo=True, verbose=False, opset_version=opset)
    model = program.model_proto
    written = model.opset_import[0].version
    outcome = "valid"
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        outcome = str(error).splitlines()[0]
    loads = True
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:
        loads = "INVALID_GRAPH" not in str(error)
    nodes = ", ".join(node.op_type for node in model.graph.node)
    print(f"{type(module).__name__}, opset {opset} asked for: {written} written, {nodes}; onnx.checker: {outcome}")
    return written, outcome == "valid", loads


for opset in (23, 25):
    assert checked(torch.nn.RMSNorm(8, eps=1e-6), opset) == (opset, True, True)
for opset in (26, 27):
    assert checked(torch.nn.RMSNorm(8, eps=1e-6), opset) == (18, False, False)
assert checked(torch.nn.LayerNorm(8), 26)[:2] == (26, True)
E
