"""The only file that fuses lines of a model's layers: it finds the layers, and proves each on an input it has seen."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from . import attention, classes, gates, modulation, rewrite
from .binding import binding_of
from .rehearsal import rehearsing
from .report import Entry
from .witness import counted, watch

GRADIENT = 16.0
"""In eps of the gradient's type, relative to the largest: two paths are summed, and rounded, in another order."""
Call = tuple[tuple[Any, ...], dict[str, Any]]
_PLAIN = bool | int | float | str
Result = tuple[list[Any], tuple[Tensor, ...]]


def fuse(
    model: nn.Module, example: Mapping[str, Any] | None = None, heads: bool = False, lean: bool = False
) -> tuple[list[Entry], list[Entry]]:
    """Fuses what can be proven. Returns the layers that were fused, and those that were not, with the reason.

    The model is called once with ``example`` (by default its ``dummy_inputs``) to see what its layers are called with.
    ``heads``: also what turns query and key, behind their norms or without any. ``lean``: also gated MLPs keep less.
    """
    fused, left = [], []
    layers: dict[str, nn.Module] = {}
    changes: dict[str, Any] = {}
    for name, layer in model.named_modules():
        try:
            if change := _change_for(layer, heads, lean):
                layers[name], changes[name] = layer, change
        except Exception as reason:  # a forward that wraps itself, or has no hash: it may be anything
            left.append(Entry(name, type(layer).__name__, reason=f"lines not fused: {_words(reason)}"))
    failure, calls = "the model doesn't call it, or calls its forward past its hooks", dict[str, Call | ValueError]()
    try:
        _check_sharding(model)
        calls = _record(model, layers, _dummy_inputs(model) if example is None else example)
    except Exception as error:  # whatever a model raises on inputs that don't suit it
        failure = f"the model can't be run on its example: {_words(error)}"
    for name, layer in layers.items():
        cls = type(layer)
        try:
            if classes.change_of(layer) is not None:
                raise ValueError("it is fused already")
            if "forward" in vars(layer):
                raise ValueError("its forward was replaced before")
            if name not in calls:
                raise ValueError(failure)
            if isinstance(call := calls[name], ValueError):
                raise call
            rewritten = changes[name](cls)
            apart, meaning, counts = _bind(layer, rewritten, call)
        except Exception as reason:  # nothing that goes wrong here may break the model: the layer stays as it is
            left.append(Entry(name, cls.__name__, reason=f"{changes[name].what} not fused: {_words(reason)}"))
            continue
        kept = gates.KEPT if isinstance(rewritten, gates.Gated) else ""
        fused.append(Entry(name, cls.__name__, meaning, errors={"gradient": apart}, kept=kept, counts=counts))
    return fused, left


def _change_for(layer: nn.Module, heads: bool, lean: bool) -> Any:
    """What its source asks for, if anything."""
    if isinstance(layer, torch.jit.ScriptModule):
        raise ValueError("torch.jit has compiled them")
    if heads and modulation.is_modulated(layer):
        return modulation.Modulated
    if _adds_beside_norms(layer):
        return rewrite.Rewritten
    if heads and attention.turns_heads(layer):
        return attention.Turned
    return gates.Gated if lean and gates.is_gated(layer) else None


