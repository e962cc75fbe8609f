"""The only file that checks a call of a form, as ``functional.py`` does for the plain norm, from what its row says.

A public function of a form takes ``(rows, normalized_shape, weights, eps, *, options)`` and hands its arguments on as
they are. What is asked here, in this order: is it an everyday call, does somebody override it, do the tensors fit, does
it lie on several ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import SymInt, Tensor, is_grad_enabled
from torch.compiler import is_dynamo_compiling
from torch.overrides import has_torch_function_variadic

from .. import _arguments, _everyday, _foreign, _handed, functional
from .served import Served

ROUND_FIRST, NUMBERS = functional.ROUND_FIRST, _everyday.NUMBERS  # found sooner here, as are
ordinary, dims_of = _everyday.ordinary, _everyday.dims_of
Named = dict[str, Tensor | None]


def call(
    served: Served,
    public: Callable[..., Any],
    rows: Named,
    normalized_shape: int | Sequence[int],
    weights: Named,
    eps: float | None,
    options: dict[str, tuple[Any, Any]],
    more: tuple[Any, ...] = (),
    by_name: tuple[str, ...] = (),
    pick: int | slice = slice(None),
    of_eps: Callable[[float], float] = float,
) -> Any:
    """The outputs of ``public``, which was called with these, and has asked for the short way (``everyday_norm``).

    ``options`` are those with names, beside their defaults; ``offset`` and ``casting_mode`` are among them. ``more`` is
    what the operators take behind ``(dims, eps, offset, round_first)``. The tensors ``by_name``, keywords of the public
    function, may be None. ``pick`` says what it returns of the operator's outputs, and ``of_eps`` makes the operator's
    eps of its own.
    """
    name, tensors = public.__name__, (*rows.values(), *weights.values())
    input: Any = tensors[0]
    offset: Any = options.get("offset", (0.0,))[0]
    casting_mode: Any = options.get("casting_mode", ("torch",))[0]
    count = 1 if isinstance(pick, int) else len(served.form.outputs[pick])

    def again(*tensors: Tensor | None) -> Any:
        """The same of other tensors."""
        given = {option: value for option, (value, _) in options.items()}
        mine = dict(zip(rows | weights, tensors, strict=True))
        named = {name: t for name in by_name if (t := mine.pop(name)) is not None}
        first = tensors[0]
        shape = first.shape[first.dim() - dims :]  # type: ignore[union-attr]
        learnt = [mine.pop(name) for name in weights if name in mine]
        return public(*mine.values(), shape, *learnt, eps, **named, **given)

    if has_torch_function_variadic(*tensors) and _arguments.are_objects(*tensors):
        given = _arguments.given(**options)
        given |= {label: t for label in by_name if (t := (rows | weights)[label]) is not None}
        first, learnt = ([t for label, t in named.items() if label not in by_name] for named in (rows, weights))
        arguments = (*first, normalized_shape, *learnt, eps)
        return _everyday.unpacked(_everyday.overridden(public, tensors, arguments, given), count)
    dims, eps, round_first, native = functional._resolve(name, input, normalized_shape, None, eps, casting_mode)
    for label, weight in weights.items():
        if weight is not None:
            _arguments.check_tensors(name, **{label: weight})
            native &= functional._resolve(name, input, normalized_shape, weight, eps, casting_mode, label=label)[3]
            _check_kind(name, label, weight)
    if type(offset) is not float:
        offset = _arguments.as_number(name, "offset", offset)
    if eps < 0:
        raise ValueError(f"{name}: eps must be 0 or more, but is {eps}")
    shared = tuple(label.rstrip("?") for label in served.form.shared)
    rows = check_rows(name, rows, dims, shared, by_name)
    if ranks := _everyday.distributed(*tensors):
        return ranks.normalise(name, again, None, dims, rows, weights, outputs=count, shared=shared)
    tensors = (*spread(rows, dims, shared).values(), *weights.values())
    return picked(served(native, *tensors, dims, of_eps(eps), offset, round_first, *more), pick)


def picked(results: Any, pick: int | slice) -> Any:
    """What a public function returns of what the operator does."""
    return results[pick] if isinstance(results, tuple) else results


def everyday(served: Served, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    """The outputs of a call of which nothing unusual is known, or None."""
    try:  # the operator checks the rest; what it refuses is served, or worded, the long way
        if not is_dynamo_compiling():
            found = served.straight(None, *tensors, *options)
            if found is not None:
                return found
        if ordinary(tensors[0], tensors):
            return served.everyday(*tensors, *options)
    except (RuntimeError, AttributeError, TypeError, ValueError):
        pass
    return None


def everyday_norm(
    served: Served,
    tensors: tuple[Any, ...],
    normalized_shape: int | Sequence[int],
    eps: float | None,
    offset: float,
    casting_mode: str,
    *more: Any,
) -> Any:
    """The same of a norm: what a public function asks before it makes what ``call`` takes, 1.2 µs of 4.5."""
    if is_dynamo_compiling():  # whatever is asked of a mode or of sizes would be guards of the graph
        return None
    try:
        options = offset, ROUND_FIRST[casting_mode]
        if served.kind is None:
            found = served.straight(normalized_shape, *tensors, eps, *options, *more)
        else:
            next_eps = more[0] if more else None
            found = _handed.norm(served.kind, normalized_shape, eps, *options, None, None, next_eps, *tensors)
        if found is not None:
            return found
        return by_operator(served, tensors, normalized_shape, eps, eps, *options, *more)
    except (RuntimeError, KeyError, AttributeError, TypeError, ValueError):
        return None


def by_operator(
    served: Served,
    tensors: tuple[Any, ...],
    normalized_shape: int | Sequence[int],
    eps: float | None,
    least: float | None,
    offset: float,
    *more: Any,
) -> Any:
    """The same past all questions but these, or an error of the operator's, which gets ``least`` for ``eps``."""
    # Who traces is found out before sizes are asked for.
    ordinarily = type(offset) in NUMBERS and ordinary(tensors[0], tensors)
    if ordinarily and (dims := dims_of(tensors[0], normalized_shape, tensors[served.weight], eps)):
        way = served.everyday if is_grad_enabled() else served.plain
        return way(*tensors, dims, least, offset, *more)
    return None


