"""The only file that changes a model: it rebinds the forward of its norms, and takes that back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from .binding import bind, binding_of, unbind
from .fusion import fuse
from .probe import EPS_NAMES, Refused, examine
from .recipes import Recipe
from .report import Entry, PatchReport


def patch(model: nn.Module, *, verify: bool = True, fuse_add: bool | Mapping[str, Any] = False, layer_norm: bool = False) -> PatchReport:
    """Runs every RMS norm of a model on our kernels, with the meaning that it had."""
    report = PatchReport()
    known: dict[type, Recipe] = {}
    for name, module in model.named_modules():
        cls = type(module)
        if not _may_be_a_norm(module):
            continue
        try:
            if reason := _left_alone(module, layer_norm):
                raise Refused(reason)
            proof = examine(module, layer_norm=layer_norm, verify=verify, first=known.get(cls))
        except Refused as refused:
            report.skipped.append(Entry(name, cls.__name__, reason=str(refused)))
            continue
        binding = proof.binding
        known[cls] = binding.recipe
        bind(module, binding)
        report.patched.append(
            Entry(name, cls.__name__, binding.recipe.meaning, errors=proof.errors, types=binding.types())
        )
    if fuse_add:
        report.fused, left = fuse(model, None if fuse_add is True else fuse_add)
        report.skipped += left
    return report


def _may_be_a_norm(module: nn.Module) -> bool:
    """By its name, or because it has an eps."""
    return "norm" in type(module).__name__.lower() or any(hasattr(module, name) for name in EPS_NAMES)


def _left_alone(module: nn.Module, layer_norm: bool) -> str:
    """Why a module isn't even asked what it does."""
    if binding_of(module):
        return "it is patched already"
    home = type(module).__module__.partition(".")[0]
    if home == "rmsnorm":
        return "it is rmsnorm's own layer"
    if home == "torch" and not isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
        return "it is another norm"
    return ""


def unpatch(model: nn.Module) -> None:
    """Gives every norm its own forward back. Does nothing to modules that :func:`patch` left alone."""
    for module in model.modules():
        unbind(module)


@contextmanager
def patched(model: nn.Module, *, verify: bool = True, fuse_add: bool | Mapping[str, Any] = False, layer_norm: bool = False) -> Iterator[PatchReport]:
    """:func:`patch` for the length of a ``with`` block."""
    report = patch(model, verify=verify, fuse_add=fuse_add, layer_norm=layer_norm)
    try:
        yield report
    finally:
        unpatch(model)
