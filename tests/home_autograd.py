"""Rows of the table in test_home.py around autograd: autocast, checkpoints, hooks, anomalies, the profiler."""

from __future__ import annotations

from typing import Any

import torch
from home_compare import attempt, learn, loss, tensors_of
from home_norms import Norm, row
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Warnings of torch's machinery about itself; the rows that need one name it.
MISMATCH = ("Mismatch dtype between input and weight", UserWarning)  # F.rms_norm's of a wider weight
FORWARD = (".torch.jit", DeprecationWarning)  # TorchScript, which forward mode makes its decompositions with
ANOMALY = ("Anomaly Detection has been enabled", UserWarning)  # any use of detect_anomaly
NAN_FOUND = ("Error detected in", UserWarning)  # detect_anomaly's, before the error that it is for


def autocast(norm: Norm, dtype: torch.dtype) -> Any:
    results = {}
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        module, args = norm.module(), norm.args(dtype=kind, grad=True)
        with torch.autocast("cpu", dtype):
            result = tensors_of(module(*args))
        gradients = torch.autograd.grad(loss([t.float() for t in result]), (*args, *module.parameters()))
        # A float32 weight's gradient is as good as the half types that it is computed from.
        results[str(kind)] = [result, [(g.dtype, g.to(kind)) for g in gradients]]
    return results


@row("autocast to bfloat16", MISMATCH)
def autocast_bfloat16(norm: Norm) -> Any:
    return autocast(norm, torch.bfloat16)


@row("autocast to float16", MISMATCH)
def autocast_float16(norm: Norm) -> Any:
    return autocast(norm, torch.float16)


@row("checkpoint")
def checkpointed(norm: Norm) -> Any:
    results = []
    for reentrant in (True, False):
        module = norm.module()
        results.append(learn(lambda *a: checkpoint(module, *a, use_reentrant=reentrant), norm.args(grad=True), module))  # noqa: B023
    return results


@row("saved_tensors_hooks")
def saved_tensors(norm: Norm) -> Any:
    """What is kept passes through the hooks, and backward uses what they give back."""
    counts = [0, 0]

    def pack(t: Tensor) -> Tensor:
        counts[0] += 1
        return t.clone()

    def unpack(t: Tensor) -> Tensor:
        counts[1] += 1
        return t

    module = norm.module()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        result = learn(module, norm.args(grad=True))
    with torch.autograd.graph.save_on_cpu():
        offloaded = learn(norm.module(), norm.args(grad=True))
    return [result, offloaded, [count > 0 for count in counts]]


@row("a change to what was saved is an error")
def changed(norm: Norm) -> Any:
    module = norm.module()
    args = tuple(t * 1 for t in norm.args(grad=True))
    result = module(*args)
    with torch.no_grad():
        module.weight.add_(1)
    return attempt(lambda: loss(result).backward())


@row("detect_anomaly", ANOMALY, NAN_FOUND)
def anomaly(norm: Norm) -> Any:
    module, args = norm.module(), norm.args(grad=True)
    with torch.autograd.detect_anomaly():
        result = learn(module, args)
        args = [t.detach().mul(torch.nan).requires_grad_() for t in args]
        broken = sum(t.sum() for t in tensors_of(module(*args)))  # the first backward that makes a NaN is the norm's
        return [result, attempt(broken.backward)]


@row("profiler")
def profiler(norm: Norm) -> Any:
    """An event that is called after the norm; transformers' formula has none of its own, and isn't asked for one."""
    module, args = norm.module(), norm.args(grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = learn(module, args)
    names = {event.key for event in profile.key_averages()}
    called = any("rms_norm" in name or "layer_norm" in name for name in names)
    return [result, called or (not norm.ours and norm.public == "rsqrt")]


@row("torch.func: jvp, vjp, jacrev, jacfwd, hessian", FORWARD)
def derivatives(norm: Norm) -> Any:
    module = norm.module(5).double().requires_grad_(False)
    args = norm.args(2, 5, dtype=torch.float64)
    number = lambda *a: loss(module(*a))  # noqa: E731
    _, pull = torch.func.vjp(module, *args)
    return [
        torch.func.jvp(module, args, tuple(t.cos() for t in args)),
        pull(tuple(torch.ones_like(args[0]) for _ in tensors_of(module(*args))) if _many(module, args) else args[0]),
        torch.func.jacrev(number)(*args),
        torch.func.jacfwd(module)(*args),
        torch.func.hessian(number)(*args),
    ]


def _many(module: Any, args: tuple[Tensor, ...]) -> bool:
    return isinstance(module(*args), tuple)


@row("a second backward pass, and derivatives of gradients")
def second_order(norm: Norm) -> Any:
    module, args = norm.module().double(), norm.args(dtype=torch.float64, grad=True)
    leaves = (*args, *module.parameters())
    first = torch.autograd.grad(loss(module(*args)), leaves, create_graph=True)
    second = torch.autograd.grad(sum((g * g).sum() for g in first), leaves)
    number = loss(module(*args))
    twice = [torch.autograd.grad(number, leaves, retain_graph=keep) for keep in (True, False)]
    return [first, second, twice, attempt(number.backward)]


@row("deterministic algorithms")
def deterministic(norm: Norm) -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        return learn(norm.module(), norm.args(grad=True))
    finally:
        torch.use_deterministic_algorithms(False)
