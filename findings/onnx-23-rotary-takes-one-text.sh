#!/usr/bin/env bash
# A good guess: a LLaMA of transformers that torch.onnx.export writes with dynamic texts and tokens runs in onnxruntime
# for any number of texts, at opset 23 as at 20: the example had two texts, and the graph says that both are dynamic.
# Instead: transformers makes the positions as one row for the whole batch, [1, tokens], and lets cos and sin broadcast.
# At opset 23 torch writes RotaryEmbedding, whose caches onnxruntime wants with the batch of the input: one text runs, two
# end in an error. At opset 20 there are Mul and Add, which broadcast, and any batch runs.
# Who is hurt: whoever tries the export with one text and serves several, or raises the opset to get RMSNormalization.
# What to do: pass position_ids of the batch, torch.arange(tokens).expand_as(ids), inside of what is exported.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q onnx==1.23.2 onnxruntime==1.32.0 onnxscript==0.7.2 numpy==2.4.6 transformers==5.22.2
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - 2>log <<'E' || { cat log >&2; exit 1; }
import sys

import numpy as np
import onnx
import onnxruntime
import torch
import transformers

print("Python", sys.version.split()[0], "torch", torch.__version__, "onnx", onnx.__version__)
print("onnxruntime", onnxruntime.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes)).eval()


class Logits(torch.nn.Module):
    def __init__(self, own_positions):
        super().__init__()
        self.llama, self.own_positions = llama, own_positions

    def forward(self, ids):
        more = {"position_ids": torch.arange(ids.shape[1]).expand_as(ids)} if self.own_positions else {}
        return self.llama(input_ids=ids, use_cache=False, **more).logits


def runs(opset, own_positions):
    """Whether RotaryEmbedding is in the graph, and which batches of 1 to 3 texts run."""
    module, dynamic = Logits(own_positions).eval(), {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    example = (torch.zeros(2, 16, dtype=torch.long),)
    program = torch.onnx.export(
        module, example, dynamo=True, opset_version=opset, dynamic_shapes=(dynamic,), verbose=False
    )
    program.save("model.onnx")
    session = onnxruntime.SessionOptions()
    session.log_severity_level = 4
    run = onnxruntime.InferenceSession("model.onnx", session, providers=["CPUExecutionProvider"])
    good = []
    for batch in (1, 2, 3):
        ids = torch.randint(32, (batch, 16))
        try:
            (got,) = run.run(None, {run.get_inputs()[0].name: ids.numpy()})
        except Exception as error:
            print("   ", batch, "texts:", str(error).strip().splitlines()[-1][-110:])
        else:
            np.testing.assert_allclose(got, module(ids).detach().numpy(), rtol=1e-3, atol=1e-4)
            good.append(batch)
    nodes = [node.op_type for node in onnx.load("model.onnx").graph.node]
    return "RotaryEmbedding" in nodes, good


expected = {(20, False): (False, [1, 2, 3]), (23, False): (True, [1]), (23, True): (True, [1, 2, 3])}
for (opset, own), want in expected.items():
    got = runs(opset, own)
    whose = "of the batch" if own else "of transformers"
    print(f"opset {opset}, positions {whose}: RotaryEmbedding in the graph {got[0]}, runs for", *got[1])
    assert got == want, (opset, own, want, got)
E
