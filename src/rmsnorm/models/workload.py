"""The only file that knows what a model is timed on and what memory a training step takes: work that is done in turns,
with the norms as they were and as they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from ..bench.memory import kept
from ..bench.timing import Timing, measure
from .inputs import Uncallable

CACHES = ("cache", "past_key_values", "cache_params")
"""What outputs call the past; transformers 5.24 renamed it, and state space models have another name."""
Turn = Callable[[bool], None]
"""Switches the norms: False as they were, True as they are; see :func:`classes.switch`."""


@dataclass(frozen=True)
class Speed:
    """One kind of work, timed in turns."""

    before: Timing
    after: Timing
    tokens: int
    """What one call takes in; 0 if those aren't counted."""

    @property
    def per_second(self) -> tuple[float, float]:
        """Tokens a second before and after, from the median times."""
        return self.tokens / self.before.median, self.tokens / self.after.median

    @property
    def ratio(self) -> float:
        """Time after ÷ time before, the median over rounds; below 1, faster."""
        return self.after.ratio(self.before)

    @property
    def ratio_quartiles(self) -> tuple[float, float]:
        """Half of the rounds lie between."""
        return Timing(tuple(self.after.quotients(self.before)), 1).quartiles

    @property
    def measurable(self) -> bool:
        """Whether three rounds in four fall on one side of 1: else the noise is larger than the effect."""
        low, high = self.ratio_quartiles
        return not low <= 1 <= high

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON. Seconds are per call."""
        sides = {"before": self.before, "after": self.after}
        return {
            **{f"{name}_s": side.median for name, side in sides.items()},
            **{f"{name}_quartiles_s": side.quartiles for name, side in sides.items()},
            "rounds": len(self.before.seconds),
            "tokens": self.tokens,
            "tokens_per_second": self.per_second if self.tokens else None,
            "ratio": self.ratio,
            "ratio_quartiles": self.ratio_quartiles,
            "measurable": self.measurable,
        }


@dataclass(frozen=True)
class Memory:
    """Of a training step, in bytes of tensors, without the model's weights."""

    kept: int
    """From forward for backward."""
    peak: int
    """Held at once."""


@dataclass(frozen=True)
class Work:
    """One thing that a model does."""

    make: Callable[[], Callable[[], object]]
    """Prepares it; what it returns is timed."""
    tokens: int = 0


def kinds(model: Any, inputs: dict[str, Tensor], *, writes: bool) -> dict[str, Work]:
    """What is timed: of one that writes, a token, the reading of a text, and a training step on it; else forward, and
    forward with backward."""
    read = inputs["input_ids"].numel() if "input_ids" in inputs else 0
    train = Work(lambda: lambda: step(model, inputs, writes=writes), read)
    if writes:
        ids = inputs["input_ids"]
        return {
            "decode": Work(lambda: decoding(model, ids), 1),
            "prefill": Work(lambda: torch.inference_mode()(lambda: model(ids, use_cache=True)), read),
            "training step": train,
        }
    return {"forward": Work(lambda: torch.inference_mode()(lambda: model(**inputs)), read), "training step": train}


def decoding(model: Any, ids: Tensor) -> Callable[[], None]:
    """One token more, behind the same past at each call."""
    with torch.inference_mode():
        output = model(ids, use_cache=True)
    name = next((name for name in CACHES if output.get(name) is not None), "")
    if not name:
        raise Uncallable("it returns no past that a token could follow")
    cache = output[name]
    # A layer of a cache holds tensors and counts, and a call puts others in their place: so the past is put back. What
    # is written in place is a state of fixed size. (Cropping would do, but a sliding window can't be cropped.)
    past = [(layer, dict(vars(layer))) for layer in getattr(cache, "layers", ())]

    @torch.inference_mode()
    def decode() -> None:
        model(ids[:, :1], **{name: cache}, use_cache=True)
        for layer, state in past:
            vars(layer).update(state)

    return decode


def time(work: Work, turn: Turn, seconds: float) -> Speed:
    """Times it, one call as it was, one as it is, and so on."""
    turn(True)
    call = work.make()

    def timed(on: bool) -> Callable[[], object]:
        return lambda: (turn(on), call())  # type: ignore[func-returns-value]

    try:
        times = measure({"before": timed(False), "after": timed(True)}, seconds)
    finally:
        turn(True)
    return Speed(times["before"], times["after"], work.tokens)


def step(model: Any, inputs: dict[str, Tensor], *, writes: bool) -> None:
    """Forward and backward; the optimizer is not ours to compare."""
    model.zero_grad(set_to_none=True)
    loss(model, inputs, writes=writes).backward()


def loss(model: Any, inputs: dict[str, Tensor], *, writes: bool) -> Tensor:
    """A language model's own, else the mean square of what comes out."""
    if writes:
        loss: Tensor = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        return loss
    return torch.stack([one.float().square().mean() for _, one in tensors(model(**inputs))]).sum()


def tensors(output: Any) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of what a model returns, by name."""
    named = output.items() if hasattr(output, "items") else enumerate(output if isinstance(output, tuple) else [output])
    for name, value in named:
        if isinstance(value, Tensor) and value.is_floating_point():
            yield str(name), value
        elif isinstance(value, tuple):
            yield from ((f"{name}.{inner}", one) for inner, one in tensors(value))


def memories(model: Any, inputs: dict[str, Tensor], turn: Turn, *, writes: bool) -> dict[str, Memory]:
    """Of one training step, the gradients included, before and after."""
    found = {}
    try:
        for when in ("before", "after"):
            turn(when == "after")
            found[when] = memory(model, inputs, writes=writes)
    finally:
        turn(True)
    return found


def memory(model: Any, inputs: dict[str, Tensor], *, writes: bool) -> Memory:
    """Of one training step. torch's own count of tensors: what the process holds in all also depends on what it held
    before."""
    model.zero_grad(set_to_none=True)
    storages = kept(lambda: loss(model, inputs, writes=writes), model.parameters())
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler reports its own start and stop otherwise
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        step(model, inputs, writes=writes)
    model.zero_grad(set_to_none=True)
    events: Any = profile.profiler
    changes = sorted((e.start_ns(), e.nbytes()) for e in events.kineto_results.events() if e.name() == "[memory]")
    return Memory(sum(size for size, _ in storages), max(accumulate(size for _, size in changes)))