def _check_sharding(model: nn.Module) -> None:
    """Running it would leave gathered parameters in the place of the sharded ones, for an optimizer to find."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp and any(isinstance(module, fsdp.FSDPModule) for module in model.modules()):
        raise ValueError("FSDP2 has sharded it; patch it before fully_shard()")


def _dummy_inputs(model: Any) -> Mapping[str, Any]:
    inputs: Mapping[str, Any] | None = getattr(model, "dummy_inputs", None)
    if inputs is None:
        raise ValueError("it has no dummy_inputs; pass what it is called with, as in fuse={'input_ids': ids}")
    return inputs


def _words(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"


def _adds_beside_norms(layer: nn.Module) -> bool:
    """Whether its source adds beside a norm that is patched, and can."""
    ours = {name for name, child in layer.named_children() if (found := binding_of(child)) and found.adds()}
    return bool(ours and ours.intersection(rewrite.norms_beside_adds(classes.original(type(layer)).forward)))


def _record(
    model: nn.Module, layers: Mapping[str, nn.Module], example: Mapping[str, Any]
) -> dict[str, Call | ValueError]:
    """What each layer is called with first, or why that can't be kept. Copied at once: caches are written to by the
    layers themselves."""
    calls: dict[str, Call | ValueError] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in calls:
                try:
                    calls[name] = copy.deepcopy((args, kwargs))
                except Exception as error:  # a lock among them; the model runs all the same
                    calls[name] = ValueError(f"what it is called with can't be copied: {_words(error)}")

        return hook

    hooks = [layer.register_forward_pre_hook(keep(name), with_kwargs=True) for name, layer in layers.items()]
    device = next((parameter.device for parameter in model.parameters()), None)
    try:
        with torch.no_grad(), rehearsing(model):
            model(**tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, dict(example)))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _bind(layer: nn.Module, rewritten: Any, call: Call) -> tuple[float, str, dict[str, int]]:
    """Gives the layer the rewritten forward, and takes it away again if the proof fails, in eval() or in training."""
    before = _run(layer, rewritten.norms, call)
    try:
        training = _run(layer, rewritten.norms, call, training=True)
    except Exception:  # it can't be trained with such a call, fused or not
        training = None
    classes.change(layer, rewritten)
    try:
        # By the class, with all wrappers: some look up what the class has, and the call has their names.
        after, served = watch(lambda: _run(layer, rewritten.norms, call), layer)
        apart, said = _compare(before, after), rewritten.said(served)
        if not said:
            raise ValueError(_unserved(layer, rewritten.norms))
        if training:
            apart = max(apart, _compare(training, _run(layer, rewritten.norms, call, training=True), " in training"))
        return apart, said, counted(served)
    except Exception:
        classes.restore(layer)
        raise


def _unserved(layer: nn.Module, norms: tuple[str, ...]) -> str:
    """Why none of a layer's lines ran in one pass."""
    own = [name for name in dict.fromkeys(norms) if isinstance(getattr(layer, name), nn.Module)]
    if own and not any(binding_of(getattr(layer, name)) for name in own):
        return f"{', '.join(own)}: not patched"
    return "the model reaches no such line, or with norms or tensors that one pass doesn't take"


def _compare(before: Result, after: Result, when: str = "") -> float:
    """The largest difference of a gradient.

    Raises:
        ValueError: they differ.
    """
    (theirs, their_gradients), (ours, our_gradients) = before, after
    if len(theirs) != len(ours) or not all(map(_same, theirs, ours)):
        raise ValueError(f"its output changes{when}")
    worst = 0.0
    for one, other in zip(their_gradients, our_gradients, strict=True):
        unit = torch.finfo(one.dtype).eps * one.abs().max().double().clamp_min(torch.finfo(one.dtype).smallest_normal)
        worst = max(worst, float((one.double() - other.double()).abs().max() / unit))
    if not worst <= GRADIENT:
        raise ValueError(f"its gradient changes by {worst:.0f} eps{when}")
    return worst


def _run(layer: nn.Module, norms: tuple[str, ...], call: Call, training: bool = False) -> Result:
    """What its class makes of the call: tensors, numbers and words of the output, gradients of the input's tensors and
    of the norms' weights."""
    args, kwargs = copy.deepcopy(call)
    # What comes in a tuple are tables, of cosines and sines: nobody learns them.
    args = tuple(x.detach().clone().requires_grad_() if _is_real(x) else x for x in args)
    kwargs = {name: x.detach().clone().requires_grad_() if _is_real(x) else x for name, x in kwargs.items()}
    learnt = [p for name in norms if isinstance(norm := getattr(layer, name), nn.Module) for p in norm.parameters()]
    wanted = [x for x in (*args, *kwargs.values()) if _is_real(x)] + [p for p in learnt if p.requires_grad]
    with torch.enable_grad(), rehearsing(layer, training):
        result = tree_leaves(type(layer).forward(layer, *args, **kwargs))
        outputs = [x for x in result if _is_real(x) and x.requires_grad]
        dice = torch.Generator().manual_seed(0)
        grads = [torch.randn(x.shape, generator=dice).to(x) for x in outputs]
        found = torch.autograd.grad(outputs, wanted, grads, allow_unused=True)
        said = [x.detach().clone() if isinstance(x, Tensor) else x for x in result if isinstance(x, Tensor | _PLAIN)]
    return said, tuple(g for g in found if g is not None)


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other) or not isinstance(one, Tensor):
        return type(one) is type(other) and one == other
    if one.dtype is not other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one, other) or (_is_real(one) and torch.allclose(one, other, 0, 0, equal_nan=True))


def _is_real(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
