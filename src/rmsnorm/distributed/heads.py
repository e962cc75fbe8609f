"""The only file that knows DTensors of heads: query and key sharded over batch, heads or tokens, and their angles."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from . import parts, placement


def turned(name: str, local: Callable[..., Any], tensors: tuple[Any, ...], weights: dict[str, Any]) -> tuple[Any, Any]:
    """``local`` of what each rank has. A head is whole on a rank; cos and sin are sharded as the tokens are."""
    named = dict(zip(("query", "key", "cos", "sin"), tensors, strict=True))
    mesh, named, weights = placement._on_one_mesh(name, named, weights)
    rows = {label: named[label] for label in ("query", "key")}
    placements = placement._common_placements(name, rows)
    dim = named["query"].dim()
    if any(isinstance(p, Shard) and p.dim == dim - 1 for p in placements):
        raise RuntimeError(f"{name}: query is placed {list(placements)}, which cuts heads; shard another dimension")
    ours = [parts.place(t, placements).to_local() for t in rows.values()]
    for label in ("cos", "sin"):
        angle = named[label]
        wanted = tuple(_of_angle(p, dim, angle) for p in placements)
        partial = [
            Partial() if w.is_replicate() and isinstance(p, Shard) else w
            for p, w in zip(placements, wanted, strict=True)
        ]
        ours.append(parts.place(angle, wanted).to_local(grad_placements=partial))
    ours += [t if t is None else parts.of_weight(name, n, t, dim, placements) for n, t in weights.items()]
    outputs = ours[:2] if mesh.get_coordinate() is None else local(*ours)

    def placed(output: Any, whole: DTensor) -> DTensor:
        strides = tuple(prod(whole.shape[i + 1 :]) for i in range(dim))
        return DTensor.from_local(output, mesh, placements, run_check=False, shape=whole.shape, stride=strides)

    query, key = (placed(output, whole) for output, whole in zip(outputs, rows.values(), strict=True))
    return query, key


def _of_angle(p: Placement, dim: int, angle: Any) -> Placement:
    """Where an angle lies if query, of ``dim`` dimensions, is placed so."""
    if not isinstance(p, Shard) or p.dim == dim - 3:
        return Replicate()
    of_angle = angle.dim() - (dim - p.dim) + (1 if p.dim < dim - 3 else 0)
    return Shard(of_angle) if of_angle >= 0 and angle.shape[of_angle] > 1 else Replicate()
