"""The only file that watches a stranger's forward run: which of its attributes it reads, and what outside of itself.

What a module computes may hang on more than its input: a switch, a global, torch's modes, a dice. The instructions that
run are looked at one by one (``sys.settrace``, in this thread, for this call), as the source would also name what lies
in branches that are never taken. Names that are read from anything are counted as the module's, which errs on the safe
side. What torch does inside its own functions is not looked at.
"""

from __future__ import annotations

import dis
import functools
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

# Functions of torch whose results hang on modes and machines, by their names.
_STATE = frozenset(
    {
        "get_default_dtype",
        "get_default_device",
        "is_grad_enabled",
        "is_inference_mode_enabled",
        "is_inference",
        "is_autocast_enabled",
        "is_autocast_cpu_enabled",
        "get_autocast_dtype",
        "get_autocast_cpu_dtype",
        "get_autocast_gpu_dtype",
        "are_deterministic_algorithms_enabled",
        "get_float32_matmul_precision",
        "get_num_threads",
        "initial_seed",
        "is_anomaly_enabled",
    }
)
_CONSTANTS: tuple[type, ...] = (
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    type,
    torch.dtype,
)
_CONSTANTS += (torch.device, torch.layout, torch.memory_format, torch._ops.OpOverloadPacket, torch._ops.OpOverload)
_CONSTANTS += (torch._ops._OpNamespace, torch._ops._Ops, functools.partial, type(functools.lru_cache(len)), type(None))
_BY_NAME = frozenset({"getattr", "vars", "eval", "exec"})
_ATTRIBUTE = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_NUMBERS = frozenset({"math.pi", "math.e", "math.inf", "math.nan", "torch.pi", "torch.e", "torch.inf", "torch.nan"})
_TORCH = torch.__name__


PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))
Outside = tuple[str, str, Any]
"""A module, the name of one of its globals, and the value that was read: a plain one."""


def is_plain(value: object) -> bool:
    """Whether it can be compared later with what it is then."""
    return isinstance(value, PLAIN) or (isinstance(value, tuple) and all(map(is_plain, value)))


@dataclass
class Reads:
    """What ran has read."""

    names: set[str] = field(default_factory=set)
    """Of attributes, of whatever."""
    all_names: bool = False
    """Whether it reads attributes whose names aren't in its code."""
    outside: dict[str, Outside | None] = field(default_factory=dict)
    """What is neither an argument nor a constant, by its path; None where nobody can tell whether it changes."""


class Unfit(Exception):
    """The module does something that no norm does."""


def watch(call: Callable[[], Any], module: object) -> tuple[Any, Reads]:
    """The result of the call, and what it read.

    Raises:
        Unfit: the call draws random numbers.
    """
    reads = Reads()
    homes = {cls.__module__.partition(".")[0] for cls in type(module).__mro__} - {_TORCH, "builtins"}

    def trace(frame: types.FrameType, event: str, _: Any) -> Any:
        if event == "call" and not _looked_at(frame, module, homes):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            _look(frame, reads)
        return trace

    before, dice = sys.gettrace(), _dice()
    sys.settrace(trace)
    try:
        result = call()
    finally:
        sys.settrace(before)
    if _dice() != dice:
        raise Unfit("it draws random numbers")
    return result, reads


def _dice() -> tuple[Any, ...]:
    drawn = [bytes(torch.get_rng_state().tolist()), random.getstate()]
    if numpy := sys.modules.get("numpy"):  # a stranger may use it; we don't need it
        state = numpy.random.get_state(legacy=False)["state"]
        drawn += [bytes(state["key"]), state["pos"]]
    return tuple(drawn)


def _looked_at(frame: types.FrameType, module: object, homes: set[str]) -> bool:
    """Methods of the module, and functions of the package that it comes from."""
    code = frame.f_code
    if code.co_filename == torch.nn.modules.module.__file__:  # how any module finds an attribute
        return False
    if code.co_argcount and frame.f_locals.get(code.co_varnames[0]) is module:
        return True
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in homes


@functools.cache
def _instructions(code: types.CodeType) -> dict[int, tuple[int, list[dis.Instruction]]]:
    listed = list(dis.get_instructions(code))
    return {one.offset: (i, listed) for i, one in enumerate(listed)}


def _look(frame: types.FrameType, reads: Reads) -> None:
    found = _instructions(frame.f_code).get(frame.f_lasti)
    if found is None:
        return
    i, listed = found
    one = listed[i]
    if one.opname in _ATTRIBUTE:
        reads.names.add(str(one.argval))
        reads.all_names |= one.argval == "__dict__"
    elif one.opname in {"LOAD_GLOBAL", "LOAD_NAME"}:
        path = [str(one.argval), *_path(listed[i + 1 :])]
        reads.all_names |= path[0] in _BY_NAME
        reads.outside |= _state(path, frame)
    elif one.opname in {"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_NAME"}:
        reads.outside[str(one.argval)] = None


def _path(behind: list[dis.Instruction]) -> Iterator[str]:
    for one in behind:
        if one.opname in _ATTRIBUTE:
            yield str(one.argval)
        elif one.opname not in {"CACHE", "PUSH_NULL"}:
            return


def _state(path: list[str], frame: types.FrameType) -> dict[str, Outside | None]:
    """What isn't constant on the path, if anything. Followed through modules and classes; the rest are objects."""
    name, home = path[0], str(frame.f_globals.get("__name__", ""))
    if name in _STATE:
        return {name: None}
    space = frame.f_globals if name in frame.f_globals else vars(sys.modules["builtins"])
    if name not in space:
        return {}
    value = space[name]
    for depth, step in enumerate(path[1:], 1):
        if step in _STATE:
            return {".".join(path[: depth + 1]): None}
        if not isinstance(value, types.ModuleType | type) or not hasattr(value, step):
            break
        home = value.__name__ if isinstance(value, types.ModuleType) else ""
        value, name = getattr(value, step), ".".join(path[: depth + 1])
    if isinstance(value, _CONSTANTS) or _is_immutable(value) or name in _NUMBERS:
        return {}
    last = name.rpartition(".")[2]
    known = is_plain(value) and vars(sys.modules.get(home, types)).get(last) is value
    return {name: (home, last, value) if known else None}


def _is_immutable(value: Any) -> bool:
    """Numbers and strings are what somebody may set anew; tables of functions (transformers' activations) are not."""
    if isinstance(value, Mapping):
        return all(callable(one[0] if isinstance(one, tuple) and one else one) for one in value.values())
    return isinstance(value, torch.finfo | torch.iinfo) or callable(value)
