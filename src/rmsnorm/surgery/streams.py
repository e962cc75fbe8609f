"""The only file that plans what is done to residual streams: they are centred for ``to_rms``, or rotated.

Centred: with ``C = I - 11ᵀ/n`` put behind every writer, the stream s becomes C·s, whose mean is 0; then mean square and
variance are one number, and LayerNorm, which sees no mean, is RMSNorm with the same eps. Rotated: with Q put behind
every writer and Qᵀ before every reader nothing changes, as the mean square of a row is that of the row times Q.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..module import RMSNorm
from . import norms as table
from . import stream as streams
from .edits import Plan
from .folding import Fates, Kept, fold, owners, refuse_unseen, refuse_unseen_twins, separate, shares
from .graph import Graph, Node
from .norms import Norm
from .readers import follow
from .rotation import orthogonal
from .steps import Centre, Fill, Rotate, Scale
from .views import Untraceable, terminals
from .walk import Stream


def centred(model: nn.Module, graph: Graph, found: dict[str, Norm], plan: Plan, *, untie: bool) -> Fates:
    """Plans LayerNorm → RMSNorm for each stream that can be centred."""
    fates: Fates = {}
    layer_norms = {name: norm for name, norm in found.items() if norm.centred}
    for name, norm in found.items():
        if not norm.centred:
            fates[name] = "", "it subtracts no mean: it is no LayerNorm"
    for stream in streams.find(model, graph, layer_norms, lambda norm: False):
        part = Plan()
        try:
            streams.enter(graph, stream)
            streams.ahead(graph, stream)
            _refuse(stream)
            part.unseen += streams.tokens(model, graph, stream)
            names = _unshared(model, graph, stream, set(), part, untie=untie)
            _written(model, graph, stream, names, part, Centre)
        except Kept as reason:
            fates |= {name: ("", str(reason)) for name in stream.norms}
            continue
        words = ""
        if stream.entry:
            part.hooks.append((stream.entry[0], CentredArgument(stream.entry[1])))
            words = f"; its stream is centred where it enters {stream.entry[0]}"
        for name in stream.norms:
            fates[name] = _swapped(model, graph, layer_norms[name], part, words)
        if part.swaps:
            _merge(plan, part)
    return fates | {name: ("", "it never ran on these inputs") for name in found if name not in fates}


def _swapped(model: nn.Module, graph: Graph, norm: Norm, plan: Plan, words: str) -> tuple[str, str]:
    if not norm.plain or norm.layout != "last":
        return "", "it normalises other dimensions; on a centred stream it stays right"
    if any("hooks" in name and value for name, value in vars(model.get_submodule(norm.name)).items()):
        return "", "it has a hook, which would see another norm's output; it stays a LayerNorm, which is right here"
    try:
        if table.bias(model, norm) is not None and (shared := shares(model, graph, norm, ())):
            raise Kept(shared)
        into = fold(model, graph, norm, plan, untie=False, bias_only=True)
    except Kept as reason:
        return "", f"its bias can't be moved: {reason}; it stays a LayerNorm, which is right on a centred stream"
    plan.swaps[norm.name] = Swap(norm)
    return f"LayerNorm → RMSNorm{f', bias {into}' if into else ''}{words}", ""


class Swap:
    """Makes the RMSNorm that takes a LayerNorm's place: its weight, its eps."""

    def __init__(self, norm: Norm) -> None:
        self.norm = norm

    def __call__(self, old: nn.Module) -> nn.Module:
        weight: Any = getattr(old, self.norm.weight) if self.norm.weight else None
        some: Tensor | None = weight if weight is not None else next(old.parameters(), None)
        shape: Any = weight.shape if weight is not None else old.normalized_shape
        place = (some.device, some.dtype) if some is not None else ()
        new = RMSNorm(shape, self.norm.eps, weight is not None, *place)
        if weight is not None:
            new.weight = weight
        return new.train(old.training)


class CentredArgument:
    """A hook that centres one argument of a module: a stream that begins behind something that no weight writes."""

    def __init__(self, key: int | str) -> None:
        self.key = key

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(self.key, str) and self.key in kwargs:
            x = kwargs[self.key]
            return args, kwargs | {self.key: x - x.mean(-1, keepdim=True)}
        at = self.key if isinstance(self.key, int) else 0
        x = args[at]
        return (*args[:at], x - x.mean(-1, keepdim=True), *args[at + 1 :]), kwargs


