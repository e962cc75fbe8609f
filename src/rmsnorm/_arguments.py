"""The only file that words the errors of wrong arguments: what was wanted, what came, and what to pass instead.

An everyday call that is right never comes here.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, NoReturn, cast

import torch
from torch import SymFloat, SymInt, Tensor

from . import reference
from ._shown import described, shown, sizes

ROUND_FIRST = {"torch": False, "llama": True}
"""The casting modes, and whether each rounds the normalised value before the gain."""
MEMORY = ("lean",)
"""What may be kept for backward instead of the input: the output."""
EPS_DOUBLE = torch.finfo(torch.float64).eps
EPS = torch.finfo(torch.float32).eps
NATIVE_TYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
_OPTIONAL = frozenset({"weight", "bias", "gate", "out"})


def check_tensors(name: str, **tensors: object) -> None:
    """Raises TypeError for the first argument that is no tensor, and isn't None where it may be."""
    for label, value in tensors.items():
        if isinstance(value, Tensor) or (value is None and label in _OPTIONAL):
            continue
        wanted = "a torch.Tensor or None" if label in _OPTIONAL else "a torch.Tensor"
        raise TypeError(f"{name}: {label} must be {wanted}, but is {described(value)}; {_instead(label, value)}")


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements have places by sizes and strides, or it is nested as torch's newer ones are."""
    plain = tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized)
    return plain or tensor.layout is torch.jagged


def check_dense(name: str, **tensors: Tensor | None) -> None:
    """Raises NotImplementedError for the first that isn't; torch's own words would be of whatever is asked first."""
    for label, tensor in tensors.items():
        if tensor is None or is_dense(tensor):
            continue
        came, instead = f"of layout {tensor.layout}", f"{label}.to_dense()"
        if tensor.is_quantized:
            came, instead = "quantised", f"{label}.dequantize()"
        elif tensor.is_nested:
            came, instead = (
                "an older nested tensor",
                f"torch.nested.as_nested_tensor({label}.unbind(), layout=torch.jagged)",
            )
        raise NotImplementedError(f"{name}: {label} must be dense, but is {came}; convert it, e.g. {instead}")


def as_number(name: str, label: str, value: Any) -> Any:
    """``value`` as a float; None, and what torch has for one (a tensor of one element, a symbol), as it is.

    TypeError for what is no real number, or, as in torch, has a gradient that nobody would find; OverflowError for one
    beyond all floats.
    """
    if value is None or isinstance(value, (float, SymInt, SymFloat)):
        return value
    came, instead = _came(value), f"pass a number, e.g. {'0.5' if label == 'partial' else '1e-6'}"
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.requires_grad:
            return value
        if value.numel() == 1:
            came, instead = "a tensor that requires grad, and has none here", f"pass {label}.item()"
    elif hasattr(type(value), "__float__"):
        try:
            return float(value)
        except TypeError:  # an array of several
            pass
        except OverflowError:
            words = f"{name}: {label} must be a float, but is {came} beyond all of them; {instead}"
            raise OverflowError(words) from None
    raise TypeError(f"{name}: {label} must be a float, but is {came}; {instead}")


