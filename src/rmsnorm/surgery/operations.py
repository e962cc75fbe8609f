"""The only file that operates: it plans, proves the plan on copies, carries it out, and takes it back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from .._arguments import check_one_of
from .._shown import described
from . import edits, folding, norms, proof, streams
from .edits import Plan
from .graph import Graph
from .norms import Norm
from .pending import Pending
from .report import BAR, Fate, SurgeryReport
from .rotation import KINDS
from .samples import trial_of
from .trace import trace

COARSE = 100.0
"""What a change may cost in the model's own type, in units of what that type costs the unchanged model."""
UNPROVEN = {torch.float32: 2.0**-10}
"""The same, relative to the largest output, where that isn't known, as the model doesn't run in fp64: a hundred layers
that round twice more each are 2^-17 off."""
UNPROVEN_HALF = 0.1
"""The same, of half types."""


class SurgeryError(RuntimeError):
    """The proof failed; the model is what it was. ``report`` has the numbers."""

    def __init__(self, text: str, report: SurgeryReport) -> None:
        super().__init__(text)
        self.report = report


PLANNERS: dict[str, Callable[..., folding.Fates]] = {
    "fold": folding.planned,
    "to_rms": streams.centred,
    "rotate": streams.rotated,
}
"""Each takes the model, its graph, its norms and an empty plan, and returns what becomes of each norm."""


def take_back(model: nn.Module) -> None:
    """Undoes all of it; see :func:`rmsnorm.unfold`."""
    _check(model, "unfold")
    edits.take_back(model)


def _check(model: object, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{name}: model must be a torch.nn.Module, but is {described(model)}; pass the model itself, as a "
            "constructor or from_pretrained() returns it"
        )


def operate(
    operation: str,
    model: nn.Module,
    *,
    keep: bool,
    inputs: Any,
    verify: bool,
    tokenizer: Any,
    tokens: int,
    progress: Callable[[str], None] = lambda step: None,
    pending: Pending | None = None,
    **options: Any,
) -> SurgeryReport:
    """One of ``PLANNERS`` with its options, from the trace to the proof; ``_surgery.py`` explains the arguments.

    ``progress`` hears what is being done, in a few words, before each step. With ``pending`` the model is what that
    makes of it; so are the changes: planned, and neither proven here nor written.
    """
    _check(model, operation)
    if "kind" in options:
        check_one_of(operation, "kind", options["kind"], KINDS)
    report = SurgeryReport(operation)
    progress("asking each norm what it computes")
    found, unknown = norms.find(model)
    trial = trial_of(model, inputs, tokenizer, tokens, operation)
    progress("following every tensor through the model")
    plan = Plan()
    with pending or _wide(model):
        graph = trace(model, found, trial.inputs)
        if options.get("untie") and not proof.untied_alike(model, trial):
            options["untie"] = False
            report.notes.append(
                "nothing was untied: this model computes something else where its configuration says so"
            )
    with pending or nullcontext():
        fates = PLANNERS[operation](model, graph, found, plan, **options)
    report.left = [Fate(name, cls, reason=reason) for name, (cls, reason) in unknown.items()]
    report.unused = [name for name, _ in model.named_parameters() if name not in graph.used]
    if plan:
        report.notes += plan.notes()
    if plan and pending:
        progress("planning what becomes of each weight")
        pending.take(plan)
    elif plan:
        _carry_out(report, model, trial, plan, keep=keep, verify=verify, progress=progress)
    after = _largest_after(model, found, trial) if plan and verify and operation != "fold" else {}
    for name, norm in found.items():
        done, reason = fates[name]
        largest = graph.largest.get(name), after.get(name)
        fate = Fate(name, norm.cls, done, reason, _eps_share(graph, norm), *largest)
        (report.done if done else report.left).append(fate)
    return report


def _carry_out(
    report: SurgeryReport,
    model: nn.Module,
    trial: proof.Trial,
    plan: Plan,
    *,
    keep: bool,
    verify: bool,
    progress: Callable[[str], None],
) -> None:
    """On copies first, in float64 and in bfloat16; then on the model, which gets back what it was if that fails."""
    own = next(one.dtype for one in model.parameters() if one.is_floating_point())
    if not verify:
        progress("changing the weights")
        report.kept = edits.carry_out(model, plan, keep=keep)
        return
    operate = partial(edits.carry_out, plan=replace(plan, undoable=False), keep=False)
    progress("proving it on a copy in float64")
    exact = _on_copy(report, model, trial, operate, torch.float64, None)
    proven = report.differences.get("float64")
    if proven and not proven.worst <= BAR:
        _fail(report, "float64", proven.worst, BAR)
    if own is not torch.bfloat16:
        progress("measuring it on a copy in bfloat16")
        _on_copy(report, model, trial, operate, torch.bfloat16, exact)
    if own is torch.float64:
        report.kept = edits.carry_out(model, plan, keep=keep)
        return
    progress(f"changing the weights; measuring it in {str(own).removeprefix('torch.')}")
    before = proof.said(model, trial, own, write=True)
    report.kept = edits.carry_out(model, plan, keep=True)
    try:
        found = proof.compared(own, before, proof.said(model, trial, own, write=True), exact)
        bar = COARSE * max(*found.own.values(), torch.finfo(own).eps) if found.own else UNPROVEN.get(own, UNPROVEN_HALF)
        report.differences[found.dtype] = found
        if not found.worst <= bar:
            _fail(report, found.dtype, found.worst, bar)
    except BaseException:
        edits.forget_last(model)
        raise
    if not keep:
        report.kept = edits.drop_last(model)


def _fail(report: SurgeryReport, dtype: str, worst: float, bar: float) -> None:
    raise SurgeryError(
        f"{report.operation}: in {dtype} the outputs differ by {worst:.1e} of the largest, more than {bar:.1e}; "
        "the model was left as it was",
        report,
    )


def _on_copy(
    report: SurgeryReport,
    model: nn.Module,
    trial: proof.Trial,
    operate: Callable[[nn.Module], object],
    dtype: torch.dtype,
    exact: proof.Said | None,
) -> proof.Said | None:
    """Adds a difference to the report, or the reason why there is none; returns what the model said before."""
    name = str(dtype).removeprefix("torch.")
    try:
        report.differences[name], before = proof.on_copy(model, dtype, trial, operate, exact)
    except Exception as error:  # of a stranger's forward, of a weight that has no such type
        report.not_measured[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return None
    return before


def _largest_after(model: nn.Module, found: dict[str, Norm], trial: proof.Trial) -> dict[str, float]:
    with _wide(model):
        return trace(model, found, trial.inputs).largest


def _wide(model: nn.Module) -> Any:
    """For a model that is fp64 itself, what proofs run in: products of experts have no kernel for it."""
    in_float64 = any(one.dtype is torch.float64 for one in model.parameters())
    return proof.Wide() if in_float64 else nullcontext()  # type: ignore[no-untyped-call]


def _eps_share(graph: Graph, norm: Norm) -> float | None:
    least = graph.least.get(norm.name)
    if least is None:
        return None
    eps = norms.eps_value(norm, torch.float32)
    return eps / (least + eps) if least + eps else None
