"""The RMS-type classes of packages other than transformers: which they are, and what patch() makes of them.

``make others`` installs the packages of others.txt, writes the table of docs/models.md anew and runs test_others.py,
which checks each class.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from catalogue import HEADS, PINS, classes, excluded, installed, instances
from torch import Tensor, nn

import rmsnorm
from rmsnorm.models.report import limits

WIDTHS = (32, 96, 128, 384)
DOCS = Path(__file__).parents[2] / "docs" / "models.md"
LABEL = "made by `make others`"


def shapes(width: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Inputs that a norm of this width may take, and the dimension that it may normalise."""
    yield from (((*more, width), -1) for more in ((7,), (2, 7), (2, HEADS, 7), (), (2, 3, HEADS, 7)))
    yield from (((2, width, *more), 1) for more in ((5, 7), (5, 7, 3), (7,), ()))
    yield from (((2, HEADS, width, 7), 2), ((2, 3, width, 5, 7), 2))


def accepted(module: nn.Module, width: int) -> list[tuple[tuple[int, ...], int]]:
    """Those of the shapes in which the module is the RMS norm of a row: f(x) = x/rms(x)·G + B, where G and B are what
    it makes of rows of ones."""
    return [(shape, axis) for shape, axis in shapes(width) if _normalises(module, shape, axis)]


def inputs_of(module: nn.Module) -> int:
    """2 if it takes a gate."""
    _, *parameters = inspect.signature(type(module).forward).parameters.values()
    return 1 + any("gate" in p.name for p in parameters[1:2])


def call(module: nn.Module, *inputs: Tensor) -> Tensor:
    """Its output; without the warnings of torch's norms of mixed types."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return module(*inputs)


def _normalises(module: nn.Module, shape: tuple[int, ...], axis: int) -> bool:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    gate = [torch.full_like(x, 2.0)] * (inputs_of(module) - 1)
    try:
        with torch.no_grad():
            up, down, got = (call(module, t, *gate) for t in (torch.ones_like(x), -torch.ones_like(x), x))
            x_hat = x.double() / x.double().square().mean(axis, keepdim=True).sqrt()
            want = x_hat * (up - down).double() / 2 + (up + down).double() / 2
            return got.shape == x.shape and torch.allclose(got.double(), want, rtol=1e-3, atol=1e-3)
    except (RuntimeError, AssertionError, ValueError, IndexError, TypeError, AttributeError):
        return False


@dataclass(frozen=True)
class Line:
    """What patch() made of one class."""

    path: str
    package: str
    meanings: tuple[str, ...]
    """Of those of its configurations and widths that were swapped."""
    types: tuple[str, ...]
    """In which all these run on our kernels."""
    reasons: tuple[str, ...]
    """Why configurations were left alone."""
    configurations: tuple[int, int]
    """How many were swapped in float32, and how many there are."""

    @property
    def swapped(self) -> bool:
        """In each configuration, in float32 at least."""
        return self.configurations[0] == self.configurations[1] > 0


@functools.cache
def line(path: str, widths: tuple[int, ...] = WIDTHS) -> Line | None:
    """Patches the class in each of its configurations; None if it is no RMS norm."""
    meanings, reasons, types, swapped, count = [], [], [], 0, 0
    for width in widths:
        for module in instances(path, width):
            if not accepted(module, width):
                continue
            count += 1
            report = rmsnorm.patch(module)
            own = [entry for entry in (*report.patched, *report.skipped) if entry.name == ""]
            if not own:
                reasons.append("it isn't asked: neither its name nor an eps says that it is a norm")
            elif own[0].reason:
                reason = own[0].reason  # an error's message has sizes, which differ from width to width
                reasons.append("it can't be probed" if reason.startswith("it can't be probed") else reason)
            else:
                swapped += "float32" in own[0].types
                meanings.append(own[0].meaning)
                types.append({name for name in own[0].types if "×" not in name})
    both = tuple(sorted(set.intersection(*types))) if types else ()
    unique = [tuple(dict.fromkeys(words)) for words in (meanings, reasons)]
    package = installed()[path.partition(".")[0]]
    return Line(path, package, unique[0], both, unique[1], (swapped, count)) if count else None


@functools.cache
def lines() -> tuple[Line, ...]:
    """Of every class that runs here and is an RMS norm."""
    return tuple(found for path in classes() if not excluded(path) and (found := line(path)))


def table() -> str:
    """The block of docs/models.md."""
    whole = [one for one in lines() if one.swapped]
    text = [
        f"{len({one.package for one in lines()})} other packages have {len(lines())} RMS-type classes that run on a "
        f"CPU; `patch` swaps {len(whole)} at widths {', '.join(map(str, WIDTHS))}.\n",
        "| package | class | meaning, or why it is left |\n|---|---|---|",
    ]
    for one in lines():
        fate = "; ".join([*(meaning + limits(one.types) for meaning in one.meanings), *one.reasons])
        text.append(f"| {one.package} {PINS[one.package]} | {one.path.partition('.')[2]} | {fate} |")
    return "\n".join(text) + "\n"


def main() -> None:
    """Writes the table into docs/models.md."""
    from rmsnorm.bench.pages import replace_block

    replace_block(DOCS, LABEL, table())


if __name__ == "__main__":
    main()
