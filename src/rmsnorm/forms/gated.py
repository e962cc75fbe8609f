"""The only file with the gated norm that users call: the function and the layer. ``served.py`` serves it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _arguments, _everyday, functional, module, reference
from .._shown import shown
from . import calls, gated_ops
from .served import Served

ACTIVATIONS = {"silu": True, "sigmoid": False}
_served = Served(gated_ops.GATED_RMS_NORM)


def gated_rms_norm(
    input: Tensor,
    gate: Tensor | None,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,  # torch.jit.script stops here, and shows this line: record with torch.jit.trace instead
    activation: str = "silu",
    norm_before_gate: bool = True,
    group_size: int | None = None,
    offset: float = 0.0,
    casting_mode: str = "torch",
) -> Tensor:
    r"""RMS normalisation with a gate, as in Mamba-2 and in gated linear attention, in one pass.

        norm_before_gate=True     y = x / rms(x) · (offset + weight) · a(gate)
        norm_before_gate=False    y = z / rms(z) · (offset + weight)      with z = x · a(gate)

    with ``rms(x) = sqrt(mean(x²) + eps)``. Gate and product are computed in fp32 (fp64 for fp64 inputs).

    | model | options |
    |---|---|
    | Falcon-H1 | ``norm_before_gate=config.mamba_norm_before_gate, group_size=…`` |
    | Mamba-2, Bamba, Zamba2 | ``norm_before_gate=False, casting_mode="llama", group_size=…`` |
    | Qwen3-Next, Qwen3.5 | ``casting_mode="llama"`` |
    | Kimi Linear | ``activation="sigmoid"`` |

    Args:
        input: ``[*, *normalized_shape]``, of a real floating type. Any strides.
        gate: of the shape of ``input``, in any real floating type; or None for no gate.
        normalized_shape, weight, eps, offset: as in :func:`rmsnorm.rms_norm`.
        activation: ``"silu"``, ``a(g) = g / (1 + exp(-g))``, or ``"sigmoid"``, ``a(g) = 1 / (1 + exp(-g))``.
        norm_before_gate: whether the gate is applied to the norm's output, or to its input.
        group_size: each group of so many elements of the last dimension is normalised for itself; the weight still
            has the whole dimension. It must divide the last dimension, the only normalised one then.
        casting_mode: ``"torch"`` rounds once, to the input's type. ``"llama"`` rounds the normalised value to the
            input's type, then its product with the weight, and, if a gate follows, that product too.

    Returns:
        A contiguous tensor of the shape and dtype of ``input``. With ``casting_mode="llama"``, a wider weight and no
        gate behind the norm, the promoted dtype.

    Raises:
        RuntimeError: as :func:`rmsnorm.rms_norm`; a gate of another shape (it is not broadcast) or device; complex
            types; a group size that doesn't divide the last dimension.
        ValueError: an unknown casting mode or activation.

    Examples:
        >>> gated_rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 100.0]), 2, eps=0.0, activation="sigmoid")
        tensor([0.4243, 1.1314])

    Source: Dao & Gu 2024, arXiv 2405.21060 (the norm of Mamba-2); Zhang & Sennrich 2019, arXiv 1910.07467.
    """
    try:
        if group_size is None:
            tensors, more = (input, gate, weight), (norm_before_gate, ACTIVATIONS[activation])
            output = calls.everyday_norm(_served, tensors, normalized_shape, eps, offset, casting_mode, *more)
            if output is not None:
                return output
    except (KeyError, TypeError):
        pass
    if has_torch_function_variadic(input, gate, weight) and _arguments.are_objects(input, gate, weight):
        given = _arguments.given(activation=(activation, "silu"), norm_before_gate=(norm_before_gate, True))
        given |= _arguments.given(group_size=(group_size, None), offset=(offset, 0.0))
        given |= _arguments.given(casting_mode=(casting_mode, "torch"))
        arguments = input, gate, normalized_shape
        return handle_torch_function(gated_rms_norm, (input, gate, weight), *arguments, weight=weight, eps=eps, **given)
    dims, eps, round_first, native = functional._resolve(
        "gated_rms_norm", input, normalized_shape, weight, eps, casting_mode
    )
    _arguments.check_one_of("gated_rms_norm", "activation", activation, ACTIVATIONS)
    silu = ACTIVATIONS[activation]
    if type(offset) is not float:
        offset = _arguments.as_number("gated_rms_norm", "offset", offset)
    if isinstance(group_size, Tensor) and torch._C._get_tracing_state() is not None:  # to torch.jit.trace a size is one
        group_size = int(group_size)
    _check(input, gate, weight, dims, group_size)
    if not eps < 0 and (ranks := _everyday.distributed(input, gate, weight)):
        gating = (activation, silu, norm_before_gate, group_size)
        return ranks.gated_rms_norm(gated_rms_norm, input, gate, weight, dims, eps, offset, casting_mode, *gating)
    if group_size is not None:
        groups = (-1, group_size)
        gate = gate if gate is None else gate.unflatten(-1, groups)
        weight = weight if weight is None else weight.unflatten(-1, groups)
        input = input.unflatten(-1, groups)
    if gate is None:
        shape = input.shape[input.dim() - dims :]
        output = functional.rms_norm(input, shape, weight, eps, offset=offset, casting_mode=casting_mode)
    elif eps < 0:  # added, as any other; to the operators it would be a floor
        options = (dims, 0.0, offset, round_first, norm_before_gate, silu)
        output = gated_ops.gated_rms_norm(input, gate, weight, *options, reference.plus(eps))[0]
    else:
        if gate.dtype is not input.dtype and reference.promoted(gate.dtype, input.dtype) is input.dtype:
            gate = gate.to(input.dtype)  # Mamba-2's scan leaves fp32 beside a half gate
        output = _served(native, input, gate, weight, dims, eps, offset, round_first, norm_before_gate, silu)
    return output if group_size is None else output.flatten(-2)


class GatedRMSNorm(module.RMSNorm):
    r"""The layer of :func:`rmsnorm.gated_rms_norm`: RMS normalisation with a gate, before or after it.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype, offset, casting_mode: as in :class:`rmsnorm.RMSNorm`.
        activation, norm_before_gate, group_size: as in :func:`rmsnorm.gated_rms_norm`.

    Shape:
        ``[*, *normalized_shape]``, and the same for the gate, to the same. The gate may be left out: ``layer(x)`` is
        then the norm alone, in the groups, offset and casting mode of the layer, and ``activation`` means nothing.

    The state_dict has one ``weight``, as those of Mamba-2, Qwen3-Next and their like.

    Examples:
        >>> layer = GatedRMSNorm(2, eps=0.0, activation="sigmoid")
        >>> layer(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 100.0])).detach()
        tensor([0.4243, 1.1314])
        >>> layer(torch.tensor([3.0, 4.0])).detach()  # no gate
        tensor([0.8485, 1.1314])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "silu",
        norm_before_gate: bool = True,
        group_size: int | None = None,
        offset: float = 0.0,
        casting_mode: str = "torch",
    ) -> None:
        _arguments.check_one_of("GatedRMSNorm", "activation", activation, ACTIVATIONS)
        super().__init__(
            normalized_shape, eps, elementwise_affine, device, dtype, offset=offset, casting_mode=casting_mode
        )
        self.activation = activation
        self.norm_before_gate = norm_before_gate
        self.group_size = group_size

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalises ``x``, gated; without a gate, or with None for it, as :class:`rmsnorm.RMSNorm` does."""
        return gated_rms_norm(
            x,
            gate,
            self.normalized_shape,
            self.weight,
            self.eps,
            activation=self.activation,
            norm_before_gate=self.norm_before_gate,
            group_size=self.group_size,
            offset=self.offset,
            casting_mode=self.casting_mode,
        )

    def extra_repr(self) -> str:
        """The text of RMSNorm, and the gate's options."""
        text = f"{super().extra_repr()}, activation={self.activation!r}, norm_before_gate={self.norm_before_gate}"
        return text if self.group_size is None else f"{text}, group_size={self.group_size}"


