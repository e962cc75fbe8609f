"""The only file that knows what a form of the norm is: one row, from which its operators follow.

A row says its tensors, its options, its definition in plain torch, what is kept for backward, and the derivative. Three
operators are made of it, whose arguments always come in this order:

    name            (rows, weights, options)                        -> outputs
    name_forward    (rows, weights, options)                        -> outputs, kept
    name_backward   (grads, saved, kept, weights, options, needs)   -> a gradient for each row and weight

The definition is their default kernel on every device. The C++ library (``csrc/``) and ``gpu/`` register themselves for
a more specific key, and torch's dispatcher prefers those: so "no compiler" and "another device" are the same path, and
no code of ours chooses. Outputs are contiguous, but for heads. A gradient that isn't asked for comes back as ``[0]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import _arguments, _native

library = torch.library.Library("rmsnorm", "DEF")

_Results = tuple[Tensor, ...]
_Call = Callable[..., Any]
KERNELS = frozenset({"cpu", "cuda", "xpu"})
"""Devices whose operators may have more than the definition; on others the definition is called without an operator."""


def like(input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Room for a contiguous tensor of the input's shape."""
    return input.new_empty(input.shape, dtype=dtype)


@dataclass(frozen=True, eq=False)
class Form:
    """One row. Functions get what the operators get, in their order, as positional arguments."""

    name: str
    """Of the operators, and of the public function."""
    rows: tuple[str, ...]
    """Tensors of one shape, but where ``fixed`` or ``shared``; the first is the input. "?": one may be None."""
    weights: tuple[str, ...]
    """Tensors of the last sizes, each of which may be None."""
    options: str
    """The rest, as a schema has it."""
    outputs: tuple[str, ...]
    kept: tuple[str, ...]
    """What forward finds out beside the outputs: a number per row each."""
    define: Callable[..., _Results] | None
    """``(rows, weights, options) -> (outputs, kept)`` in plain torch; None for what has no kernel but the CPU's."""
    like: Callable[..., _Results]
    """The same, in shapes and types without data."""
    saved: tuple[str, ...] = ()
    """Rows and outputs that backward reads; none: all rows."""
    grads: str = "Tensor grad"
    """The gradients that arrive, as a schema has them."""
    silent: tuple[str, ...] = ("round_first",)
    """Options that the derivative doesn't know."""
    gradients: Callable[..., tuple[Tensor | None, ...]] | None = None
    """``(grads, saved, weights, options) -> gradients of rows and weights`` in plain torch; None: another form's."""
    follows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Outputs that depend on some tensors alone, and these: where none of them learns, the output is a constant."""
    fixed: tuple[str, ...] = ()
    """Rows that have no gradient but the definition's, and types of their own."""
    shared: tuple[str, ...] = ()
    """Rows that several of the input's may share: outer sizes may be 1. Their types and gradients are their own."""
    straight: tuple[str, ...] = ()
    """Rows that are added to the output as they are: its gradient is theirs, and not an operator's to find."""
    mixed: bool = False
    """Whether the operators take rows of several types, and gradients of others than what is saved."""
    alike: tuple[str, ...] = ()
    """Rows whose gradient is the first one's, as they are added to it."""
    same: Operators | None = None
    """Those of another form, whose outputs are this one's and what is kept: then only backward is its own."""
    sources: Callable[..., Sequence[Tensor]] | None = None
    """``(grads, saved) -> tensors`` of the shapes and types of the rows' gradients; None: what is saved."""
    laid: Callable[[Tensor], Tensor] = Tensor.contiguous
    """Lays out the gradient of a row."""
    fits: Callable[..., bool] = lambda *arguments: True
    """Whether the operators are what serves these tensors; else the definition does."""
    check: Callable[..., None] = lambda *arguments: None
    """Raises for what no kernel takes, before the definition runs."""

    @cached_property
    def title(self) -> str:  # as a class has it
        return "".join(word.upper() if word in ("rms", "l2") else word.capitalize() for word in self.name.split("_"))

    @cached_property
    def tensors(self) -> int:  # that come first
        return len(self.rows) + len(self.weights)

    @cached_property
    def moving(self) -> tuple[str, ...]:  # rows among these
        return tuple(name for name in self.rows if name not in self.straight + self.fixed + self.alike)

    @cached_property
    def learnt(self) -> tuple[str, ...]:  # what backward finds the gradients of
        return self.moving + self.weights

    @cached_property
    def known(self) -> tuple[bool, ...]:  # of each option whether the derivative knows it
        return tuple(option.split()[1].partition("=")[0] not in self.silent for option in self.options.split(", "))

    @cached_property
    def defaults(self) -> tuple[Any, ...]:
        """Of the last options: torch doesn't hand over what equals its default."""
        given = [option.partition("=")[2] for option in self.options.split(", ") if "=" in option]
        return tuple(text == "True" if text in ("True", "False") else float(text) for text in given)

    def filled(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        missing = self.tensors + len(self.known) - len(arguments)
        return arguments + self.defaults[len(self.defaults) - missing :] if missing else arguments

    def parts(self, arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
        """What backward gets, but for the needs: ``(grads, saved, weights, options)``."""
        first = self.grads.count("Tensor")
        kept = first + len(self.saved or self.rows)
        last = kept + len(self.kept) + len(self.weights)
        return arguments[:first], arguments[first:kept], arguments[last - len(self.weights) : last], arguments[last:]

    def shaped(self, grads: Sequence[Any], saved: Sequence[Tensor]) -> Sequence[Tensor]:
        """Tensors of the shapes and types of the rows' gradients."""
        if self.sources is not None:
            return self.sources(grads, saved)
        count = len(self.moving)
        return [saved[0]] * count if len(saved) < count else saved[:count]

    def schemas(self) -> dict[str, str]:
        """By the ends of the operators' names."""
        rows = [_declared(row) for row in self.rows]
        given = ", ".join([*rows, *(f"Tensor? {w}" for w in self.weights)])
        outputs, all = ([f"Tensor {name}" for name in names] for names in (self.outputs, self.outputs + self.kept))
        options = [option.partition("=")[0] for option in self.options.split(", ")]  # defaults are the first one's
        schemas = {"": f"({given}, {self.options}) -> {_returned(outputs)}"}
        if self.kept or self.gradients:
            schemas["_forward"] = f"({given}, {', '.join(options)}) -> {_returned(all)}"
        if self.gradients:
            options = [option for option, known in zip(options, self.known, strict=True) if known]
            read = [_declared(name) for name in (self.saved or self.rows) + self.kept]
            read += [*(f"Tensor? {w}" for w in self.weights), *options]
            read += [f"bool need_{name.rstrip('?')}" for name in self.learnt]
            found = _returned([f"Tensor grad_{name.rstrip('?')}" for name in self.learnt])
            schemas["_backward"] = f"({self.grads}, {', '.join(read)}) -> {found}"
        return {"_backward": schemas["_backward"]} if self.same else schemas


def _declared(name: str) -> str:
    return f"Tensor? {name[:-1]}" if name.endswith("?") else f"Tensor {name}"


def _returned(results: list[str]) -> str:
    return "Tensor" if len(results) == 1 else f"({', '.join(results)})"


@dataclass(frozen=True)
class Operators:
    """What became of a row."""

    form: Form
    plain: torch._ops.OpOverload
    forward: Any
    """None, as the next, of a form that has no derivative;"""
    backward: Any
    """and of one whose gradient another's operator finds."""
    schemas: dict[str, str]
    """By the ends of their names, as are"""
    defaults: dict[str, _Call]
    """the functions that serve every device, and those that serve tensors without data."""
    fakes: dict[str, _Call]


registered: list[Operators] = []


def define(name: str, schema: str, default: _Call | None, fake: _Call) -> torch._ops.OpOverload:
    """An operator: the function that serves every device, and the one that serves tensors without data."""

    def shapes(*arguments: Any) -> Any:
        # One tensor on meta is enough for torch to come here: beside others, what comes back would hold no values.
        if len(devices := {str(x.device) for x in arguments if isinstance(x, Tensor)}) > 1:
            raise RuntimeError(f"{name}: tensors are on {' and '.join(sorted(devices))}; move them to one device")
        return fake(*arguments)

    library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    if default is not None:
        library.impl(name, default, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rmsnorm::{name}", shapes, lib=library)
    return getattr(torch.ops.rmsnorm, name).default


def register(form: Form) -> Operators:
    """Makes the operators of a row."""
    outputs, moving, tensors = len(form.outputs), len(form.moving), len(form.learnt)
    all = outputs + len(form.kept)

    def some(results: _Results, count: int = outputs) -> Any:
        return results[0] if count == 1 else tuple(results[:count])

    def forward(*arguments: Any) -> Any:
        _native.warn_if_missing((arguments := form.filled(arguments))[0])
        _arguments.check_dense(form.name, **dict(zip(form.rows + form.weights, arguments, strict=False)))
        form.check(*arguments)
        assert form.define is not None
        return form.define(*arguments)

    def backward(*arguments: Any) -> Any:
        arguments, needs = arguments[:-tensors], arguments[-tensors:]
        grads, saved, weights, options = form.parts(arguments)
        assert form.gradients is not None
        found = form.gradients(grads, saved, weights, options)
        first = form.shaped(grads, saved)[0]
        # An empty one each: no two outputs of an operator are one tensor.
        return tuple(
            first.new_empty(0) if not need or g is None else form.laid(g) if i < moving else g.contiguous()
            for i, (g, need) in enumerate(zip(found, needs, strict=True))
        )

    def fake_forward(*arguments: Any) -> Any:
        arguments = form.filled(arguments)
        form.check(*arguments)
        return form.like(*arguments)

    def fake_backward(*arguments: Any) -> Any:
        arguments, needs = arguments[:-tensors], arguments[-tensors:]
        grads, saved, weights, _ = form.parts(arguments)
        given = form.shaped(grads, saved)
        return tuple(
            given[0].new_empty(0) if t is None or not need else form.laid(like(t)) if i < moving else like(t)
            for i, (t, need) in enumerate(zip([*given, *weights], needs, strict=True))
        )

    functions = {
        "": (lambda *a: some(forward(*a)), lambda *a: some(fake_forward(*a))),
        "_forward": (lambda *a: some(forward(*a), all), lambda *a: some(fake_forward(*a), all)),
        "_backward": (backward, fake_backward),
    }
    schemas, made = form.schemas(), {}
    for end, schema in schemas.items():
        default, fake = functions[end]
        made[end] = define(form.name + end, schema, default if form.define is not None else None, fake)
    defaults, fakes = ({end: pair[i] for end, pair in functions.items()} for i in (0, 1))
    plain, ahead = (form.same.plain, form.same.forward) if form.same else (made[""], made.get("_forward"))
    registered.append(Operators(form, plain, ahead, made.get("_backward"), schemas, defaults, fakes))
    return registered[-1]
