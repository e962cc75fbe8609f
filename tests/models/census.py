"""Every RMS-type class of the installed transformers: found by reading its sources, built small, and patched.

``make census`` writes the tables of docs/models.md anew; test_census.py checks each class, and
that the tables are current.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from oracle import gains
from torch import nn

import rmsnorm
from rmsnorm.bench.pages import replace_block
from rmsnorm.models.recipes import RECIPES

SIZE = 64
DOCS = Path(__file__).parents[2] / "docs" / "models.md"
LABEL = "made by `make census`"
# By name or formula; neither is a norm of its input.
LOOK_ALIKES = {"SiLogLoss", "VoxtralRealtimeTextAdaRmsNorm"}
CLASS = re.compile(r"^( *)class (\w+)\([^)]*\):\n(?:(?:\1 .*)?\n)*", re.MULTILINE)
ROOT = re.compile(r"rsqrt|pow\(.*-0\.5\)|\.sqrt\(|F\.rms_norm\(")
MEAN_SQUARE = re.compile(r"(pow\(2\)|square\(.*\))[.,]?.*\bmean|mean\(torch\.square|square\(\)\.mean|F\.rms_norm\(")
CENTRED = re.compile(r"\bmean = |\bu = |masked|\.var\(")


@functools.cache
def names() -> tuple[tuple[str, str], ...]:
    """Module and class. Called RMSNorm, or short and with a mean square under a root in forward, not centred."""
    found = []
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for match in CLASS.finditer(file.read_text()):
            name, source = match[2], match[0]
            named = re.search(r"RMS_?Norm", name, re.IGNORECASE)
            formula = len(source) < 2600 and ROOT.search(source) and MEAN_SQUARE.search(source)
            if name not in LOOK_ALIKES and (named or (formula and not CENTRED.search(source))):
                found.append((f"transformers.models.{file.parent.name}.{file.stem}", name))
    return tuple(found)


def load(module: str, name: str) -> type[nn.Module]:
    return getattr(importlib.import_module(module), name)


def classes() -> tuple[type[nn.Module], ...]:
    return tuple(load(*where) for where in names())


# What the constructors of all classes take: the values that each parameter is tried with.
VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_size": (SIZE,),
    "dim": (SIZE,),
    "num_features": (SIZE,),
    "output_size": (SIZE,),
    "group_size": (SIZE // 4,),
    "n_groups": (1, 4),
    "norm_before_gate": (True, False),
    "with_scale": (True, False),
    "use_weight": (True, False),
    "use_bias": (False, True),
    "config": (SimpleNamespace(hidden_size=SIZE, eps=1e-6, rms_norm_eps=1e-6, hidden_act="silu", gated_norm_rank=4),),
}


def instances(cls: type[nn.Module]) -> Iterator[nn.Module]:
    """The class in each of its configurations, with random weights."""
    names = [name for name in inspect.signature(cls).parameters if name in VALUES]
    for values in product(*(VALUES[name] for name in names)):
        module = cls(**dict(zip(names, values, strict=True)))
        for tensor in module.parameters():
            tensor.data = gains(*tensor.shape, dtype=torch.float32)
        yield module.eval()


@dataclass(frozen=True)
class Line:
    """What patch() made of one class."""

    cls: type[nn.Module]
    meanings: tuple[str, ...]
    """Of its configurations."""
    reason: str
    """Why it is left alone, in whole or in half precision."""

    @property
    def name(self) -> str:
        return f"{self.cls.__module__.split('.')[-2]}.{self.cls.__name__}"


@functools.cache
def line(cls: type[nn.Module]) -> Line:
    """Patches the class in each of its configurations."""
    meanings, reasons = [], []
    for module in instances(cls):
        report = rmsnorm.patch(module)
        own = [entry for entry in (*report.patched, *report.skipped) if entry.name == ""]
        assert len(own) == 1, f"{cls.__name__} is not in the report"
        if own[0].reason:
            reasons.append(own[0].reason)
        elif set(own[0].types) >= {"float32", "bfloat16", "float16"}:
            meanings.append(own[0].meaning)
        else:
            reasons.append(f"in half precision; in float32 it is {own[0].meaning!r}")
    return Line(cls, tuple(dict.fromkeys(meanings)), "; ".join(dict.fromkeys(reasons)))


def tables() -> str:
    """The block of docs/models.md."""
    lines = [line(cls) for cls in classes()]
    swapped = [one for one in lines if not one.reason]
    text = [
        f"transformers {transformers.__version__} has {len(lines)} RMS-type classes; `patch` swaps {len(swapped)} "
        f"({100 * len(swapped) / len(lines):.1f} %).\n",
        "| meaning | formula | output | classes | |\n|---|---|---|---:|---|",
    ]
    for recipe in RECIPES.values():
        if names := [one.name for one in swapped if recipe.meaning in one.meanings]:
            cells = recipe.meaning, f"`{recipe.formula}`", recipe.output, len(names), ", ".join(names)
            text.append(f"| {' | '.join(map(str, cells))} |")
    text += ["\nLeft alone:\n", "| class | why |\n|---|---|"]
    text += [f"| {one.name} | {one.reason} |" for one in lines if one.reason]
    return "\n".join(text) + "\n"


def main() -> None:
    """Writes the tables into docs/models.md."""
    replace_block(DOCS, LABEL, tables())


if __name__ == "__main__":
    main()
