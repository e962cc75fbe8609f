"""The only file that watches a stranger's forward run: which of its attributes it reads, and what outside of itself.

What a module computes may hang on more than its input: a switch, a global, torch's modes, a dice. The instructions that
run are looked at one by one (``sys.settrace``, in this thread, for this call), as the source would also name what lies
in branches that are never taken. Names that are read from anything are counted as the module's, which errs on the safe
side. What torch does inside its own functions is not looked at.
"""

from __future__ import annotations

import dis
import functools
import gc
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
_CONSTANTS += (torch._ops._OpNamespace, torch._ops._Ops, type(None))
_BY_NAME = frozenset({"getattr", "hasattr", "vars", "eval", "exec"})
_DEREF = frozenset({"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"})
# Of Python's library, those whose functions know nothing but their arguments.
_PURE = frozenset({"builtins", "math", "functools", "operator", "_operator", "typing", "types", "inspect", "itertools"})
_PURE |= {"collections", "contextlib", "warnings", "_warnings", "abc", "enum", "numbers", "dataclasses"}
_LIBRARIES = frozenset({"torch", "numpy", "triton"})
_OTHERS = (frozenset(sys.stdlib_module_names) | _LIBRARIES | {"rmsnorm"}) - {"__main__", "test"}
_ATTRIBUTE = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_KNOWN = _LIBRARIES | {"builtins", "operator"}
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
    elsewhere: set[str] = field(default_factory=set)
    """Those of what a global name leads to."""
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
        if event == "call" and (function := _function(frame, module)):
            given = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
            if any(isinstance(value, list | dict | set) for value in given):
                reads.outside[f"a default of {function.__name__}"] = None
        frame.f_trace_opcodes = True
        if event == "opcode":
            _look(frame, reads)
        return trace

    before, dice, collects = sys.gettrace(), _dice(), gc.isenabled()
    gc.disable()  # else its callbacks and finalizers (hypothesis has one that counts) pass for what the module reads
    sys.settrace(trace)
    try:
        result = call()
    finally:
        sys.settrace(before)
        (gc.enable if collects else gc.disable)()
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
    """Methods of the module, and functions of all packages but torch's and Python's."""
    code = frame.f_code
    if code.co_filename == torch.nn.modules.module.__file__:  # how any module finds an attribute
        return False
    if code.co_argcount and frame.f_locals.get(code.co_varnames[0]) is module:
        return True
    home = _top(frame.f_globals.get("__name__"))
    return home in homes or home not in _OTHERS


def _top(name: object) -> str:
    return str(name).partition(".")[0]


def _function(frame: types.FrameType, module: object) -> types.FunctionType | None:
    """Whose call it is, as far as a name tells."""
    name = frame.f_code.co_name
    for found in (getattr(type(module), name, None), frame.f_globals.get(name)):
        link: object = found
        while isinstance(link, types.FunctionType):
            if link.__code__ is frame.f_code:
                return link
            link = getattr(link, "__wrapped__", None)
    return None


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
        reads.elsewhere |= set(path[1:])
        reads.outside |= _state(path, frame.f_globals, str(frame.f_globals.get("__name__", "")))
    elif one.opname in _DEREF and one.argval != "__class__" and _is_outer(frame, str(one.argval)):
        path = [str(one.argval), *_path(listed[i + 1 :])]
        reads.outside |= dict.fromkeys(_state(path, frame.f_locals, ""))
    elif one.opname in {"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_NAME"} or (
        one.opname in {"STORE_DEREF", "DELETE_DEREF"} and _is_outer(frame, str(one.argval))
    ):
        reads.outside[str(one.argval)] = None
    elif one.opname == "IMPORT_NAME" and _top(one.argval) not in _LIBRARIES | _PURE:
        reads.outside[f"what it imports from {one.argval or 'its package'}"] = None


def _is_outer(frame: types.FrameType, name: str) -> bool:
    """Whether a variable of a closure lives longer than this call: none of the calls that are running made it."""
    if name not in frame.f_code.co_freevars:
        return False
    caller = frame.f_back
    while caller and name not in caller.f_code.co_cellvars:
        caller = caller.f_back
    return caller is None


def _path(behind: list[dis.Instruction]) -> Iterator[str]:
    for one in behind:
        if one.opname in _ATTRIBUTE:
            yield str(one.argval)
        elif one.opname not in {"CACHE", "PUSH_NULL"}:
            return


def _state(  # noqa: PLR0911 - each is another kind of what it may be
    path: list[str], space: Mapping[str, Any], home: str
) -> dict[str, Outside | None]:
    """What isn't constant on the path, if anything. Followed through modules, classes and what hangs on functions; the
    rest are objects. ``home`` is the name of the module whose globals the space is."""
    name = path[0]
    space = space if name in space else vars(sys.modules["builtins"])
    if name in _STATE:
        return {name: None}
    if name not in space:
        return {}
    if name in {"globals", "locals", "__import__"} and space is vars(sys.modules["builtins"]):
        return {f"{name}()": None}
    value = space[name]
    for depth, step in enumerate(path[1:], 1):
        if step in _STATE:
            return {".".join(path[: depth + 1]): None}
        holds = isinstance(value, types.ModuleType | type) or step in getattr(value, "__dict__", ())
        if not holds or not hasattr(value, step):
            break
        home = value.__name__ if isinstance(value, types.ModuleType) else ""
        value, name = getattr(value, step), ".".join(path[: depth + 1])
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
        origin = _top(getattr(value, "__module__", None) or "builtins")
        return {name: None} if origin in sys.stdlib_module_names and origin not in _PURE | {"__main__"} else {}
    if isinstance(value, _CONSTANTS) or _is_immutable(value) or name in _NUMBERS:
        return {}
    last = name.rpartition(".")[2]
    known = is_plain(value) and vars(sys.modules.get(home, types)).get(last) is value
    return {name: (home, last, value) if known else None}


def _is_immutable(value: Any) -> bool:
    """Numbers and strings are what somebody may set anew; tables of functions (transformers' activations) are not."""
    if isinstance(value, Mapping):
        return bool(value) and all(
            callable(one[0] if isinstance(one, tuple) and one else one) for one in value.values()
        )
    return isinstance(value, torch.finfo | torch.iinfo) or (callable(value) and _top(type(value).__module__) in _KNOWN)