def _check(input: Tensor, gate: Tensor | None, weight: Tensor | None, dims: int, group_size: int | None) -> None:
    if not (gate is None or isinstance(gate, Tensor)):
        _arguments.check_tensors("gated_rms_norm", gate=gate)
    _arguments.check_dense("gated_rms_norm", gate=gate)
    if input.is_complex() or (gate is not None and not gate.is_floating_point()):
        raise RuntimeError(
            f"gated_rms_norm: input and gate must be of a real floating type, but are {input.dtype} and "
            f"{None if gate is None else gate.dtype}; convert them, e.g. gate.float()"
        )
    given = {label: t for label, t in (("input", input), ("gate", gate), ("weight", weight)) if t is not None}
    _arguments.check_real("gated_rms_norm", **given)
    if gate is not None and (gate.shape != input.shape or gate.device != input.device):
        raise RuntimeError(
            f"gated_rms_norm: gate must have the shape and device of input, {tuple(input.shape)} on {input.device}, "
            f"but is {tuple(gate.shape)} on {gate.device}; expand it first if broadcasting is meant"
        )
    numberless = isinstance(group_size, (str, float, complex, list, tuple, Tensor))
    if group_size is not None and (numberless or dims != 1 or group_size < 1 or input.shape[-1] % group_size):
        raise RuntimeError(
            f"gated_rms_norm: group_size must divide the last dimension of input, {input.shape[-1]}, which must be the "
            f"only normalised one, but is {shown(group_size)}, with normalized_shape = {list(input.shape[-dims:])}"
        )
