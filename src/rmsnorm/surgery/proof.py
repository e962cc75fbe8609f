"""The only file that proves an operation: the model before and after it, in fp64, in its own type, and in bfloat16.

In fp64 nothing may differ, so nothing in the model may round to less: transformers' norms and routers cast to float32,
which would hide an error of 1e-8. While fp64 is measured, a mode turns each such cast into one to fp64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from .edits import configs
from .report import Difference
from .trace import call, evaluating, results

SMALL = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 32
"""Of logits that are looked at together: they are as wide as a vocabulary."""


class Wide(TorchDispatchMode):
    """Casts to smaller types are casts to fp64; new tensors of smaller types are fp64. The product of experts has no
    kernel for fp64: group by group it is a plain one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {
            n: torch.float64 if v in SMALL else v for n, v in (kwargs or {}).items() if not isinstance(v, Tensor)
        } | {n: v for n, v in (kwargs or {}).items() if isinstance(v, Tensor)}
        args = tuple(torch.float64 if isinstance(a, torch.dtype) and a in SMALL else a for a in args)
        if func is torch.ops.aten._grouped_mm.default:
            return _grouped(*args, **kwargs)
        return func(*args, **kwargs)


def _grouped(rows: Tensor, weights: Tensor, offs: Tensor, bias: None = None, out_dtype: Any = None) -> Tensor:
    """``[rows, k] × [experts, k, n]``: each expert takes its rows, which end at its offset."""
    ends = offs.tolist()
    parts = [rows[start:end] @ weight for start, end, weight in zip([0, *ends], ends, weights, strict=False)]
    return torch.cat([*parts, rows.new_zeros(len(rows) - ends[-1], weights.shape[-1])])


@dataclass(frozen=True)
class Trial:
    """What a model is asked."""

    inputs: list[Any]
    """Keyword arguments, or a tuple of arguments, of each run."""
    text: Tensor | None = None
    """Tokens ``[n]`` that a language model is scored on."""
    prompt: Tensor | None = None
    """Tokens ``[n]`` that it continues,"""
    tokens: int = 0
    """by so many."""


@dataclass
class Said:
    """What it answered."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    loss: float | None = None
    written: list[int] | None = None


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """In fp64 new tensors are, too: the least number of fp64, which masks are filled with, is none of fp32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype if dtype is torch.float64 else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def said(
    model: Any, trial: Trial, dtype: torch.dtype, *, write: bool = False, wide: TorchDispatchMode | None = None
) -> Said:
    """The model's answers; it has the type already, or ``wide`` makes it seem so."""
    found = Said()
    mode: Any = wide or (Wide() if dtype is torch.float64 else nullcontext())  # type: ignore[no-untyped-call]
    with evaluating(model), mode, _default(dtype):
        for number, given in enumerate(trial.inputs):
            torch.manual_seed(0)
            for name, one in results(call(model, cast(given, dtype))).items():
                found.outputs[f"{name}{f'.{number}' if number else ''}"] = one.double()
        if trial.text is not None:
            logits = model(input_ids=trial.text[None, :-1], use_cache=False).logits[0]
            parts = zip(logits.split(ROWS), trial.text[1:].split(ROWS), strict=True)  # each is a copy in fp64
            found.loss = sum(float(cross_entropy(one.double(), ids, reduction="sum")) for one, ids in parts) / len(
                logits
            )
        if write and trial.prompt is not None and trial.tokens:
            found.written = _written(model, trial.prompt, trial.tokens)
    return found


def untied_alike(model: nn.Module, trial: Trial) -> bool:
    """Whether the model computes the same when its configuration says that its head isn't tied: some then leave out a
    factor, and can't be untied."""
    tied = configs(model)
    if not tied:
        return True
    with evaluating(model):
        answers = []
        for flag in (True, False):
            torch.manual_seed(0)
            for config in tied:
                config.tie_word_embeddings = flag
            try:
                answers.append([results(call(model, given)) for given in trial.inputs])
            finally:
                for config in tied:
                    config.tie_word_embeddings = True
    pairs = zip(*answers, strict=True)
    return all(torch.equal(one[name], other[name]) for one, other in pairs for name in one)


def _written(model: Any, prompt: Tensor, tokens: int) -> list[int]:
    ids = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
    )
    return ids[0, len(prompt) :].tolist()


def compared(dtype: torch.dtype, before: Said, after: Said, exact: Said | None = None) -> Difference:
    """The differences; ``exact`` is the unchanged model in fp64."""
    same = total = None
    if before.written is not None and after.written is not None:
        pairs = zip(before.written, after.written, strict=True)
        total = len(before.written)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), total)
    scale = exact if exact is not None else None
    return Difference(
        str(dtype).removeprefix("torch."),
        {name: _apart(one, after.outputs[name]) for name, one in before.outputs.items()},
        {name: _apart(scale.outputs[name], one) for name, one in before.outputs.items()} if scale else {},
        _relative(before.loss, after.loss),
        _relative(scale.loss, before.loss) if scale else None,
        same,
        total,
    )


def _apart(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    finite = one[one.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 1.0
    apart = torch.where((one == other) | (one.isnan() & other.isnan()), 0.0, (one - other).abs())
    worst = float(apart.nan_to_num(nan=float("inf")).max()) if apart.numel() else 0.0
    return worst / size if size else worst


def _relative(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return None
    apart = (other - one) / abs(one) if one else other - one
    return apart if math.isfinite(apart) or not math.isfinite(one) else math.inf


def cast(given: Any, dtype: torch.dtype) -> Any:
    if isinstance(given, Tensor):
        return given.to(dtype) if given.is_floating_point() else given
    if isinstance(given, tuple | list):
        return tuple(cast(one, dtype) for one in given)
    return {name: cast(one, dtype) for name, one in given.items()} if isinstance(given, dict) else given


@contextmanager
def copied(model: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """A copy in another type, for as long as it is needed."""
    yield copy.deepcopy(model).to(dtype)


def on_copy(
    model: nn.Module,
    dtype: torch.dtype,
    trial: Trial,
    operate: Callable[[nn.Module], object],
    exact: Said | None = None,
) -> tuple[Difference, Said]:
    """The operation on a copy of the model in a type: how far apart what it says is, and what it said before."""
    with copied(model, dtype) as twin:
        before = said(twin, trial, dtype)
        operate(twin)
        return compared(dtype, before, said(twin, trial, dtype), exact), before