def as_shape(name: str, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """``normalized_shape`` as a tuple; TypeError for what is neither an int nor several."""
    if isinstance(normalized_shape, (int, SymInt)):
        return (normalized_shape,)
    shape: Any = None
    if not isinstance(normalized_shape, (str, bytes)):
        try:
            shape = tuple(normalized_shape)
        except TypeError:  # numpy's ints have no elements, nor do tensors with one number
            with suppress(TypeError):
                shape = (operator.index(cast(Any, normalized_shape)),)
    if shape is None or not all(map(_is_size, shape)):
        weight = ", and a weight behind it" if isinstance(normalized_shape, Tensor) and normalized_shape.ndim else ""
        raise TypeError(
            f"{name}: normalized_shape must be an int or a sequence of ints, but is {_came(normalized_shape)}; pass "
            f"the size of input's last dimension, input.shape[-1], or of several, e.g. input.shape[-2:]{weight}"
        )
    return shape


def _is_size(size: object) -> bool:
    """Whether an element of a shape may be one: no text, and of tensors (what torch.jit.trace has) whole numbers."""
    if isinstance(size, Tensor):
        return not (size.ndim or size.is_floating_point() or size.is_complex())
    return not isinstance(size, (str, bytes))


def raise_shape(
    name: str, input: Tensor, shape: tuple[int, ...], weight: Tensor | None, label: str = "weight"
) -> NoReturn:
    """Says which sizes don't fit: those of the input, or else the weight's."""
    # The first sentences are torch's own, word for word: code that matches them keeps working.
    if not shape:
        raise RuntimeError(f"{name}: Expected normalized_shape to be at least 1-dimensional, but got []")
    wanted = sizes(shape)
    if input.shape[-len(shape) :] != shape:
        raise RuntimeError(
            f"{name}: Given normalized_shape={wanted}, expected input with shape [*, {wanted[1:]}, but got input of "
            f"size {list(input.shape)}; normalized_shape must be the sizes of the last dimensions of input"
        )
    assert weight is not None
    raise RuntimeError(
        f"{name}: Expected {label} to be of same shape as normalized_shape, but got {label} of shape "
        f"{list(weight.shape)} and normalized_shape = {wanted}; reshape the {label} to {wanted}, or, for "
        f"one of its own per head or group, to more of the last sizes of input, {list(input.shape)}"
    )


def resolve(
    name: str,
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    casting_mode: str,
    memory: str | None = None,
    label: str = "weight",
) -> tuple[int, float, bool, bool]:
    """Checks what all functions share; returns ``(dims, eps, round_first, native)``. ``label`` is what the caller calls
    the weight.

    ``native`` is False for types that no kernel has: the reference serves them, with torch's own autograd.
    """
    if not isinstance(input, Tensor) or not (weight is None or isinstance(weight, Tensor)):
        check_tensors(name, input=input, weight=weight)
    check_dense(name, **{"input": input, label: weight})
    shape = as_shape(name, normalized_shape)
    dims = len(shape)
    if not dims or input.shape[-dims:] != shape:
        raise_shape(name, input, shape, None)
    if weight is not None and not reference.spans(weight, input, dims):
        raise_shape(name, input, shape, weight, label)
    check_one_of(name, "casting_mode", casting_mode, ROUND_FIRST)
    if memory is not None:
        check_one_of(name, "memory", memory, MEMORY)
    round_first = ROUND_FIRST[casting_mode]
    dtype = input.dtype
    native = dtype in NATIVE_TYPES if weight is None or weight.dtype is dtype else have_kernel(dtype, weight.dtype)
    if weight is not None and weight.device != input.device:
        raise RuntimeError(
            f"{name}: input is on {input.device} and {label} on {weight.device}; move one of them, "
            f"e.g. {label}.to({str(input.device)!r})"
        )
    if not native:
        check_floating(name, input=input, **{label: weight})
    if eps is None:
        eps = EPS_DOUBLE if dtype is torch.float64 or dtype is torch.complex128 else EPS
    elif type(eps) is not float:
        eps = as_number(name, "eps", eps)
    return dims, eps, round_first, native


def have_kernel(input: torch.dtype, *others: torch.dtype) -> bool:
    """Whether a kernel has rows of one type beside weights of the others: fp64 ones of narrower inputs would need fp64
    arithmetic throughout."""
    return input in NATIVE_TYPES and all(
        other in NATIVE_TYPES and (other is not torch.float64 or input is torch.float64) for other in others
    )


def check_floating(name: str, **tensors: Tensor | None) -> None:
    """Raises torch's own NotImplementedError, which is a RuntimeError, for types that have no fractions, or in which
    torch doesn't compute: those of 8 bits and less."""
    for label, tensor in tensors.items():
        if tensor is not None and not (is_real(tensor) or tensor.is_complex()):
            wanted = "at least 16 bits" if tensor.is_floating_point() else "a floating or complex type"
            raise NotImplementedError(
                f"{name}: {label} must be of {wanted}, but is {tensor.dtype} (shape {list(tensor.shape)}); convert it, "
                f"e.g. {label}.float()"
            )


def is_real(tensor: Tensor) -> bool:
    """Whether it is of a real floating type in which torch computes."""
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1


def check_real(name: str, **tensors: Tensor) -> None:
    """Raises RuntimeError for types that forms of the norm don't know."""
    for label, tensor in tensors.items():
        if not is_real(tensor):
            width = " of at least 16 bits" if tensor.is_floating_point() else ""
            raise RuntimeError(
                f"{name}: {label} must be of a real floating type{width}, but is {tensor.dtype}; convert it, e.g. "
                f"{label}.float()"
            )


def given(**options: tuple[Any, Any]) -> dict[str, Any]:
    """Those that aren't their defaults: who overrides torch's functions knows torch's arguments."""
    asked = {name: value for name, (value, default) in options.items() if value is not default}
    # What stands for a value in a graph that is being recorded can't be compared.
    return {k: v for k, v in asked.items() if isinstance(v, torch.fx.Proxy) or v != options[k][1]}


def are_objects(*values: object) -> bool:
    """Whether none is a class, which has ``__torch_function__``, too, and is nobody's argument."""
    return not any(isinstance(value, type) for value in values)


def check_one_of(name: str, label: str, value: object, known: Iterable[str]) -> None:
    """Raises ValueError for a choice that doesn't exist."""
    if not isinstance(value, str) or value not in known:
        choices = ", ".join(map(repr, known))
        raise ValueError(f"{name}: unknown {label} {shown(value)}; choose one of {choices}")


def _came(value: object) -> str:
    """The same, but of a tensor its shape: one of several numbers stands where a number should, or sizes."""
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) and value.ndim else described(value)


def _instead(label: str, value: object) -> str:
    if type(value).__module__ == "numpy" and hasattr(value, "ndim"):
        return f"pass torch.from_numpy({label})" if value.ndim else f"pass torch.tensor({label})"
    if label == "out":
        return "pass a tensor to write to, e.g. torch.empty_like(input)"
    if isinstance(value, (list, tuple, int, float, complex)):
        return f"pass torch.tensor({label})"
    return "pass a tensor"
