"""The only file that serves a checked call of a form: the operator, what records it, or the definition.

First derivatives run on the form's operators. Whatever is unusual (torch.func, forward mode, derivatives of the
gradient, mixed types that no kernel has) is the row's definition or its derivative in torch's operators, which have
derivatives, batching rules and graphs of their own: so a form has all of them from its row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _autograd, _foreign, _form, _handed, _onnx, _recorded
from . import unused


class Served:
    """How calls of one form are served: ``made`` are its operators.

    ``norm`` takes the place of ``reference.rms_norm`` where the definition serves: a form of whole norms has the plain
    norm's kernels, derivatives and rules there. ``more`` are further parts of it that others take the place of.
    ``ahead`` serves what comes before the norm, if that is more than a sum (``unused.py``).
    """

    def __init__(
        self, made: _form.Operators, norm: Callable[..., Any] | None = None, ahead: Served | None = None, **more: Any
    ) -> None:
        self.made, self.form = made, made.form
        self.unused = unused.Unused(made.form, ahead)
        self.more: dict[str, Any] = more if norm is None else {"normalise": norm, **more}
        self.operator: Callable[..., Any] = made.plain
        self.weight = len(self.form.rows)  # the place of the first: a norm has one
        # Past the dispatcher; a form that has no number there has its kernel called.
        self.kind = _handed.KINDS.get(self.form.name)
        shared = {label.rstrip("?"): "S" if label.endswith("?") else "s" for label in self.form.shared}
        self.straight = _handed.straight(self.form.name, made.schemas.get("", ""), **shared)
        self.tensors = self.form.tensors  # read here: dynamo doesn't trace the lock of a cached property of Python 3.11
        # The same, for who doesn't compile: OpOverload.__call__ adds 0.5 µs to what it calls.
        self.plain: Callable[..., Any] = made.plain._op
        self.record: Callable[..., Any] | None = None
        if made.forward is None:
            return
        self.forward: Callable[..., Any] = made.forward._op
        self.backward: Any = made.backward
        self.twice = _twice_of(self)
        function = _function_of(self)
        # Past Function.apply, which reads the signature of `forward` with `inspect`, each time: 60 µs.
        self.record = super(torch.autograd.Function, function).apply  # type: ignore[misc]
        if not made.form.same:  # else the other form's is what torch.compile records
            self.traced = _recorded.recorded(made, "", function.apply)

    def define(self, *arguments: Any, **more: Any) -> Any:
        """The definition's outputs."""
        assert self.form.define is not None
        results = self.form.define(*arguments, **(self.more | more))
        outputs = len(self.form.outputs)
        return results[0] if outputs == 1 else results[:outputs]

    def gradients(
        self,
        grads: Sequence[Tensor | None],
        saved: Sequence[Tensor | None],
        kept: Sequence[Tensor],
        weights: Sequence[Tensor | None],
        options: Sequence[Any],
        needs: Sequence[bool],
    ) -> Sequence[Tensor | None]:
        """Of what backward finds the gradients of: by an operator, or by the row's derivative, of a batch say."""
        way: Callable[..., Any] = self.backward
        if not torch.compiler.is_compiling():
            if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
                assert self.form.gradients is not None
                return self.form.gradients(tuple(grads), tuple(saved), weights, tuple(options))
            way = self.twice if torch.is_grad_enabled() else getattr(way, "_op", way)
        return way(*grads, *saved, *kept, *weights, *options, *needs)

    def everyday(self, *arguments: Any) -> Any:
        """The same of a call of which nothing unusual is known; an error for what no kernel has."""
        if torch.is_grad_enabled():
            for tensor in arguments[: self.tensors]:  # not any(...): 0.3 µs of each call
                if tensor is not None and tensor.requires_grad:
                    if self.form.fixed and self.is_moved(arguments):
                        raise RuntimeError
                    return self.record(*arguments)  # type: ignore[misc] # a TypeError where there is none
        return self.plain(*arguments)

    def is_moved(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether a derivative by a row is wanted that only the definition has."""
        fixed = [t for t, name in zip(tensors, self.form.rows, strict=False) if name in self.form.fixed]
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in fixed)

    def is_mixed(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether rows are of several types that no kernel has together."""
        if self.form.mixed:
            return False
        own = self.form.fixed + self.form.shared
        rows = [t for t, name in zip(tensors, self.form.rows, strict=False) if name not in own]
        return any(t is not None and t.dtype is not rows[0].dtype for t in rows)  # type: ignore[union-attr]

    def __call__(self, native: bool, *arguments: Any) -> Any:
        """The outputs; ``native`` is False for types that no kernel has."""
        tensors = arguments[: self.tensors]
        if self.record is None and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            raise RuntimeError(
                f"{self.form.name}: its results have no derivative, but one of the arguments requires grad; call it "
                "under torch.no_grad()"
            )
        if torch.onnx.is_in_onnx_export():
            return self.define(*arguments, normalise=_onnx.normalised)
        if (
            not native
            or self.is_mixed(tensors)
            or not self.form.fits(*arguments)
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
            or _foreign.wanted_by(*tensors)
            or _autograd.refused()
            or (self.form.fixed and self.is_moved(tensors))
        ):
            return self.define(*arguments)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            if _foreign.not_to_be_kept(*tensors):
                return self.define(*arguments)
            recorded = self.traced if torch.compiler.is_compiling() else self.record
            assert recorded is not None
            return recorded(*arguments)
        return self.operator(*arguments)


def _function_of(served: Served) -> type[torch.autograd.Function]:
    """Kept for backward: what the row says, the weights, and a number per row."""
    form = served.form
    rows, tensors, outputs, moving = len(form.rows), form.tensors, len(form.outputs), len(form.moving)
    places = [(form.rows + form.outputs).index(name) for name in form.saved or form.rows]
    read, kept = len(places), len(places) + len(form.kept)
    names = form.rows + form.weights
    # Of each tensor where its gradient is among those found, or -1 where it is the output's; None where there is none.
    place = (
        {name: i for i, name in enumerate(form.learnt)}
        | dict.fromkeys(form.straight, -1)
        | dict.fromkeys(form.alike, 0)
    )
    found_at = [place.get(name) for name in names]
    asked_at = [[i for i, at in enumerate(found_at) if at == place[name]] for name in form.learnt]
    known_at = [i for i, known in enumerate(form.known) if known]
    # Of most forms each gradient is one tensor's; any(...) takes 0.3 µs of each.
    alone = [at[0] for at in asked_at] if all(len(at) == 1 for at in asked_at) else None
    followed = [
        (i, [names.index(t) for t in form.follows[name]]) for i, name in enumerate(form.outputs) if name in form.follows
    ]
    unused, last = served.unused, served.unused.last

    def forward(ctx: Any, *arguments: Any) -> Any:
        results = served.forward(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        all = arguments[:rows] + results
        ctx.options = arguments[tensors:]
        ctx.save_for_backward(*[all[i] for i in places], *results[outputs:], *arguments[rows:tensors])
        ctx.set_materialize_grads(False)
        if outputs == 1:
            return results[0]
        if followed and not torch.compiler.is_compiling():
            asked = ctx.needs_input_grad
            ctx.mark_non_differentiable(*(results[i] for i, at in followed if not any(asked[j] for j in at)))
        return results[:outputs]

    def backward(ctx: Any, *arrived: Tensor | None) -> tuple[Tensor | None, ...]:
        found: Sequence[Tensor | None]
        grads: Sequence[Tensor | None] = arrived
        tensors_kept = ctx.saved_tensors  # once: hooks run each time
        saved, weights = tensors_kept[:read], tensors_kept[kept:]
        asked, given = ctx.needs_input_grad, ctx.options
        if grads[0] is None or grads[last] is None:
            asked = unused.reached(grads, asked)
            if not any(asked):
                return (None,) * len(asked)
            if unused.is_ahead(grads):
                return unused.found(grads, tensors_kept, given, asked)
            grads = unused.stand_ins(grads, saved)
        needs = [any(asked[i] for i in at) for at in asked_at] if alone is None else [asked[i] for i in alone]
        options = [given[i] for i in known_at]
        first: Any = grads[0]
        rest = grads[1:]
        dtype = (saved if form.sources is None else form.sources((first, *rest), saved))[0].dtype
        # Llama rounding with a wider weight: the output, and so its gradient, is wider than the input.
        wider = not form.mixed and first.dtype is not dtype
        if wider:
            saved = tuple(t if t is None else t.to(first.dtype) for t in saved)
            rest = tuple(t if t is None else t.to(first.dtype) for t in rest)
        found = served.gradients((first, *rest), saved, tensors_kept[read:kept], weights, options, needs)
        if wider:
            found = [t if t is None or i >= moving else t.to(dtype) for i, t in enumerate(found)]
        results = [
            None if at is None or not asked[i] else found[at] if at >= 0 else grads[0] for i, at in enumerate(found_at)
        ]
        return *results, *(None,) * len(given)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"{form.title}Function", (torch.autograd.Function,), members)  # torch shows the name: as grad_fn


def _twice_of(served: Served) -> Callable[..., Any]:
    """The form's backward where a graph of the gradient is wanted: the operator's bits, whose derivatives are those of
    the row's derivative."""
    form = served.form
    learnt, known = len(form.learnt), sum(form.known)

    def forward(ctx: Any, *arguments: Any) -> Any:
        tensors = len(arguments) - learnt - known
        ctx.options = arguments[tensors:-learnt]
        ctx.save_for_backward(*arguments[:tensors])
        ctx.set_materialize_grads(False)
        found = served.backward(*arguments)
        found = found if isinstance(found, tuple) else (found,)
        ctx.mark_non_differentiable(*(t for t, need in zip(found, arguments[-learnt:], strict=True) if not need))
        return found

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, again = ctx.saved_tensors, torch.is_grad_enabled()  # whether a graph of this one is wanted, too
        needs = ctx.needs_input_grad[: len(saved)]
        with torch.enable_grad():
            # Each a tensor of its own: one that was given twice would have both gradients twice.
            given = [
                t if t is None or not need else t.view_as(t) if again else t.detach().requires_grad_()
                for t, need in zip(saved, needs, strict=True)
            ]
            assert form.gradients is not None
            found = form.gradients(*form.parts((*given, *ctx.options)))
            pairs = [
                (one, grad)
                for one, grad in zip(found, grads, strict=True)
                if one is not None and grad is not None and one.requires_grad
            ]
            wanted = [t for t, need in zip(given, needs, strict=True) if need]
            ones, beside = [one for one, _ in pairs], [grad for _, grad in pairs]
            results = iter(
                torch.autograd.grad(ones, wanted, beside, create_graph=again, allow_unused=True)
                if pairs
                else [None] * len(wanted)
            )
        return *(next(results) if need else None for need in needs), *(None,) * (learnt + known)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(f"{form.title}BackwardFunction", (torch.autograd.Function,), members)
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]
