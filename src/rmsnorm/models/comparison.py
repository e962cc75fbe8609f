"""The only file that measures what patching changes in a language model: logits, text, loss, speed and memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity

from ..bench.memory import kept
from ..bench.timing import measure
from .classes import switch
from .patching import patch
from .report import PatchReport

READ = 128
"""Tokens of real text that are read at once when times are taken, and that a training step takes."""
WINDOW = 500
"""Tokens of a text that are scored at once: as many rows of logits."""


@dataclass(frozen=True)
class Outputs:
    """What a model says."""

    logits: Tensor
    """Of the prompt, in float32."""
    written: list[int]
    """The tokens that it writes behind the prompt, greedily."""
    losses: Tensor
    """Of each token of a real text, in nats."""


@dataclass(frozen=True)
class Speed:
    """Of one kind of work, in tokens a second (from the median time)."""

    before: float
    after: float
    ratio: float
    """Time after ÷ time before, the median over rounds; below 1, faster."""


@dataclass(frozen=True)
class Memory:
    """Of a training step, in bytes of tensors, without the model's weights."""

    kept: int
    """From forward for backward."""
    peak: int
    """Held at once."""


@dataclass
class Comparison:
    """A model before and after :func:`rmsnorm.patch`."""

    report: PatchReport
    before: Outputs
    after: Outputs
    speeds: dict[str, Speed] = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """The differences."""
        before, after = self.before, self.after
        return {
            "same_tokens": sum(a == b for a, b in zip(before.written, after.written, strict=False)),
            "written_tokens": len(before.written),
            "logit_difference": (after.logits - before.logits).abs().max().item(),
            "logit_size": before.logits.abs().max().item(),
            "loss_before": before.losses.double().mean().item(),
            "loss_after": after.losses.double().mean().item(),
            "loss_difference_per_token": (after.losses - before.losses).abs().max().item(),
            "scored_tokens": before.losses.numel(),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        speeds = {name: asdict(speed) for name, speed in self.speeds.items()}
        held = {when: asdict(memory) for when, memory in self.memory.items()}
        return {"report": self.report.to_dict(), **self.numbers(), "tokens_per_second": speeds, "bytes": held}


def compare(model: Any, prompt: Tensor, text: Tensor, tokens: int, seconds: float, **options: Any) -> Comparison:
    """Patches a causal language model and compares.

    Args:
        model: from transformers, on the CPU.
        prompt, text: tokens ``[n]``; the first are continued by ``tokens`` more, the second are scored.
        seconds: of timing for each kind of work; 0 leaves it out.
        options: of :func:`rmsnorm.patch`.
    """
    before = _outputs(model, prompt, text, tokens)
    report = patch(model, **options)
    result = Comparison(report, before, _outputs(model, prompt, text, tokens))
    if seconds:
        turn = switch(model)
        for name, (call, count) in work(model, text[None, :READ]).items():

            def timed(on: bool, call: Callable[[], object] = call) -> Callable[[], object]:
                return lambda: (turn(on), call())

            times = measure({"before": timed(False), "after": timed(True)}, seconds)
            before_s, after_s = times["before"], times["after"]
            result.speeds[name] = Speed(count / before_s.median, count / after_s.median, after_s.ratio(before_s))
        for when in ("before", "after"):
            turn(when == "after")
            result.memory[when] = memory(model, text[None, :READ])
    return result


def _outputs(model: Any, prompt: Tensor, text: Tensor, tokens: int) -> Outputs:
    with torch.inference_mode():
        logits = model(prompt[None]).logits[0].float()
        mask = torch.ones_like(prompt[None])
        written = model.generate(
            prompt[None], attention_mask=mask, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens
        )
        losses = [
            cross_entropy(model(window[None, :-1]).logits[0].float(), window[1:], reduction="none")
            for window in text.split(WINDOW)
            if len(window) > 1
        ]
    return Outputs(logits, written[0, len(prompt) :].tolist(), torch.cat(losses))


def work(model: Any, ids: Tensor) -> dict[str, tuple[Callable[[], object], int]]:
    """What is timed, and how many tokens it takes in."""
    with torch.inference_mode():
        output = model(ids, use_cache=True)
    name = "cache" if "cache" in output else "past_key_values"  # transformers 5.24 renamed it
    cache = output[name]

    @torch.inference_mode()
    def decode() -> None:
        model(ids[:, :1], **{name: cache}, use_cache=True)
        cache.crop(-1)  # the next call sees the same past

    @torch.inference_mode()
    def prefill() -> None:
        model(ids, use_cache=True)

    return {
        "decode": (decode, 1),
        "prefill": (prefill, ids.numel()),
        "training step": (lambda: train(model, ids), ids.numel()),
    }


def train(model: Any, ids: Tensor) -> None:
    """Forward and backward; the optimizer is not ours to compare."""
    model.zero_grad(set_to_none=True)
    _loss(model, ids).backward()


def _loss(model: Any, ids: Tensor) -> Tensor:
    loss: Tensor = model(ids, labels=ids, use_cache=False).loss
    return loss


def memory(model: Any, ids: Tensor) -> Memory:
    """Of one training step, the gradients included. torch's own count of tensors: what the process holds in all also
    depends on what it held before."""
    model.zero_grad(set_to_none=True)
    storages = kept(lambda: _loss(model, ids), model.parameters())
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler reports its own start and stop otherwise
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        train(model, ids)
    model.zero_grad(set_to_none=True)
    events: Any = profile.profiler
    changes = sorted((e.start_ns(), e.nbytes()) for e in events.kineto_results.events() if e.name() == "[memory]")
    return Memory(sum(size for size, _ in storages), max(accumulate(size for _, size in changes)))
