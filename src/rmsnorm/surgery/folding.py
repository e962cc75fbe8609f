"""The only file that plans a fold: whose gain goes into which weights, and why some stay.

    W · (g ⊙ x̂ + b) + c  =  (W · diag(g)) · x̂ + (W · b + c)

A weight that somebody else reads, too, has to stay what it is for them, so its norm keeps its gain; unless it is a head
that shares its weight with the embeddings, and the caller wants it untied.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from . import norms as table
from .edits import Plan
from .graph import Graph, Node
from .norms import Norm
from .readers import Followed, Read, follow
from .steps import Add, Fill, Scale
from .views import Untraceable, terminals

Fates = dict[str, tuple[str, str]]
"""Of each norm what was done, and why nothing was: one of both is empty."""


class Kept(Exception):
    """Why a norm stays as it is, in one sentence."""


def planned(model: nn.Module, graph: Graph, found: dict[str, Norm], plan: Plan, *, untie: bool) -> Fates:
    """Plans the fold of every norm."""
    kept: Fates = {}
    while True:  # a norm that stays keeps what it shares, so the others with it stay, too
        for one in (plan.steps, plan.biases, plan.untie):
            one.clear()
        fates: Fates = dict(kept)
        for name, norm in found.items():
            if name in kept:
                continue
            try:
                fates[name] = fold(model, graph, norm, plan, untie=untie), ""
            except Kept as reason:
                fates[name] = "", str(reason)
        folded = [norm for name, norm in found.items() if fates[name][0]]
        torn = {norm.name: ("", why) for norm in folded if (why := shares(model, graph, norm, folded))}
        if not torn:
            return fates
        kept |= torn


def shares(model: nn.Module, graph: Graph, norm: Norm, folded: Iterable[Norm]) -> str:
    """Who else needs the gain or the bias of a norm, other than those that lose the same: in words, if anybody."""
    own = model.get_submodule(norm.name)
    same = {one.name for one in folded if one.offset == norm.offset}
    for attribute in filter(None, (norm.weight, norm.bias)):
        shared = getattr(own, attribute)
        for name, module in model.named_modules():
            if name not in same and module is not own and any(one is shared for one in module._parameters.values()):
                return f"its {attribute} is that of {name}, too, which keeps it"
        names = [name for name, one in model.named_parameters(remove_duplicate=False) if one is shared]
        if readers := {node.module for name in names for node in terminals(graph, name)}:
            return f"its {attribute} is read by {min(readers) or 'the model'}, too"
    return ""


def fold(model: nn.Module, graph: Graph, norm: Norm, plan: Plan, *, untie: bool, bias_only: bool = False) -> str:
    """Adds to the plan what a norm needs to lose its gain and its bias, or its bias alone; returns what that is.

    Raises:
        Kept: it has to stay.
    """
    gain = None if bias_only else table.gain(model, norm)
    shift = table.bias(model, norm)
    if gain is None and shift is None:
        if bias_only:
            return ""
        raise Kept("it has no gain and no bias" if norm.weight is None else "its gain is 1 already")
    if norm.refused:
        raise Kept(norm.refused)
    try:
        followed = follow(model, graph, norm)
    except Untraceable as reason:
        raise Kept(f"its output {reason}") from reason
    if shift is not None and followed.scaled:
        raise Kept("its output is multiplied on its way to the linear layers, and its bias isn't what arrives there")
    refuse_unseen(model, graph, (read.weight for read in followed.reads))
    steps: list[Scale | Add | Fill] = []
    biases: list[str] = []
    untied: list[tuple[str, str]] = []
    for read in followed.reads:
        name = read.weight
        if gain is not None and (split := _split(model, graph, read, followed.products, untie)):
            untied += split
            name = ".".join(filter(None, split[0]))
        if gain is not None:
            steps.append(Scale(name, read.axis, _columns(gain, read, 1.0)))
        if shift is not None:
            target, made = _bias_of(model, read)
            biases += [made] if made else []
            steps.append(Add(target, read.weight, read.axis, _columns(shift, read, 0.0)))
    already = {one.weight for one in plan.steps if isinstance(one, Scale)}
    if twice := already & {one.weight for one in steps if isinstance(one, Scale)}:
        raise Kept(f"its output and another norm's go into {min(twice)}")
    if norm.weight and not bias_only:
        steps.append(Fill(f"{norm.name}.{norm.weight}".lstrip("."), 1.0 - norm.offset))
    if norm.bias:
        steps.append(Fill(f"{norm.name}.{norm.bias}".lstrip("."), 0.0))
    plan.steps += steps
    plan.biases += [one for one in biases if one not in plan.biases]
    plan.untie += [one for one in untied if one not in plan.untie]
    return _words(model, followed, biases, untied)


def _words(model: nn.Module, followed: Followed, biases: list[str], untied: list[tuple[str, str]]) -> str:
    words = "into " + ", ".join(dict.fromkeys(_shown(model, read) for read in followed.reads))
    words += f"; {', '.join(dict.fromkeys(biases))} got a bias" if biases else ""
    return words + (f"; {'.'.join(untied[0])} was tied and isn't any more" if untied else "")


def _shown(model: nn.Module, read: Read) -> str:
    """The weight by the name that its reader has for it."""
    names = (".".join(filter(None, one)) for one in owners(model, read.weight) if one[0] == read.module)
    return next(names, read.weight)


def _columns(values: Tensor, read: Read, other: float) -> Tensor:
    """The values in the order of a weight's columns."""
    columns = torch.tensor(read.columns, device=values.device)
    return torch.where(columns >= 0, values.flatten()[columns.clamp(min=0)], other)


