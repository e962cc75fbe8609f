"""The only file that compares what a model says before and after patching: outputs, text, loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .inputs import positions
from .workload import Turn, tensors

WINDOW = 500
"""Tokens of a text that are scored at once: as many rows of logits."""


@dataclass(frozen=True)
class Outputs:
    """What a model says."""

    tensors: dict[str, Tensor]
    """All that it returns in floating point, in float32."""
    written: list[int]
    """The tokens that it writes behind the prompt, greedily; none if it doesn't write."""
    losses: Tensor
    """Of each token of a real text, in nats; none if it doesn't write."""


@dataclass(frozen=True)
class Comparison:
    """A model with its norms as they were, and as :func:`rmsnorm.patch` left them."""

    before: Outputs
    after: Outputs

    def differences(self) -> dict[str, tuple[float, float]]:
        """Of each tensor that the model returns, the largest difference, and the largest element."""
        found = {}
        for name, one in self.before.tensors.items():
            # Compared where both are finite: a mask of -inf is no difference.
            other = self.after.tensors[name]
            apart = torch.where(one == other, 0.0, (other - one).abs())
            found[name] = apart.max().item(), one[one.isfinite()].abs().max().item()
        return found

    def numbers(self) -> dict[str, Any]:
        """The differences, for JSON."""
        before, after = self.before, self.after
        found: dict[str, Any] = {
            "outputs": {n: {"difference": d, "size": s} for n, (d, s) in self.differences().items()}
        }
        if before.written:
            found["same_tokens"] = sum(a == b for a, b in zip(before.written, after.written, strict=False))
            found["written_tokens"] = len(before.written)
        if before.losses.numel():
            found["loss_before"] = before.losses.double().mean().item()
            found["loss_after"] = after.losses.double().mean().item()
            found["loss_difference_per_token"] = (after.losses - before.losses).abs().max().item()
            found["scored_tokens"] = before.losses.numel()
        return found


def writes(model: Any) -> bool:
    """Whether it continues a text: it generates, from tokens, without an encoder."""
    return model.can_generate() and model.main_input_name == "input_ids" and not model.config.is_encoder_decoder


def compare(model: Any, turn: Turn, inputs: dict[str, Tensor], prompt: Tensor, text: Tensor, tokens: int) -> Comparison:
    """Asks a patched model with its norms off, then on.

    Args:
        model: from transformers, on the CPU.
        turn: switches its norms.
        inputs: what its forward takes; for one that writes, ``prompt`` alone.
        prompt, text: tokens ``[n]`` for one that writes: the first are continued by ``tokens`` more, the second scored.
    """
    sides = []
    try:
        for on in (False, True):
            turn(on)
            sides.append(_outputs(model, inputs, prompt, text, tokens))
    finally:
        turn(True)
    return Comparison(*sides)


def _outputs(model: Any, inputs: dict[str, Tensor], prompt: Tensor, text: Tensor, tokens: int) -> Outputs:
    # Some draw masks or noise in evaluation mode, too.
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = {name: one.float() for name, one in tensors(model(**inputs))}
        if not writes(model):
            return Outputs(found, [], torch.empty(0))
        window = min(WINDOW, positions(model))
        tokens = max(1, min(tokens, positions(model) - len(prompt)))
        mask = torch.ones_like(prompt[None])
        written = model.generate(
            prompt[None], attention_mask=mask, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens
        )
        losses = [
            cross_entropy(model(part[None, :-1]).logits[0].float(), part[1:], reduction="none")
            for part in text.split(window)
            if len(part) > 1
        ]
    return Outputs(found, written[0, len(prompt) :].tolist(), torch.cat(losses) if losses else torch.empty(0))
