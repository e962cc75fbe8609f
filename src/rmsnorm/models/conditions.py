"""The only file that finds out where a proof holds: for which shapes, modes and settings a module keeps its meaning.

A binding serves the calls for which this was seen, and no others. A module that changes itself, draws random numbers,
does something else in training, or looks at what lies outside of itself is refused altogether: nobody could say when.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import extremes, reads, trial
from .binding import TYPES, Binding, Types
from .numbers import eps_of
from .reads import Unfit

_MODULES = frozenset(vars(nn.Module())) - {"training"}
_TORCH = (Tensor, torch, torch.nn.functional)


def find(module: nn.Module, binding: Binding, types: Types) -> Binding:
    """The binding with its conditions; ``types`` are the module's own, in which it was proven.

    Raises:
        Unfit: there is no saying.
    """
    once = trial.Trial(module, binding, types)
    binding = replace(binding, **_reads(once), rank=1 if once.weight is None else once.weight.dim())
    extremes.check_looks(once)
    extremes.check_training(once)
    extremes.check_subnormal(once)
    extremes.check_extremes(once)
    extremes.check_eps(module, binding, types)
    dims, single = _shapes(once)
    wide = once.weight is not None and binding.layout != "number"  # and says itself what the width is
    columns = None if wide or _any_width(once) else once.shape[-1]
    autocast = _same_under_autocast(module, binding)
    return replace(binding, dims=dims, single=single, columns=columns, autocast=autocast)


def signature(module: nn.Module) -> Hashable:
    """What modules have in common that compute alike: class, settings, shapes and types of their weights. None where an
    attribute can't be compared."""
    settings = [(name, type(value).__name__, value) for name, value in _attributes(module) if name != "training"]
    if "forward" in vars(module) or module._modules or not all(reads.is_plain(value) for _, _, value in settings):
        return None
    own = trial.tensors(module).items()
    return type(module), tuple(settings), tuple((n, t.shape, t.dtype, t.is_meta, n in module._buffers) for n, t in own)


def _reads(once: trial.Trial) -> dict[str, Any]:
    """What its forward reads of itself, beside what the binding names: fields of a binding."""
    module, binding = once.module, once.binding
    own = {"training", "normalized_shape"}
    own |= {name for name in (binding.weight, binding.bias, binding.eps, binding.group) if isinstance(name, str)}
    if once.weight is None:
        own.discard("normalized_shape")
    found: dict[str, Any] = {}
    names, everything, elsewhere = set[str](), False, set[str]()
    outside: set[reads.Outside] = set()
    inputs = once.inputs()
    for training in (True, False):
        module.training = training
        for mode in (torch.enable_grad, torch.no_grad):
            before = _state(module)
            with mode():
                _, seen = reads.watch(lambda: once.theirs(inputs), module)
            if changed := [name for name, value in _state(module).items() if not _same(value, before.pop(name, None))]:
                raise Unfit(f"it changes its {changed[0]}")
            if before:
                raise Unfit(f"it changes its {next(iter(before))}")
            if unknown := [name for name, value in seen.outside.items() if value is None]:
                raise Unfit(f"it reads {min(unknown)}, which is outside of it and may change")
            outside |= {value for value in seen.outside.values() if value}
            found |= {name: value for name, value in _attributes(module) if seen.all_names or name in seen.names}
            names, everything, elsewhere = names | seen.names, everything | seen.all_names, elsewhere | seen.elsewhere
    _refuse_plain_tensors(once, names, everything)
    if once.binding.eps in found and eps_of(module, binding) is None:
        own.discard(str(binding.eps))  # a None stays a None
    for name in own & found.keys():
        del found[name]
    if odd := [name for name, value in found.items() if not reads.is_plain(value)]:
        raise Unfit(f"it reads its {odd[0]}, a {type(found[odd[0]]).__name__}, which may change")
    found |= {
        name: value for name, value in _attributes(module) if name not in own | found.keys() and _matters(once, name)
    }
    _refuse_other_tensors(once, own)
    methods = {name for name in names if inspect.isroutine(f := _of_class(module, name)) or isinstance(f, property)}
    absent = {
        name for name in names - elsewhere if not hasattr(module, name) and not any(hasattr(t, name) for t in _TORCH)
    }
    return {
        "fixed": tuple(sorted(found.items())),
        "outside": tuple(sorted(outside, key=str)),
        "absent": tuple(sorted(absent)),
        "methods": tuple(sorted(methods - {"forward"})),
        "attributes": tuple(sorted(vars(module))) if everything else None,
    }


def _of_class(module: nn.Module, name: str) -> object:
    """What its classes have by this name, but for what every module has."""
    spaces = (vars(cls) for cls in type(module).__mro__ if not issubclass(nn.Module, cls))
    return next((space[name] for space in spaces if name in space), None)


