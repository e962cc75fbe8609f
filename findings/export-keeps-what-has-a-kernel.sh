#!/usr/bin/env bash
# A good guess: which operators ExportedProgram.run_decompositions() takes apart is written in its table; giving one of
# them a faster kernel changes its speed, and no graph.
# Instead: aten._fused_rms_norm has no CPU kernel, only a composite one. With a CPU kernel for it, registered from
# Python and right, the table's entry is passed over: run_decompositions() keeps _fused_rms_norm, and
# torch.onnx.export at the default opset fails for nn.RMSNorm: "No ONNX function found". The entry in the table stays,
# and handing one in explicitly doesn't help. (On CUDA, where torch has such a kernel: pytorch issue 168306.)
# Who is hurt: packages that speed up an operator of torch by registering a kernel for it, and their users' exports.
# What to do: withdraw the kernel while exporting, or don't register it; for RMS norms opset_version=23 works as well.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q onnx==1.23.2 onnxscript==0.7.2 numpy==2.4.6
cd "$folder"
venv/bin/python - 2>log <<'E' || { cat log >&2; exit 1; }
import sys

import onnx
import onnxscript
import torch

print("Python", sys.version.split()[0], "torch", torch.__version__, "onnx", onnx.__version__)
print("onnxscript", onnxscript.__version__)
operator = torch.ops.aten._fused_rms_norm.default
norm, x = torch.nn.RMSNorm(8, eps=1e-6).eval(), torch.randn(2, 8)
want = norm(x)


def fused(x, shape, weight, eps):
    rstd = torch.rsqrt(x.pow(2).mean(list(range(-len(shape), 0)), keepdim=True) + eps)
    return x * rstd * weight, rstd


def decomposed(table=None):
    graph = torch.export.export(norm, (x,)).run_decompositions(table).graph
    return [node.target for node in graph.nodes if node.op == "call_function"]


def onnx_nodes(**options):
    try:
        program = torch.onnx.export(norm, (x,), dynamo=True, verbose=False, **options)
    except torch.onnx.OnnxExporterError as error:
        cause = error
        while cause.__cause__:
            cause = cause.__cause__
        return str(cause)
    return [node.op_type for node in program.model_proto.graph.node]


def report(when):
    kept = operator in decomposed()
    print(f"{when}: run_decompositions() gives", *map(str, decomposed()))
    print(f"{when}: to ONNX:", onnx_nodes())
    assert operator in torch.export.default_decompositions()
    return kept


assert not report("without a kernel") and isinstance(onnx_nodes(), list)

library = torch.library.Library("aten", "IMPL")
library.impl("_fused_rms_norm", fused, "CPU")
with torch.no_grad():
    torch.testing.assert_close(operator(x, [8], norm.weight, 1e-6)[0], want)
assert report("with a kernel") and "No ONNX function found" in onnx_nodes()
assert operator in decomposed({**torch.export.default_decompositions(), operator: fused})
print("with a kernel, opset 23:", onnx_nodes(opset_version=23))
assert onnx_nodes(opset_version=23) == ["RMSNormalization"]

library._destroy()
assert not report("kernel withdrawn") and isinstance(onnx_nodes(), list)
E
