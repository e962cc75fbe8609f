"""Proves that the RMS-type classes of other packages than transformers that are swapped compute what they did before:
at four widths, in all layouts that they take, on rows of all sizes and types, with gradients; the others have reasons.

``make others`` installs the packages of others.txt and runs it; a package that isn't installed is skipped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice, product

import catalogue
import others
import pytest
import torch
from torch import Tensor, nn

import rmsnorm

pytestmark = pytest.mark.heavy
TYPES = (torch.float32, torch.bfloat16, torch.float16)
PACKAGES = sorted(catalogue.PINS)
# In eps of the coarsest type. Outputs relative to each element (to the row where a bias may cancel), as in
# test_census.py; gradients relative to the row's norm, or the weight's: theirs rounds at each of a dozen operators.
FAR = {torch.float32: 6.0, torch.bfloat16: 2.0, torch.float16: 2.0}
DIFFERENT = 0.01
GRADIENT = 8.0
# Sizes of rows: squares of the small ones are subnormal or 0 in float32, and sizes around 1e-12 tell whether a norm
# is bounded below or has an eps added. 0 is the row of zeros.
SIZES = (
    0,
    1e-30,
    1e-22,
    1e-19,
    1e-16,
    1e-14,
    1e-13,
    1e-12,
    1e-11,
    1e-10,
    1e-8,
    1e-6,
    1e-4,
    1e-3,
    0.03,
    1,
    30,
    1e3,
    1e4,
)


def of(package: str) -> list[str]:
    """The classes of one package that run here."""
    homes = [home for home, name in catalogue.installed().items() if name == package]
    if not homes:
        pytest.skip(f"{package}=={catalogue.PINS[package]} isn't installed")
    return [path for path in catalogue.classes() if path.partition(".")[0] in homes and not catalogue.excluded(path)]


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_swapped_equals_its_original(package: str) -> None:
    wrong = []
    for path in of(package):
        norms = 0
        for width in others.WIDTHS:
            for module in catalogue.instances(path, width):
                taken = others.accepted(module, width)
                norms += bool(taken)
                label = f"{path.rpartition('.')[2]}({width}, {module.options})"
                wrong += [f"{label}: {what}" for what in islice(differences(module, taken), 3)]
        assert norms, f"{path} is no RMS norm; say so in catalogue.LOOK_ALIKES"
    assert not wrong, "\n".join(wrong)


def differences(module: nn.Module, taken: list[tuple[tuple[int, ...], int]]) -> Iterator[str]:
    """Where the patched module isn't what it was."""
    theirs, ours = copy.deepcopy(module), copy.deepcopy(module)
    if not taken or not rmsnorm.patch(ours).patched:
        return
    more = others.inputs_of(module) - 1
    for x_type, w_type in product(TYPES, TYPES if [*module.parameters()] else TYPES[:1]):
        theirs.to(w_type), ours.to(w_type)
        types = f"{x_type}, weight {w_type}".replace("torch.", "")
        for shape, axis in taken:
            inputs = [rows(shape, axis, x_type, seed) for seed in range(1 + more)]
            theirs.train(), ours.train()
            if (problem := compare(theirs, ours, inputs, axis, grads=True)) and not nearer(theirs, ours, inputs):
                yield f"{shape}, {types}: {problem}"
        shape, axis = taken[-1]
        inputs = [rows(shape, axis, x_type, seed) for seed in range(1 + more)]
        theirs.eval(), ours.eval()
        if problem := compare(theirs, ours, inputs, axis, grads=False):
            yield f"{shape}, {types}, eval: {problem}"
        with torch.autocast("cpu", torch.bfloat16):
            if problem := compare(theirs, ours, inputs, axis, grads=False):
                yield f"{shape}, {types}, autocast: {problem}"
        turned = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
        if problem := compare(theirs, ours, turned, axis, grads=False):
            yield f"{shape}, {types}, turned: {problem}"