def plain_norm(
    input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, None]:
    """The plain norm as everybody calls it, for a definition that is made of whole norms: its kernels and its rules."""
    if _foreign.wanted_by(input, weight):
        return _foreign.rms_norm(input, weight, dims, eps, offset, round_first), None
    shape, mode = input.shape[input.dim() - dims :], "llama" if round_first else "torch"
    return functional.rms_norm(input, shape, weight, eps, offset=offset, casting_mode=mode), None


def check_rows(name: str, rows: Named, dims: int, shared: tuple[str, ...], by_name: tuple[str, ...] = ()) -> Named:
    """The rows, those that the input's share with its number of dimensions; raises for what doesn't fit beside it."""
    input, checked = rows["input"], dict(rows)
    for label, row in rows.items():
        if label in shared and row is not None:
            checked[label] = check_shared(name, label, row, input, dims)
        elif row is not None or label not in by_name:
            check_alike(name, label, row, input)
    return checked


def along(row: Any, input: Any, dims: int) -> Any:
    """A shared row with sizes of 1 for the dimensions of the input that it lacks: the last ones before the row."""
    for _ in range(0 if row is None else input.dim() - row.dim()):
        row = row.unsqueeze(row.dim() - dims)
    return row


def spread(rows: Named, dims: int, shared: tuple[str, ...]) -> Named:
    """The rows as the operators know them: all that are shared alike, by input's rows that lie one behind the other."""
    given = [row for label, row in rows.items() if label in shared and row is not None]
    if not given:
        return rows
    input: Any = rows["input"]
    outer, own = input.dim() - dims, 0
    for d in range(outer):
        if not all(is_one(row.shape[d]) for row in given):
            own = d + 1
    sizes = (*input.shape[:own], *[1] * (outer - own), *input.shape[outer:])
    return rows | {
        label: row.expand(sizes)
        for label, row in rows.items()
        if label in shared and row is not None and _is_short(row, sizes)
    }


def _is_short(row: Tensor, sizes: tuple[int, ...]) -> bool:
    """Whether a row has a 1 where the sizes don't; not ``row.shape != sizes``, which of sizes that data decide torch
    doesn't answer."""
    return any(is_one(own) and not is_one(of) for own, of in zip(row.shape, sizes, strict=True))


def is_one(size: int) -> bool:
    """Whether a size is known to be 1. Of one that data decide, as of ``x[mask]``, torch says no, too, to broadcast."""
    if is_dynamo_compiling() or isinstance(size, SymInt):
        from torch.fx.experimental.symbolic_shapes import guard_or_false  # not loaded with torch

        return guard_or_false(size == 1)
    return size == 1


def broadcasts(sizes: Iterable[int], whole: Iterable[int]) -> bool:
    """Whether each size is the whole's or 1."""
    # Not `size in (1, of)`: where `of` is symbolic and equal, dynamo says no.
    return all(is_one(size) or size == of for size, of in zip(sizes, whole, strict=False))


def check_shared(name: str, label: str, row: Any, input: Any, dims: int) -> Tensor:
    """``along``, or an error for a row that doesn't fit."""
    _check_kind(name, label, row)
    found = along(row, input, dims) if dims <= row.dim() <= input.dim() else row
    outer, whole = input.dim() - dims, tuple(input.shape)
    sizes = tuple(found.shape)
    fits = len(sizes) == len(whole) and sizes[outer:] == whole[outer:] and row.device == input.device
    if not fits or not broadcasts(sizes[:outer], whole[:outer]):
        raise RuntimeError(
            f"{name}: {label} must have the first and the last sizes of input, or its sizes with 1 where rows share it "
            f"(of {list(whole)} on {input.device}, e.g. {list(whole[:1] + whole[max(outer, 1) :])}), but is "
            f"{list(row.shape)} on {row.device}; expand it first if broadcasting is meant"
        )
    result: Tensor = found
    return result


def check_alike(name: str, label: str, row: Any, input: Any) -> None:
    """Raises for a tensor that is no row beside the input, or of another shape or device; none is broadcast."""
    _check_kind(name, label, row)
    if row.shape != input.shape or row.device != input.device:
        raise RuntimeError(
            f"{name}: {label} must have the shape and device of input, {tuple(input.shape)} on {input.device}, but is "
            f"{tuple(row.shape)} on {row.device}; expand it first if broadcasting is meant"
        )


def _check_kind(name: str, label: str, row: Any) -> None:
    _arguments.check_tensors(name, **{label: row})
    _arguments.check_dense(name, **{label: row})
    _arguments.check_real(name, **{label: row})
