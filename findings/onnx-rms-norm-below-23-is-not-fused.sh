#!/usr/bin/env bash
# A good guess: torch.onnx.export(nn.RMSNorm) with the defaults, run by onnxruntime with all optimisations, is one fused
# node: onnxruntime has SimplifiedLayerNormalization and a fusion that finds it.
# Instead: at the default opset (20) torch writes x * Reciprocal(Sqrt(mean + eps)) * w, and the fusion only knows
# x / Sqrt(mean + eps) * w. Seven nodes stay seven nodes; the same norm with a division becomes one. Nothing is said.
# Who is hurt: whoever exports a model with RMS norms at the default opset: seven passes a norm, where one would do.
# What to do: opset_version=23 (one RMSNormalization), or divide by torch.sqrt in what is exported.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q onnx==1.23.2 onnxruntime==1.32.0 onnxscript==0.7.2 numpy==2.4.6
cd "$folder"
venv/bin/python - 2>log <<'E' || { cat log >&2; exit 1; }
import sys

import numpy as np
import onnx
import onnxruntime
import onnxscript
import torch

print("Python", sys.version.split()[0], "torch", torch.__version__, "onnx", onnx.__version__)
print("onnxruntime", onnxruntime.__version__, "onnxscript", onnxscript.__version__)
torch.manual_seed(0)


class Divided(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(64))

    def forward(self, x):
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


x = torch.randn(2, 3, 64)


def nodes(module, **options):
    program = torch.onnx.export(module.eval(), (x,), dynamo=True, verbose=False, **options)
    program.save("model.onnx")
    session = onnxruntime.SessionOptions()
    session.intra_op_num_threads = 1
    session.log_severity_level = 3
    session.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session.optimized_model_filepath = "optimised.onnx"
    run = onnxruntime.InferenceSession("model.onnx", session, providers=["CPUExecutionProvider"])
    (got,) = run.run(None, {run.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(got, module(x).detach().numpy(), rtol=1e-4, atol=1e-5)
    return onnx.load("model.onnx").opset_import[0].version, *(
        [node.op_type for node in onnx.load(name).graph.node] for name in ("model.onnx", "optimised.onnx")
    )


chain = ["Pow", "ReduceMean", "Add", "Sqrt", "Reciprocal", "Mul", "Mul"]
expected = [
    ("nn.RMSNorm, as exported by default", (20, chain, chain), nodes(torch.nn.RMSNorm(64, eps=1e-6))),
    (
        "the same with a division",
        (20, ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"], ["SimplifiedLayerNormalization"]),
        nodes(Divided()),
    ),
    (
        "nn.RMSNorm, opset_version=23",
        (23, ["RMSNormalization"], ["RMSNormalization"]),
        nodes(torch.nn.RMSNorm(64, eps=1e-6), opset_version=23),
    ),
]
for name, _, (opset, written, optimised) in expected:
    print(f"{name} (opset {opset}): written", *written, "| optimised", *optimised)
for name, want, got in expected:
    assert got == want, (name, want, got)
E