def rows(shape: tuple[int, ...], axis: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random, with rows along the axis of all sizes in turn that the type has. Gates (seed 1) are of ordinary size:
    larger ones make products that are subnormal, where what is left of them is no longer a matter of rounding."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)))
    if seed:
        return (2 * x).to(dtype)
    count = x.numel() // shape[axis]
    order = torch.arange(count) * 7 % len(SIZES) if count > 1 else torch.tensor([SIZES.index(1)])
    sizes = torch.tensor(SIZES)[order].view(x.movedim(axis, -1).shape[:-1])
    return (x.movedim(axis, -1) * sizes[..., None]).movedim(-1, axis).contiguous().to(dtype)


def compare(theirs: nn.Module, ours: nn.Module, inputs: list[Tensor], axis: int, grads: bool) -> str:
    """What differs beyond rounding; empty if nothing does."""
    leaves = [[x.clone(memory_format=torch.preserve_format).requires_grad_(grads) for x in inputs] for _ in range(2)]
    try:
        a = others.call(theirs, *leaves[0])
    except (RuntimeError, TypeError):
        return ""  # it doesn't take these types
    b = others.call(ours, *leaves[1])
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{b.dtype} {tuple(b.shape)} instead of {a.dtype} {tuple(a.shape)}"
    coarse = max((*inputs, a), key=lambda t: torch.finfo(t.dtype).eps).dtype
    first, second = a.detach().double(), b.detach().double()
    if not torch.equal(first.isfinite(), second.isfinite()):
        return "one is finite where the other isn't"
    size = first.abs()
    if adds_bias(theirs, inputs):
        size = size.amax(axis, keepdim=True).expand_as(size)
    far = apart(first, second, size, coarse, a.dtype)
    share = float((~torch.isclose(first, second, rtol=0.0, atol=0.0, equal_nan=True)).double().mean())
    if far > FAR[coarse] or (coarse is not torch.float32 and share > DIFFERENT):
        return f"{far:.3g} eps apart, {100 * share:.2g} % not identical"
    return gradients(theirs, ours, leaves, (a, b), axis) if grads else ""


def gradients(
    theirs: nn.Module, ours: nn.Module, leaves: list[list[Tensor]], outputs: tuple[Tensor, Tensor], axis: int
) -> str:
    """Which gradient differs, of those that are in the range of the type."""
    coarse = max((*leaves[0], *ours.parameters(), outputs[0]), key=lambda t: torch.finfo(t.dtype).eps).dtype
    grad = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(9)).to(outputs[0].dtype) / 8
    found = []
    for module, inputs, output in zip((theirs, ours), leaves, outputs, strict=True):
        wanted = [*inputs, *module.parameters()]
        found.append(torch.autograd.grad(output, wanted, grad, allow_unused=True))
    for index, (one, other) in enumerate(zip(*found, strict=True)):
        if one is None or other is None:
            if one is not other and (one if other is None else other).abs().sum() > 0:
                return f"gradient {index} is missing"
            continue
        dimension = axis if index < len(leaves[0]) else None
        first, second = one.double(), other.double()
        seen = first.isfinite()
        if not second[seen].isfinite().all():
            return f"gradient {index} isn't finite"
        # What overflows counts as the largest number: a 0 beside it is a rounding. A weight's gradient is a sum, which
        # may cancel; each of its terms is rounded where it is computed, so their size counts.
        size = first.where(seen, torch.finfo(one.dtype).max).norm(dim=dimension, keepdim=dimension is not None)
        if dimension is None:
            terms = grad.double() * slope(theirs, index - len(leaves[0]), leaves[0], outputs[0])
            size = size.maximum(terms[terms.isfinite()].norm())
        first, second = first.where(seen, 0.0), second.where(seen, 0.0)
        error = (first - second).norm(dim=dimension, keepdim=dimension is not None)
        far = apart(error, torch.zeros_like(error), size, coarse, one.dtype)
        if far > GRADIENT:
            return f"gradient {index} is {far:.3g} eps apart"
    return ""


def adds_bias(theirs: nn.Module, inputs: list[Tensor]) -> bool:
    """Whether something is added behind the norm, whatever its name is: rows of zeros don't stay zeros. There the sum
    may cancel, and errors are relative to what was added."""
    with torch.no_grad():
        zeros = others.call(theirs, torch.zeros_like(inputs[0]), *inputs[1:])
    return bool((zeros[zeros.isfinite()] != 0).any())


def slope(theirs: nn.Module, index: int, inputs: list[Tensor], output: Tensor) -> Tensor:
    """What a weight is multiplied with: how much the output grows when it grows by one. Not the output itself, which
    is small where the weight is: the only weight of some of these norms is 0.01 here."""
    raised = copy.deepcopy(theirs)
    with torch.no_grad():
        [*raised.parameters()][index].add_(1.0)
        return others.call(raised, *inputs).double() - output.detach().double()


def apart(first: Tensor, second: Tensor, size: Tensor, coarse: torch.dtype, dtype: torch.dtype) -> float:
    """The largest difference in eps of the coarse type, relative to the sizes; subnormal ones count as normal."""
    floor = max(torch.finfo(dtype).smallest_normal, torch.finfo(torch.float32).smallest_normal)
    error = ((first - second).abs() / (size.clamp_min(floor) * torch.finfo(coarse).eps))[first.isfinite()]
    return float(error.max()) if error.numel() else 0.0


def nearer(theirs: nn.Module, ours: nn.Module, inputs: list[Tensor]) -> bool:
    """Whether ours, with its gradients, is no farther from theirs in float64 than theirs is in float32, where
    squares of small rows are subnormal."""
    if any(t.dtype is not torch.float32 for t in (*inputs, *theirs.parameters())):
        return False
    found = []
    for module, dtype in ((copy.deepcopy(theirs).double(), torch.float64), (theirs, None), (ours, None)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        output = others.call(module, *leaves)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output.dtype) / 8
        wanted = [*leaves, *module.parameters()]
        found.append([output.detach(), *torch.autograd.grad(output, wanted, grad, allow_unused=True)])
    for true, one, other in zip(*found, strict=True):
        if true is not None and one is not None and other is not None:
            seen = one.isfinite() & other.isfinite() & true.isfinite()
            errors = [(true - t.double())[seen].norm() for t in (one, other)]
            if errors[1] > errors[0] and errors[1] > GRADIENT * torch.finfo(torch.float32).eps * true[seen].norm():
                return False
    return True


@pytest.mark.skipif(not catalogue.installed().keys(), reason="no package of others.txt is installed")
def test_what_is_left_has_a_reason() -> None:
    for line in others.lines():
        assert line.swapped or line.reasons or "float32" not in line.types, line


@pytest.mark.skipif(len(catalogue.installed()) < len(PACKAGES), reason="not all packages of others.txt are installed")
def test_there_are_enough_classes_and_the_table_in_the_docs_is_current() -> None:
    """Otherwise: ``make others``."""
    assert len(others.lines()) >= 150, "the search has lost classes"
    assert len({line.package for line in others.lines()}) >= 60
    assert sum(line.swapped for line in others.lines()) >= 148, "patch() has lost classes"
    assert f"<!-- {others.LABEL} -->\n{others.table()}<!-- end -->\n" in others.DOCS.read_text()
