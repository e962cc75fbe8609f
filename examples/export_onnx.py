"""Exports a LLaMA of transformers, its norms on rmsnorm, to ONNX, runs it in onnxruntime, and compares.

    python examples/export_onnx.py                        # opset 23, which has RMSNormalization
    python examples/export_onnx.py --opset 20             # torch's default, which has not
    python examples/export_onnx.py --out llama.onnx       # keeps the file

Batch and length may differ in each call of the exported model. Exit status 1: onnxruntime's logits are further from
torch's than BOUND.
"""

from __future__ import annotations

import argparse
import collections
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch

import rmsnorm

# Logits of up to 0.6, sums of 64 to 256 products in another order: 2e-7 seen. A norm left out moves them by 0.5.
BOUND = 1e-5
NORM = {"RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"}


class Logits(torch.nn.Module):
    """The model, from tokens ``[batch, length]`` to logits, and nothing else: no cache, no dictionary."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        # Positions for each text: transformers' own are a batch of one, which RotaryEmbedding (opset 23) in onnxruntime
        # doesn't broadcast.
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        return self.model(input_ids=ids, position_ids=positions, use_cache=False).logits


def build(layers: int) -> torch.nn.Module:
    """A LLaMA with random weights; yours: AutoModelForCausalLM.from_pretrained(…)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": layers, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).eval()


def export(model: torch.nn.Module, opset: int, path: Path) -> None:
    lengths = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own code
        example = (torch.zeros(2, 16, dtype=torch.long),)
        program = torch.onnx.export(
            Logits(model), example, dynamo=True, opset_version=opset, dynamic_shapes=lengths, verbose=False
        )
    program.save(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--opset", type=int, default=23, help="18 to 25; 23, if not given")
    parser.add_argument("--layers", type=int, default=2, help="of the model; 2, if not given")
    parser.add_argument("--out", type=Path, help="where to keep the model; it is thrown away, if not given")
    options = parser.parse_args()
    if not 18 <= options.opset <= 25:
        parser.error(f"--opset {options.opset}: torch's exporter knows 18 to 25")
    try:
        import onnx
        import onnxruntime

        model = build(options.layers)
    except ModuleNotFoundError as missing:
        parser.error(f"{missing.name} is missing: pip install onnx onnxruntime onnxscript transformers")
    print(rmsnorm.patch(model).summary())

    with tempfile.TemporaryDirectory() as folder:
        path, optimised = options.out or Path(folder, "model.onnx"), Path(folder, "optimised.onnx")
        export(model, options.opset, path)
        settings = onnxruntime.SessionOptions()
        settings.optimized_model_filepath = os.fspath(optimised)  # what runs, to look into
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # fusions among them
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        for what, file in (("exported", path), ("as onnxruntime runs it", optimised)):
            kinds = collections.Counter(node.op_type for node in onnx.load(file).graph.node)
            norms = ", ".join(f"{kinds[kind]} {kind}" for kind in sorted(NORM & kinds.keys())) or "no norm operator"
            print(f"{what}: {kinds.total()} nodes, of them {norms}")

    apart = 0.0
    for batch, length in ((1, 5), (3, 24)):  # shapes that the exporter hasn't seen
        ids = torch.randint(256, (batch, length))
        (logits,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        with torch.inference_mode():
            apart = max(apart, (torch.from_numpy(logits) - Logits(model)(ids)).abs().max().item())
    print(f"logits of torch and onnxruntime differ by at most {apart:.0e}, allowed {BOUND:.0e}")
    return int(not apart <= BOUND)


if __name__ == "__main__":
    sys.exit(main())
