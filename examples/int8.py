"""Serves a LLaMA with torchao's int8 linears, whose inputs are quantised by the norms in front of them, in one pass.

    python examples/int8.py                                    # a tiny LLaMA without training, to see it work
    python examples/int8.py --model HuggingFaceTB/SmolLM2-135M-Instruct     # or a folder that save_pretrained() wrote

torchao quantises the input of each linear layer, five times a block. Here two norms hand over codes and scales, once
each. The codes are torchao's, bit for bit, and so are the logits, which is checked.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time

import torch
from torch import Tensor, nn

from rmsnorm import quantised_rms_norm


class Quantised(Tensor):
    """A norm's output as codes and scales, under its shape and type. Linear layers alone may look at the values."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Quantised:
        self = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype)
        self.codes, self.scale = codes, scale
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            return linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} has met a quantised norm; only linear layers of torchao can read it")


def linear(input: Quantised, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torchao's int8 linear from where the input has been quantised on, with the same roundings."""
    from torchao.kernel import int_scaled_matmul

    rows = input.codes.reshape(-1, input.codes.shape[-1])
    product = int_scaled_matmul(rows, weight.qdata.contiguous().t(), input.scale.reshape(-1, 1)).to(input.dtype)
    y = (product * weight.scale.flatten()).reshape(*input.shape[:-1], -1)
    return (y if bias is None else y + bias).to(input.dtype)


class QuantisedNorm(nn.Module):
    """A LLaMA's norm whose output only linear layers read."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps, self.shape = norm.weight, norm.variance_epsilon, tuple(norm.weight.shape)

    def forward(self, x: Tensor) -> Quantised:
        return Quantised(*quantised_rms_norm(x, self.shape, self.weight, self.eps, casting_mode="llama"), x.dtype)


def load(name: str | None) -> tuple[nn.Module, int]:
    """The model in bfloat16, its linear layers quantised by torchao, and the size of its vocabulary."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    tiny = LlamaConfig(num_attention_heads=4, **sizes)
    model = AutoModelForCausalLM.from_pretrained(name) if name else LlamaForCausalLM(tiny)
    model = model.bfloat16().eval()
    if not hasattr(getattr(model, "model", None), "layers"):
        raise OSError(f"{type(model).__name__} is no LLaMA, whose layers this program knows")
    quantize_(model.model.layers, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return model, model.config.vocab_size


def fuse(model: nn.Module) -> nn.Module:
    """A copy whose norms quantise, but for the last: its reader, the head, isn't torchao's."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.input_layernorm = QuantisedNorm(layer.input_layernorm)
        layer.post_attention_layernorm = QuantisedNorm(layer.post_attention_layernorm)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="of transformers: a folder or a name")
    parser.add_argument("--tokens", type=int, default=64, help="of the prompt, which is timed as a whole")
    given = parser.parse_args()
    if given.tokens < 1:
        parser.error("--tokens must be 1 or more")
    try:
        plain, vocabulary = load(given.model)
    except OSError as error:
        parser.error(f"--model {given.model}: {str(error).splitlines()[0]}")
    models = {"torchao's own": plain, "quantised norms": fuse(plain)}
    times: dict[str, list[float]] = {name: [] for name in models}
    prompt = torch.arange(given.tokens)[None] * 7919 % vocabulary
    with torch.inference_mode():
        same = torch.equal(*(model(prompt).logits for model in models.values()))
        print(f"{2 * len(plain.model.layers)} norms quantise; logits the same, bit for bit: {same}")
        for name, model in [*models.items()] * 10:
            start = time.perf_counter()
            model(prompt)
            times[name].append(time.perf_counter() - start)
    medians = ", ".join(f"{name} {statistics.median(taken) * 1e3:.1f} ms" for name, taken in times.items())
    print(f"{given.tokens} tokens, median of 10 turns: {medians}")
    ratio = statistics.median(ours / theirs for theirs, ours in zip(*times.values(), strict=True))
    print(f"quantised norms ÷ torchao's own: {ratio:.2f}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