def rotated(model: nn.Module, graph: Graph, found: dict[str, Norm], plan: Plan, *, kind: str, seed: int) -> Fates:
    """Plans a rotation for each stream that all allows."""
    fates: Fates = {}

    def commutes(norm: Norm) -> bool:
        free = table.gain(model, norm) is None and table.bias(model, norm) is None
        return free and norm.plain and not norm.centred

    for number, stream in enumerate(streams.find(model, graph, found, commutes)):
        part = Plan()
        matrix = orthogonal(stream.width, kind, seed + number)

        def turn(weight: str, axis: int, matrix: Tensor = matrix) -> Rotate:
            return Rotate(weight, axis, matrix)

        try:
            _refuse_layer_norms([found[name] for name in stream.norms])
            streams.ahead(graph, stream)
            _refuse(stream)
            part.unseen += streams.tokens(model, graph, stream)
            for name in stream.norms:
                _refuse_gains(model, found[name])
            products, reads = _readers(model, graph, [found[name] for name in stream.norms], stream.width)
            _unshared(model, graph, stream, products, part, untie=False)
            for weight, axis in reads:
                _only(graph, weight, products | stream.nodes | stream.writers)
                part.steps.append(turn(weight, axis))
            _written(model, graph, stream, {}, part, turn)
        except Kept as reason:
            fates |= {name: ("", str(reason)) for name in stream.norms}
            continue
        done = f"rotated ({kind}, {stream.width} columns)"
        fates |= dict.fromkeys(stream.norms, (done, ""))
        _merge(plan, part)
    return fates | {name: ("", "it never ran on these inputs") for name in found if name not in fates}


def _refuse_layer_norms(norms: list[Norm]) -> None:
    for norm in norms:
        if norm.centred:
            raise Kept(f"{norm.name} is a LayerNorm, which doesn't commute with a rotation; to_rms first")


def _refuse_gains(model: nn.Module, norm: Norm) -> None:
    if not norm.plain or norm.layout != "last":
        raise Kept(f"{norm.name} doesn't normalise whole rows")
    if table.gain(model, norm) is not None or table.bias(model, norm) is not None:
        raise Kept(f"{norm.name} has a gain, which doesn't commute with a rotation; fold first, with untie=True")


def _readers(
    model: nn.Module, graph: Graph, norms: list[Norm], width: int
) -> tuple[set[Node], dict[tuple[str, int], None]]:
    """The products that read the norms, and the weights in them with their axes."""
    products: set[Node] = set()
    reads: dict[tuple[str, int], None] = {}
    for norm in norms:
        try:
            followed = follow(model, graph, norm)
        except Untraceable as reason:
            raise Kept(f"the output of {norm.name} {reason}") from reason
        refuse_unseen(model, graph, (read.weight for read in followed.reads))
        products |= followed.products
        for read in followed.reads:
            if read.columns != (*range(width),) * (len(read.columns) // width):
                raise Kept(f"{read.weight} reads the channels of {norm.name} in another order")
            reads[read.weight, read.axis] = None
    return products, reads


def _refuse(stream: Stream) -> None:
    if stream.odd:
        raise Kept(f"its stream has {next(iter(stream.odd.values()))} in it, which can't be changed alone")
    if stream.refused:
        raise Kept(f"{stream.refused}, and would see another stream")


def _unshared(
    model: nn.Module, graph: Graph, stream: Stream, products: set[Node], plan: Plan, *, untie: bool
) -> dict[str, str]:
    """Sees to it that the weights that write are read by nobody else: the head is untied. Returns the names of those
    whose first name goes to the head."""
    names: dict[str, str] = {}
    for weight in {one.weight: None for one in stream.writes}:
        others = {n.module for n in terminals(graph, weight) if n not in stream.nodes | stream.writers | products}
        if not others:
            continue
        writers = {
            one.node.module if one.node else owners(model, weight)[0][0]
            for one in stream.writes
            if one.weight == weight
        }
        leaving = separate(model, weight, others, writers, untie)
        plan.untie += leaving
        names[weight] = next(".".join(filter(None, one)) for one in owners(model, weight) if one not in leaving)
    return names


def _only(graph: Graph, weight: str, nodes: set[Node]) -> None:
    if others := [node for node in terminals(graph, weight) if node not in nodes]:
        raise Kept(f"{weight} is read by {others[0].module}, too")


def _written(
    model: nn.Module, graph: Graph, stream: Stream, names: dict[str, str], plan: Plan, change: Callable[[str, int], Any]
) -> None:
    """The steps for what writes: layer scales go into the weights before them."""
    refuse_unseen_twins(model, graph, (one.weight for one in stream.writes))
    scales: dict[str, str] = {}
    for write in stream.writes:
        step = change(names.get(write.weight, write.weight), write.axis)
        if scales.setdefault(write.weight, write.scale) != write.scale:
            raise Kept(f"{write.weight} is scaled with {write.scale or 1} here and {scales[write.weight] or 1} there")
        if any(_alike(step, other) for other in plan.steps):
            continue
        if write.scale:
            _only(graph, write.scale, stream.nodes)
            factors = model.get_parameter(write.scale).detach().to(torch.float64, copy=True).flatten()
            plan.steps.append(Scale(step.weight, write.axis, factors))
            plan.steps += (
                [] if any(_alike(Fill(write.scale, 1.0), one) for one in plan.steps) else [Fill(write.scale, 1.0)]
            )
        plan.steps.append(step)


def _alike(one: Any, other: Any) -> bool:
    return type(one) is type(other) and (one.weight, getattr(one, "axis", 0)) == (
        other.weight,
        getattr(other, "axis", 0),
    )


def _merge(plan: Plan, part: Plan) -> None:
    plan.steps += part.steps
    plan.untie += [one for one in part.untie if one not in plan.untie]
    plan.biases += [one for one in part.biases if one not in plan.biases]
    plan.swaps |= part.swaps
    plan.hooks += part.hooks
    plan.unseen += part.unseen