def owners(model: nn.Module, weight: str) -> list[tuple[str, str]]:
    """The modules that have this parameter, and what they call it."""
    shared = model.get_parameter(weight)
    return [
        (name, attribute)
        for name, module in model.named_modules(remove_duplicate=False)
        for attribute, one in module._parameters.items()
        if one is shared
    ]


def _split(model: nn.Module, graph: Graph, read: Read, mine: Collection[Node], untie: bool) -> list[tuple[str, str]]:
    """Modules whose weight becomes one of its own, as others read it, too: none where nobody does."""
    others = [node for node in terminals(graph, read.weight) if node not in mine]
    if not others:
        return []
    return separate(model, read.weight, {read.module}, {node.module for node in others}, untie)


def separate(
    model: nn.Module, weight: str, mine: Collection[str], others: Collection[str], untie: bool
) -> list[tuple[str, str]]:
    """Of the modules that share a weight those in ``mine``, if they can be told from the others.

    Raises:
        Kept: they can't, or aren't to be.
    """
    held = owners(model, weight)
    leaving = [one for one in held if one[0] in mine]
    if not leaving or {one[0] for one in leaving} & set(others) or len(leaving) == len(held):
        raise Kept(f"{weight} is read by {', '.join(sorted(others))}, too")
    if not untie:
        raise Kept(f"{weight} is tied: {', '.join(sorted(others))} has it, too; untie=True gives each its own")
    return leaving


def _bias_of(model: nn.Module, read: Read) -> tuple[str, str]:
    """The bias that a linear layer adds, and its module, if that has none yet."""
    if read.bias:
        return read.bias, ""
    owner, _, attribute = read.weight.rpartition(".")
    module = model.get_submodule(
        read.module if any(o == (read.module, "weight") for o in owners(model, read.weight)) else owner
    )
    path = read.module if module is not model.get_submodule(owner) else owner
    if attribute == "weight" and _takes_a_bias(module):
        return f"{path}.bias".lstrip("."), path if module.bias is None else ""
    raise Kept(f"its bias has nowhere to go: {read.weight} has no bias, and {type(module).__name__} can't hold one")


def _takes_a_bias(module: nn.Module) -> bool:
    """Whether it adds one. ``nn.Linear`` does; another forward is asked, with a bias for the time being."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    own = module._parameters
    before, weight = own["bias"], module.weight
    x, bias = weight.new_ones(1, module.in_features), weight.new_ones(module.out_features)
    try:
        with torch.no_grad():
            own["bias"] = None
            without = module(x)
            own["bias"] = nn.Parameter(bias)
            return torch.equal(module(x), without + bias)
    except Exception:  # of a stranger's forward
        return False
    finally:
        own["bias"] = before


def refuse_unseen(model: nn.Module, graph: Graph, weights: Iterable[str]) -> None:
    """Where the readers are some of several, and others never ran (experts that no token chose), nobody knows what
    those would read.

    Raises:
        Kept: there are such.
    """
    weights = list(weights)
    paths = [name.split(".")[:-1] for name in weights]
    common = paths[0]
    for path in paths[1:]:
        apart = (i for i, (one, other) in enumerate(zip(common, path, strict=False)) if one != other)
        common = common[: next(apart, min(len(common), len(path)))]
    prefix = ".".join(common)
    beside = [f"{prefix}.{name}".lstrip(".") for name, _ in model.get_submodule(prefix).named_parameters()]
    beside = [name for name in beside if name.rpartition(".")[2] != "bias"]
    _refuse_unused(model, graph, [*beside, *(twin for name in weights for twin in twins(model, name))])


def refuse_unseen_twins(model: nn.Module, graph: Graph, weights: Iterable[str]) -> None:
    """The same for what writes: where one of a list of modules writes, the others would.

    Raises:
        Kept: some never ran.
    """
    _refuse_unused(model, graph, [twin for name in weights for twin in twins(model, name)])


def _refuse_unused(model: nn.Module, graph: Graph, names: Iterable[str]) -> None:
    used = {id(one) for name, one in model.named_parameters() if name in graph.used}
    if unseen := [name for name in names if id(model.get_parameter(name)) not in used]:
        raise Kept(f"{unseen[0]} never ran on these inputs, and may be one of several; give inputs= that reach it")


def twins(model: nn.Module, weight: str) -> list[str]:
    """The weights in the same place of the other modules of a list: those of the other experts, the other layers."""
    parts = weight.split(".")
    known = dict(model.named_parameters(remove_duplicate=False))
    found = []
    for i in range(1, len(parts)):
        holder = model.get_submodule(".".join(parts[: i - 1])) if i > 1 else model
        if isinstance(holder, nn.ModuleList | nn.ModuleDict):
            others = (".".join([*parts[: i - 1], child, *parts[i:]]) for child in holder._modules)
            found += [name for name in others if name in known]
    return found
