"""The only file that changes a model: it rebinds the forward of its norms, and takes that back."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .._arguments import MEMORY, check_one_of
from .._shown import described
from . import classes, lean
from .binding import binding_of
from .conditions import signature
from .fusion import fuse as fuse_layers
from .modes import undisturbed
from .probe import EPS_NAMES, Proof, Refused, examine
from .recipes import Recipe
from .report import Entry, PatchReport


def patch(
    model: nn.Module,
    *,
    verify: bool = True,
    fuse: bool | Mapping[str, Any] = False,
    fuse_add: bool | Mapping[str, Any] = False,
    layer_norm: bool = False,
    memory: str | None = None,
) -> PatchReport:
    """Runs every RMS norm of a model on our kernels, with the meaning that it had.

    A norm is recognised by what it computes, whatever its class is called: a copy of it and each recipe of
    ``recipes.py`` run on small random rows. Where one reproduces it, forward and backward, the forward of this instance
    is rebound; parameters, buffers, hooks, the class and the state_dict stay what they are. Every other norm is left as
    it is, and the report says why. Patching twice is patching once.

    Args:
        model: any module; a model of transformers, or one of yours with ``torch.nn.RMSNorm``.
        verify: False leaves out gradients, which are a tenth to a quarter of the time.
        fuse: True also runs what stands beside a norm in one pass with it, where a forward has these lines:
            ``h = residual + h; norm(h)``, ``h = norm(h); h = residual + h``, both, and norms of query and key before
            ``apply_rotary_pos_emb`` (or that alone), ``norm(x) * (1 + scale) + shift`` and ``h + gate * x``; proven on
            the layer's output, to the bit, and gradients. For this the model is called once, with its ``dummy_inputs``
            or with the keyword arguments that are given here instead of True.
        fuse_add: the same for residual adds alone, its old name.
        layer_norm: whether LayerNorms are taken too.
        memory: ``"lean"`` keeps the output of each norm for backward, which the next layer keeps anyway, instead of its
            input; see :func:`rmsnorm.rms_norm`. A norm with a gain of (nearly) 0 keeps its input, and the report says
            so, with the number; so does a norm whose gain gets there later, with a warning. With ``fuse`` or
            ``fuse_add``, MLPs that multiply with an activation keep two tensors of that product instead of three, and
            their gradients have the same bits.

    Returns:
        A :class:`rmsnorm.PatchReport`: print it, or ``.to_dict()`` it.

    Raises:
        TypeError: the model is no ``torch.nn.Module``; ``fuse`` or ``fuse_add`` is neither a bool nor a mapping.
        ValueError: another ``memory``.

    Examples:
        >>> report = patch(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.RMSNorm(8)))
        >>> report.patched[0].name, report.patched[0].meaning
        ('1', 'weight, then round')
    """
    _check(model, "patch")
    if memory is not None:
        check_one_of("patch", "memory", memory, MEMORY)
    for label, value in (("fuse", fuse), ("fuse_add", fuse_add)):
        if not isinstance(value, (bool, Mapping)):
            raise TypeError(
                f"patch: {label} must be True, False, or the keyword arguments that the model is called with, but is "
                f"{described(value)}; pass e.g. {label}={{'input_ids': ids}}"
            )
    heads = fuse is not False
    fuse = fuse if heads else fuse_add
    with classes.undone_on_errors(model):
        report = _patch_norms(model, layer_norm, verify, memory)
        if fuse is not False:
            with torch.inference_mode(False), torch.enable_grad():  # the caller's modes stay: the model may need them
                report.fused, left = fuse_layers(model, None if fuse is True else fuse, heads, memory is not None)
            report.skipped += left
    return report


def _patch_norms(model: nn.Module, layer_norm: bool, verify: bool, memory: str | None) -> PatchReport:
    report = PatchReport()
    known: dict[type, Recipe] = {}
    found: dict[Hashable, Proof | Refused] = {}  # of a model's norms most are alike
    with undisturbed():
        for name, module in model.named_modules():
            cls = type(module)
            if not _may_be_a_norm(module):
                continue
            like = signature(module)
            proof = found.get(like) or _ask(module, known.get(cls), layer_norm, verify)
            if like is not None:
                found[like] = proof
            if isinstance(proof, Refused):
                report.skipped.append(Entry(name, cls.__name__, reason=str(proof)))
                continue
            binding, kept = lean.chosen(module, proof.binding) if memory else (proof.binding, "")
            try:
                classes.change(module, binding)
            except Exception as error:  # of a metaclass, of __init_subclass__: what strangers say to a subclass
                report.skipped.append(Entry(name, cls.__name__, reason=f"its class can't be subclassed: {error}"))
                continue
            known[cls] = binding.recipe
            types = binding.types()
            entry = Entry(name, cls.__name__, binding.recipe.meaning, errors=proof.errors, types=types, kept=kept)
            report.patched.append(entry)
    return report


def _check(model: object, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{name}: model must be a torch.nn.Module, but is {described(model)}; pass the model itself, as a "
            "constructor or from_pretrained() returns it, one at a time"
        )


def _may_be_a_norm(module: nn.Module) -> bool:
    """By its name, or because it has an eps."""
    try:
        return "norm" in type(module).__name__.lower() or any(hasattr(module, name) for name in EPS_NAMES)
    except Exception:  # it has one, a property that raises: what it raises is said when it is asked
        return True


def _ask(module: nn.Module, first: Recipe | None, layer_norm: bool, verify: bool) -> Proof | Refused:
    if reason := _left_alone(module):
        return Refused(reason)
    if type(module) is nn.LayerNorm and not layer_norm:
        return Refused("it is a LayerNorm; patch(model, layer_norm=True) takes it")  # as examine() says of others
    try:
        return examine(module, layer_norm=layer_norm, verify=verify, first=first)
    except Refused as refused:
        return refused


def _left_alone(module: nn.Module) -> str:
    """Why a module isn't even asked what it does."""
    if binding_of(module):
        return "it is patched already"
    home = classes.inner(type(module)).__module__.partition(".")[0]
    if home == "rmsnorm":
        return "it is rmsnorm's own layer"
    if home == "torch" and not isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
        return "it is torch's own, and no RMS norm"
    return ""


def unpatch(model: nn.Module) -> None:
    """Gives every norm its own forward back. Does nothing to modules that :func:`rmsnorm.patch` left alone.

    Args:
        model: one that was patched, or a part of one, or a copy.

    Raises:
        TypeError: it is no ``torch.nn.Module``.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.RMSNorm(8))
        >>> report = patch(model)
        >>> unpatch(model)
        >>> type(model[0]) is torch.nn.RMSNorm
        True
    """
    _check(model, "unpatch")
    for module in model.modules():
        classes.restore(module)


@contextmanager
def patched(model: nn.Module, **options: Any) -> Iterator[PatchReport]:
    """:func:`rmsnorm.patch` for the length of a ``with`` block.

    Args:
        model: as for :func:`rmsnorm.patch`; at the end of the block it is unpatched, whatever happens inside.
        options: those of :func:`rmsnorm.patch`, by name.

    Yields:
        The :class:`rmsnorm.PatchReport`.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.RMSNorm(8))
        >>> with patched(model) as report:
        ...     len(report.patched)
        1
    """
    report = patch(model, **options)
    try:
        yield report
    finally:
        unpatch(model)
