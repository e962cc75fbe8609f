"""The only file with what becomes of outputs that a loss doesn't use: no gradient arrives at them, which is not one of
zeros. Zeros times a norm's infinity are NaN, and a sum of float16 is infinite soon.

What nothing arrives at has no gradient (None). Where something arrives at the sum alone, its gradient is that of what
is before the norm, which is not differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import _form

_Grads = Sequence[Tensor | None]


class Unused:
    """Of one form; ``ahead`` serves what is before its norm, or is None where that is a sum of the first two rows."""

    def __init__(self, form: _form.Form, ahead: Any) -> None:
        self.form, self.ahead = form, ahead
        names = form.rows + form.weights
        self.names = tuple(name.rstrip("?") for name in names)
        self.reach = [{t.rstrip("?") for t in form.follows.get(name, names)} for name in form.outputs]
        # Of outputs that are alike each has a gradient that its operator wants.
        self.last = 0 if "?" in form.grads else form.grads.count("Tensor") - 1
        self.kept = tuple(name.rstrip("?") for name in (form.saved or form.rows) + form.kept + form.weights)
        self.options = _options(form)

    def reached(self, grads: _Grads, asked: Sequence[bool]) -> tuple[bool, ...]:
        """Which of the gradients that are asked for there are."""
        some = {name for grad, reach in zip(grads, self.reach, strict=False) if grad is not None for name in reach}
        here = [need and name in some for name, need in zip(self.names, asked, strict=False)]
        return *here, *asked[len(here) :]

    def is_ahead(self, grads: _Grads) -> bool:
        """Whether something arrives at the sum, and nowhere else."""
        return [i for i, grad in enumerate(grads) if grad is not None] == [1] and self.form.outputs[1] == "sum"

    def found(
        self, grads: _Grads, kept: Sequence[Any], options: Sequence[Any], asked: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """What backward returns then."""
        grad, values = grads[1], dict(zip(self.kept + self.options, (*kept, *options), strict=True))
        found: dict[str, Tensor | None] = dict.fromkeys(self.names[:2], grad)
        form = self.ahead and self.ahead.form
        read = [values[name] for name in form.saved] if form else []
        if form and all(t is not None for t in read):  # a sum without a gate is a sum
            known = [name for name, known in zip(_options(form), form.known, strict=True) if known]
            parts = [[values[name] for name in names] for names in (form.kept, form.weights, known)]
            needs = [asked[self.names.index(name)] for name in form.learnt]
            results = self.ahead.gradients((grad,), read, *parts, needs)
            found = {**dict(zip(form.learnt, results, strict=True)), **dict.fromkeys(form.straight, grad)}
        rows = [found.get(name) if need else None for name, need in zip(self.names, asked, strict=False)]
        return *rows, *(None,) * len(options)

    def stand_ins(self, grads: _Grads, saved: Sequence[Any]) -> _Grads:
        """An operator's schema wants a tensor for each, though it reads none of which no gradient is asked for."""
        if not self.last:
            return grads
        other = next(grad for grad in grads if grad is not None)
        own = dict(zip(self.kept, saved, strict=False))
        rows = [self.form.follows[name][0] for name in self.form.outputs]
        return [own.get(row, other) if grad is None else grad for grad, row in zip(grads, rows, strict=True)]


def _options(form: _form.Form) -> tuple[str, ...]:
    return tuple(option.split()[1].partition("=")[0] for option in form.options.split(", "))
