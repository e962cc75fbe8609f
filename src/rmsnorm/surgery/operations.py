"""The only file that operates: it plans, proves the plan on copies, carries it out, and takes it back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .._arguments import check_one_of, described
from . import edits, folding, norms, proof, streams
from .edits import Plan
from .norms import Norm
from .report import BAR, Fate, SurgeryReport
from .rotation import KINDS
from .samples import trial_of
from .trace import Graph, trace

Planner = Callable[[nn.Module, Graph, dict[str, Norm], Plan], "streams.Fates"]


class SurgeryError(RuntimeError):
    """The proof failed; the model is what it was. ``report`` has the numbers."""

    def __init__(self, text: str, report: SurgeryReport) -> None:
        super().__init__(text)
        self.report = report


def fold(
    model: nn.Module,
    *,
    keep: bool = True,
    inputs: Any = None,
    verify: bool = True,
    untie: bool = False,
    tokenizer: Any = None,
    tokens: int = 16,
) -> SurgeryReport:
    """Multiplies the gain of each norm into the linear layers that read it."""

    def plan(model: nn.Module, graph: Graph, found: dict[str, Norm], plan: Plan) -> streams.Fates:
        fates = {}
        for name, norm in found.items():
            try:
                fates[name] = folding.fold(model, graph, norm, plan, untie=untie), ""
            except folding.Kept as reason:
                fates[name] = "", str(reason)
        return fates

    return _operate("fold", model, plan, keep, inputs, verify, tokenizer, tokens)


def to_rms(
    model: nn.Module,
    *,
    keep: bool = True,
    inputs: Any = None,
    verify: bool = True,
    untie: bool = True,
    tokenizer: Any = None,
    tokens: int = 16,
) -> SurgeryReport:
    """Makes RMSNorms of the LayerNorms of a pre-norm model."""
    return _operate(
        "to_rms", model, partial(streams.centred, untie=untie), keep, inputs, verify, tokenizer, tokens
    )


def rotate(
    model: nn.Module,
    *,
    kind: str = "hadamard",
    seed: int = 0,
    keep: bool = True,
    inputs: Any = None,
    verify: bool = True,
    tokenizer: Any = None,
    tokens: int = 16,
) -> SurgeryReport:
    """Puts an orthogonal matrix through each residual stream."""
    check_one_of("rotate", "kind", kind, KINDS)
    return _operate(
        "rotate", model, partial(streams.rotated, kind=kind, seed=seed), keep, inputs, verify, tokenizer, tokens
    )


def unfold(model: nn.Module) -> None:
    """Takes back what fold, to_rms and rotate did, the last first, to the bit."""
    _check(model, "unfold")
    edits.take_back(model)


def _check(model: object, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, but is {described(model)}")


def _operate(
    operation: str, model: nn.Module, planner: Planner, keep: bool, inputs: Any, verify: bool, tokenizer: Any, tokens: int
) -> SurgeryReport:
    _check(model, operation)
    report = SurgeryReport(operation)
    found, unknown = norms.find(model)
    trial = trial_of(model, inputs, tokenizer, tokens)
    graph = trace(model, found, trial.inputs)
    plan = Plan()
    fates = planner(model, graph, found, plan)
    for name, (cls, reason) in unknown.items():
        report.left.append(Fate(name, cls, reason=reason))
    for name in found:
        done, reason = fates[name]
        fate = Fate(name, found[name].cls, done, reason, _eps_share(graph, found[name]), graph.largest.get(name))
        (report.done if done else report.left).append(fate)
    report.unused = [name for name, _ in model.named_parameters() if name not in graph.used]
    report.notes = _notes(plan)
    if not plan:
        return report
    own = next(model.parameters()).dtype
    exact = None
    operate = partial(edits.carry_out, plan=plan, keep=False)
    if verify:
        exact = _prove(report, model, trial, operate)
        if own is not torch.bfloat16:
            _measure(report, model, trial, operate, torch.bfloat16, exact)
        before = proof.said(model, trial, own, write=True)
    edits.carry_out(model, plan, keep=keep)
    if verify:
        after = proof.said(model, trial, own, write=True)
        if own is not torch.float64:
            report.differences[str(own).removeprefix("torch.")] = proof.compared(own, before, after, exact)
    return report


def _prove(report: SurgeryReport, model: nn.Module, trial: proof.Trial, operate: Any) -> proof.Said | None:
    try:
        difference, before = proof.on_copy(model, torch.float64, trial, operate)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        report.not_measured["float64"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return None
    report.differences["float64"] = difference
    if not difference.worst <= BAR:
        raise SurgeryError(
            f"{report.operation}: in float64 the outputs differ by {difference.worst:.1e} relative, more than {BAR:g}; "
            "the model was left as it is",
            report,
        )
    return before


def _measure(
    report: SurgeryReport, model: nn.Module, trial: proof.Trial, operate: Any, dtype: torch.dtype, exact: Any
) -> None:
    try:
        difference, _ = proof.on_copy(model, dtype, trial, operate, exact)
        report.differences[str(dtype).removeprefix("torch.")] = difference
    except (RuntimeError, TypeError, NotImplementedError) as error:
        report.not_measured[str(dtype).removeprefix("torch.")] = f"{type(error).__name__}: {str(error)[:200]}"


def _eps_share(graph: Graph, norm: Norm) -> float | None:
    least = graph.least.get(norm.name)
    if least is None:
        return None
    eps = norms.eps_value(norm, torch.float32)
    return eps / (least + eps) if least + eps else None


def _notes(plan: Plan) -> list[str]:
    notes = [f"{'.'.join(one)} has a weight of its own now; it was tied" for one in plan.untie]
    notes += [f"{name} got a bias" for name in plan.biases]
    return notes + [f"{name} centres what it is called with" for name, _ in plan.hooks]