def _refuse_plain_tensors(once: trial.Trial, names: set[str], everything: bool) -> None:
    """Their numbers stayed what they were in every trial."""
    spaces = (vars(once.module), *(vars(cls) for cls in type(once.module).__mro__))
    for name, value in (item for space in spaces for item in space.items()):
        if isinstance(value, Tensor) and (everything or name in names):
            raise Unfit(f"it reads its {name}, a tensor that is neither parameter nor buffer")


def _any_width(once: trial.Trial) -> bool:
    """Whether rows of other sizes are normalised alike, where no weight has their size."""
    kept = once.shape
    try:
        for columns in (3, kept[-1] + 1, 500):
            once.shape = torch.Size([*kept[:-1], columns])
            if not _holds(once, (2, 3)):
                return False
        return True
    finally:
        once.shape = kept


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Of the instance and of its classes, but for what every module has, for functions and for tensors."""
    seen = set(_MODULES) | {"forward"}
    for space in (vars(module), *(vars(cls) for cls in type(module).__mro__ if not issubclass(nn.Module, cls))):
        for name, value in space.items():
            if name in seen or name.startswith("__") or isinstance(value, Tensor):
                continue
            if hasattr(value, "__get__") and space is not vars(module):
                continue
            seen.add(name)
            yield name, value


def _state(module: nn.Module) -> dict[str, Any]:
    """All that it could change, copied."""
    plain = {name: value for name, value in _attributes(module) if reads.is_plain(value)}
    return plain | {name: t.detach().clone() for name, t in trial.tensors(module).items()}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _matters(once: trial.Trial, name: str) -> bool:
    """Whether the output follows an attribute that no instruction names: it is set to something else, and asked."""
    value = getattr(once.module, name)
    if name not in vars(once.module) or not isinstance(value, bool | int | float):
        return False
    inputs = once.inputs()
    with torch.no_grad():
        before = once.theirs(inputs)
        setattr(once.module, name, not value if isinstance(value, bool) else value + 1)
        try:
            return not torch.equal(before, once.theirs(inputs))
        except Exception:  # whatever it raises then
            return True
        finally:
            setattr(once.module, name, value)


def _refuse_other_tensors(once: trial.Trial, own: set[str]) -> None:
    """Weights were random in every trial; numbers of other types are changed here."""
    inputs = once.inputs()
    for name, tensor in trial.tensors(once.module).items():
        if name in own or tensor.is_floating_point():
            continue
        with torch.no_grad():
            before, kept = once.theirs(inputs), tensor.clone()
            tensor.copy_(~kept if kept.dtype is torch.bool else kept + 1)
            try:
                same = torch.equal(before, once.theirs(inputs))
            except Exception:
                same = False
            tensor.copy_(kept)
        if not same:
            raise Unfit(f"its output follows its {name}")


def _shapes(once: trial.Trial) -> tuple[frozenset[int], bool]:
    """The numbers of dimensions, and whether some of them may be 1."""
    more, dims, single = len(once.shape), set(), True
    first = {"channels": 1, "heads": 2}.get(once.binding.layout, 0)
    for count, several in trial.LEADING.items():
        if count < first:
            continue
        heads = once.binding.layout == "heads"
        fitting = [(*sizes[:-2], once.heads, sizes[-1]) if heads else sizes for sizes in several]
        if all(_holds(once, sizes) for sizes in fitting):
            dims.add(count + more)
            leading = fitting[0]
            ones = [(1,) * count, (*leading[:-1], 1), (1, *leading[1:])]
            if count and not heads and not all(_holds(once, sizes) for sizes in ones):
                single = False
    if not dims:
        raise Unfit("it does something else with inputs of other dimensions")
    return frozenset(dims), single


def _holds(once: trial.Trial, leading: tuple[int, ...]) -> bool:
    inputs = once.inputs(leading)
    try:
        theirs = once.theirs(inputs)
    except Unfit:
        raise
    except Exception:  # nor does the model call it so; its own forward then says why
        return False
    try:
        return trial.compare(once, theirs, once.ours(inputs)).part <= 1
    except Exception:
        return False


def _same_under_autocast(module: nn.Module, binding: Binding) -> bool:
    """For each proven pair of types, with bfloat16 and with float16 as the type of autocast."""
    for types in sorted(binding.proven, key=str):
        once = trial.Trial(module, binding, types)
        inputs = once.inputs()
        for dtype in TYPES[1:]:
            with torch.no_grad(), torch.autocast("cpu", dtype):
                try:
                    if trial.compare(once, once.theirs(inputs), once.ours(inputs)).part > 1:
                        return False
                except Exception:
                    return False
    return True
