"""The only file that watches a rewritten layer run: which of its new lines our functions served.

A line may lie in a branch that this model never takes, or ask for what it is never given: a norm that is patched,
tensors of one type. It then computes what it did before, and nothing was fused, nor proven. Calls of functions are
looked at (``sys.setprofile``, in this thread, for this run), so that a layer which is used later pays nothing for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import nn

from ..forms.heads import heads_rms_norm_rope, rope
from ..forms.modulated import gated_add, modulated_norm
from ..forms.sandwich import rms_norm_add, sandwich_rms_norm
from ..functional import add_rms_norm
from .rewrite import FILE

_NORMED = (add_rms_norm, rms_norm_add, sandwich_rms_norm, gated_add, modulated_norm, heads_rms_norm_rope)
_SERVING = {function.__code__ for function in (*_NORMED, rope)}
_HOME = f"{__package__}."
Served = tuple[str, tuple[str, ...]]
"""A line: the function of this room that it calls, and the attributes of the norms that are part of the pass."""
KINDS = {
    "residual adds": {"add_norm", "norm_add", "sandwich"},
    "rotary embeddings": {"_turned"},
    "modulated norms": {"modulated", "gated_modulated"},
    "gated adds": {"gated", "gated_modulated"},
}
"""What those functions stand for, in a report's words."""


def watch(run: Callable[[], Any], layer: nn.Module) -> tuple[Any, list[Served]]:
    """The result, and the lines of the layer that were served, in the order of its source."""
    found: dict[tuple[int, str], Served] = {}

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in _SERVING:
            call = _up(frame.f_back, to_ours=True)
            line = _up(call, to_ours=False)
            if call and line and line.f_code.co_filename.startswith(FILE) and _is_of(line, layer):
                norms = () if frame.f_code is rope.__code__ else _norms(call, layer)
                found.setdefault((line.f_lineno, call.f_code.co_name), (call.f_code.co_name, norms))

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        result = run()
    finally:
        sys.setprofile(before)
    return result, [found[key] for key in sorted(found)]


def counted(served: list[Served]) -> dict[str, int]:
    """How many lines of each kind there are."""
    counts = {kind: sum(call in calls for call, _ in served) for kind, calls in KINDS.items()}
    return {kind: count for kind, count in counts.items() if count}


def _up(frame: FrameType | None, to_ours: bool) -> FrameType | None:
    """The next frame on the way out that is, or isn't, of a file in this room."""
    while frame and str(frame.f_globals.get("__name__")).startswith(_HOME) is not to_ours:
        frame = frame.f_back
    return frame


def _is_of(frame: FrameType, layer: nn.Module) -> bool:
    return frame.f_locals.get(frame.f_code.co_varnames[0]) is layer


def _norms(call: FrameType, layer: nn.Module) -> tuple[str, ...]:
    """The layer's names of the modules that a call was given."""
    given = [call.f_locals[name] for name in call.f_code.co_varnames[: call.f_code.co_argcount]]
    names = {id(child): name for name, child in layer._modules.items()}
    return tuple(names[id(value)] for value in given if isinstance(value, nn.Module) and id(value) in names)
