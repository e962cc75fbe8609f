"""The only file that knows DTensor: which part of a norm is local, and how its results are placed.

A norm of sharded tensors is a norm of each rank's part. Where the parts are rows, nothing travels: this is the native
kernel on local tensors, and the weight's gradient is a partial sum. Where they are columns, ``ranks.py`` reduces one
number per row. In and out go ``DTensor.to_local`` and ``DTensor.from_local``, torch's documented way for code that
does its own communication: they carry placements for gradients, trace in graphs and differentiate again. Rules
registered for operators (``register_sharding``) can't reduce inside an operator, and where no rule fits they gather
without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from . import parts, ranks

_Norm = Callable[..., Any]
_Tensors = dict[str, Any]  # by the names of the arguments; None where there is none
_Placements = tuple[Placement, ...]


def rms_norm(
    norm: _Norm,
    input: Tensor,
    weight: Tensor | None,
    out: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    casting_mode: str,
    floored: bool = False,
) -> Tensor:
    """``rmsnorm.rms_norm`` or ``floored_rms_norm``: ``norm``, which checked the arguments, filled in defaults, and is
    called again with what this rank has. So are the others."""
    if out is not None:
        raise RuntimeError("rms_norm: out= is for plain tensors, and there is a DTensor among the arguments; drop it")

    def local(x: Tensor, w: Tensor | None) -> Tensor:
        return norm(x, _tail(x, dims), w, -eps if floored else eps, offset=offset, casting_mode=casting_mode)

    def across(parts: ranks.Parts, x: Tensor, w: Tensor | None) -> Any:
        return ranks.rms_norm(parts, x, w, dims, eps, offset, casting_mode == "llama")

    return normalise("rms_norm", local, across, dims, {"input": input}, {"weight": weight})


def add_rms_norm(
    norm: _Norm,
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    casting_mode: str,
) -> tuple[Tensor, Tensor]:
    """``rmsnorm.add_rms_norm``."""

    def local(x: Tensor, r: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
        return norm(x, r, _tail(x, dims), w, eps, offset=offset, casting_mode=casting_mode)

    def across(parts: ranks.Parts, x: Tensor, r: Tensor, w: Tensor | None) -> Any:
        return ranks.rms_norm(parts, x + r, w, dims, eps, offset, casting_mode == "llama", keep=True)

    alike = {"input": input, "residual": residual}
    return normalise("add_rms_norm", local, across, dims, alike, {"weight": weight}, outputs=2)


def gated_rms_norm(
    norm: _Norm,
    input: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    casting_mode: str,
    activation: str,
    silu: bool,
    norm_before_gate: bool,
    group_size: int | None,
) -> Tensor:
    """``rmsnorm.gated_rms_norm``. Groups must not be cut: then each is local, however the ranks share the rows."""
    named: dict[str, Any] = {"offset": offset, "casting_mode": casting_mode, "activation": activation}
    named |= {"norm_before_gate": norm_before_gate, "group_size": group_size}

    def local(x: Tensor, g: Tensor | None, w: Tensor | None) -> Tensor:
        return norm(x, g, _tail(x, dims), w, eps, **named)

    def across(parts: ranks.Parts, x: Tensor, g: Tensor | None, w: Tensor | None) -> Any:
        options = (dims, eps, offset, casting_mode == "llama")
        if g is None:
            return ranks.rms_norm(parts, x, w, *options)
        return ranks.gated_rms_norm(parts, x, g, w, *options, norm_before_gate, silu)

    alike = {"input": input, "gate": gate}
    return normalise("gated_rms_norm", local, across, dims, alike, {"weight": weight}, group_size)


def layer_norm(
    norm: _Norm, input: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """``rmsnorm.layer_norm``."""
    if _tail(input, len(shape)) != shape or any(t is not None and t.shape != shape for t in (weight, bias)):
        return torch.nn.functional.layer_norm(input, shape, weight, bias, eps)  # which words the error

    def local(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return norm(x, _tail(x, len(shape)), w, b, eps)

    def across(parts: ranks.Parts, x: Tensor, w: Tensor | None, b: Tensor | None) -> Any:
        return ranks.layer_norm(parts, x, w, b, len(shape), eps)

    return normalise("layer_norm", local, across, len(shape), {"input": input}, {"weight": weight, "bias": bias})


def _tail(tensor: Tensor, dims: int) -> tuple[int, ...]:
    return tuple(tensor.shape[tensor.dim() - dims :])


def normalise(
    name: str,
    local: _Norm,
    across: _Norm | None,
    dims: int,
    alike: _Tensors,
    weights: _Tensors,
    group_size: int | None = None,
    outputs: int = 1,
    shared: tuple[str, ...] = (),
) -> Any:
    """``alike`` are the tensors of the input's shape, ``weights`` those of its last dimensions, by name; ``local`` and
    ``across`` take what a rank has of them, where rows are whole and where they aren't. Of those that are ``shared``
    several rows of the input may have one."""
    mesh, alike, weights = _on_one_mesh(name, alike, weights)
    placements = _common_placements(name, {n: t for n, t in alike.items() if n not in shared})
    whole = alike["input"]
    tensors = [
        t if t is None else parts.of_shared(t, placements) if n in shared else parts.place(t, placements).to_local()
        for n, t in alike.items()
    ]
    tensors += [t if t is None else parts.of_weight(name, n, t, whole.dim(), placements) for n, t in weights.items()]
    split = [i for i, p in enumerate(placements) if isinstance(p, Shard) and p.dim >= whole.dim() - dims]
    cuts = bool(split)  # also between groups, where no row is to be put together
    if split and group_size is not None:
        _check_groups(name, whole, placements, group_size)
        split = []
    if split and across is None:
        cut = f"{name}: input is placed {list(placements)}, which cuts a normalised dimension"
        raise RuntimeError(f"{cut}; this form has no norm of rows on several ranks: shard another dimension")
    if mesh.get_coordinate() is None:  # this rank has no part; torch's own operators compute nothing either
        output: Any = tensors[0] if outputs == 1 else (tensors[0],) * outputs
    elif across is not None and split:
        output = across((tuple(mesh.get_group(i).group_name for i in split), prod(_tail(whole, dims))), *tensors)
    else:
        output = local(*tensors)

    def placed(tensor: Tensor) -> DTensor:
        # Shape and strides are given, as torch would multiply this rank's by the number of ranks.
        last = _tail(whole if cuts or tensor.dim() < whole.dim() else tensor, dims)
        shape = torch.Size((*whole.shape[: whole.dim() - dims], *last))
        strides = tuple(prod(shape[i + 1 :]) for i in range(whole.dim()))
        return DTensor.from_local(tensor, mesh, placements, run_check=False, shape=shape, stride=strides)

    return tuple(map(placed, output)) if isinstance(output, tuple) else placed(output)


def _on_one_mesh(name: str, alike: _Tensors, weights: _Tensors) -> tuple[Any, _Tensors, _Tensors]:
    meshes = {n: t.device_mesh for n, t in (alike | weights).items() if isinstance(t, DTensor)}
    mesh = next(iter(meshes.values()))
    if any(other != mesh for other in meshes.values()):
        raise RuntimeError(f"{name}: all tensors must be on one DeviceMesh, but there are {meshes}; redistribute them")

    def whole(label: str, tensor: Any) -> Any:
        if tensor is None or isinstance(tensor, DTensor):
            return tensor
        if not DTensor._op_dispatcher._allow_implicit_replication:
            raise RuntimeError(
                f"{name}: {label} is a plain tensor of shape {list(tensor.shape)} and {' and '.join(meshes)} a DTensor "
                f"on {mesh}; make all of them DTensors, e.g. distribute_tensor({label}, mesh, [Replicate()])"
            )
        return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)

    return mesh, {n: whole(n, t) for n, t in alike.items()}, {n: whole(n, t) for n, t in weights.items()}


def _common_placements(name: str, alike: _Tensors) -> _Placements:
    """Sharded where one is, otherwise replicated; partial sums are reduced to that."""
    common: list[Placement] = []
    for of_all in zip(*(t.placements for t in alike.values() if t is not None), strict=True):
        shards = {p for p in of_all if not (p.is_replicate() or p.is_partial())}
        if len(shards) > 1 or not all(isinstance(p, Shard) for p in shards):
            placed = ", ".join(f"{n} {list(t.placements)}" for n, t in alike.items() if t is not None)
            raise RuntimeError(
                f"{name}: input and its like must be replicated or sharded alike, but are placed {placed}; "
                "redistribute them first, e.g. residual.redistribute(placements=input.placements)"
            )
        common.append(shards.pop() if shards else Replicate())
    return tuple(common)


def _check_groups(name: str, input: DTensor, placements: _Placements, group_size: int) -> None:
    """Each group on one rank, or an error: torch's ``chunk`` cuts after every ceil(n/ranks)."""
    size = input.shape[-1]
    for i, placement in enumerate(placements):
        if placement == Shard(input.dim() - 1):
            size = ceil(size / input.device_mesh.size(i))
            if size % group_size:
                raise RuntimeError(
                    f"{name}: group_size {group_size} must divide the part of the last dimension of input that a rank "
                    f"has, {size} of {input.shape[-1]} as placed {list(placements)}; shard another dimension"
                )
