"""The only file with the norm that a sample or a token modulates (AdaLN), and the gated add, as users call them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _arguments, _everyday, functional
from . import calls, modulated_ops
from .layer_norm import layer_norm
from .served import Served

STATISTICS = {"rms": False, "layer": True}
_EPS = 1e-5  # LayerNorm's own


def _centre(input: Tensor, dims: int, eps: float) -> tuple[Tensor, None, None]:
    """The same of LayerNorm."""
    return layer_norm(input, tuple(input.shape[input.dim() - dims :]), None, None, eps), None, None


_added = Served(modulated_ops.GATED_ADD)
_served = Served(modulated_ops.MODULATED_NORM, calls.plain_norm, _added, centre=_centre)
_straight, _added_straight, ROUND_FIRST = _served.straight, _added.straight, functional.ROUND_FIRST  # found sooner here


def modulated_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,  # torch.jit.script stops here, and shows this line: record with torch.jit.trace instead
    scale: Tensor,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    statistic: str = "rms",
    offset: float = 0.0,
    casting_mode: str = "torch",
) -> Any:
    r"""A norm whose output is scaled and shifted by numbers that a sample or a token brings along (AdaLN), in one pass.

        s = residual + gate · input        (or s = input)
        y = norm(s) · (1 + scale) + shift

    as diffusion transformers have it (DiT, PixArt, Stable Diffusion 3, Flux, Wan). Bits, in both casting modes: those
    of :func:`rmsnorm.gated_add`, and of a norm of that sum, whether they are called one after the other or here.

    Args:
        input: ``[*, *normalized_shape]``, of a real floating type. Any strides.
        normalized_shape, weight, eps, offset: as in :func:`rmsnorm.rms_norm`; eps must not be negative, and None means
            1e-5 for LayerNorm. A weight is for the statistic ``"rms"`` alone, and two passes.
        scale, shift, gate: ``[B, D]``, a row for each sample of ``[B, *, D]``; or of as many dimensions as input, with
            sizes of 1 where rows share them: ``[B, 1, D]``, ``[B, N, D]``. Chunks of a wider tensor are read in place.
        residual: of the shape and dtype of ``input``.
        statistic: ``"rms"``, or ``"layer"``: LayerNorm without weight and bias.
        casting_mode: ``"torch"`` computes in fp32 (fp64 for fp64) and rounds s and y once, to the dtype of ``input``;
            scale, shift and gate may be fp32 beside a half type. ``"llama"`` rounds after every step, as models in
            eager mode do: the norm, ``1 + scale``, the product, the sum; types are promoted as torch does.

    Returns:
        y; with a residual ``(y, s)``. Contiguous.

    Raises:
        RuntimeError: as :func:`rmsnorm.rms_norm`; modulations that don't fit; a gate without a residual; a weight with
            the statistic ``"layer"``.
        ValueError: an unknown statistic or casting mode, a negative eps.

    Examples:
        >>> x, scale = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[0.0, 1.0]])
        >>> modulated_norm(x, 2, eps=0.0, scale=scale, shift=torch.ones(1, 2))
        tensor([[[1.8485, 3.2627]]])

    Source: Peebles & Xie 2022, arXiv 2212.09748 (adaLN-Zero); Perez et al. 2017, arXiv 1709.07871.
    """
    name, layer = "modulated_norm", STATISTICS.get(statistic) if isinstance(statistic, str) else None
    eps = _EPS if eps is None and layer else eps
    everyday = type(input) is Tensor and not has_torch_function_variadic(input, scale, shift, gate)
    if everyday and weight is None and layer is not None and (residual is not None or gate is None):
        try:
            if not is_dynamo_compiling():
                given = input, residual, gate, scale, shift, None, eps, offset, ROUND_FIRST[casting_mode], layer
                found = _straight(normalized_shape, *given)
                if found is not None:
                    return found[0] if residual is None else found
            dims = 1 if type(normalized_shape) is int else len(normalized_shape)  # type: ignore[arg-type]
            along = input, residual, *(calls.along(m, input, dims) for m in (gate, scale, shift)), None
            found = calls.everyday_norm(_served, along, normalized_shape, eps, offset, casting_mode, layer)
            if found is not None:
                return found[0] if residual is None else found
        except (RuntimeError, AttributeError, TypeError, IndexError, KeyError, ValueError):
            pass
    _arguments.check_one_of(name, "statistic", statistic, STATISTICS)
    if layer and weight is not None:
        raise RuntimeError(
            f"{name}: LayerNorm is without weight and bias here, as in AdaLN, but there is a weight; call "
            "layer_norm, then scale and shift its output"
        )
    if gate is not None and residual is None:
        raise RuntimeError(f"{name}: there is a gate, which scales what is added to a residual, but no residual")
    if scale is None:
        raise RuntimeError(f"{name}: scale must be a tensor, but is None; without one it is a norm, as rms_norm")
    found = calls.call(
        _served,
        modulated_norm,
        {"input": input, "residual": residual, "gate": gate, "scale": scale, "shift": shift},
        normalized_shape,
        {"weight": weight},
        eps,
        {
            "statistic": (statistic, "rms"),
            "offset": (offset, 0.0),
            "casting_mode": (casting_mode, "torch"),
        },
        (layer,),
        by_name=("residual", "gate", "scale", "shift"),
        pick=0 if residual is None else slice(2),
    )
    return found[0] if residual is None and isinstance(found, tuple) else found


def gated_add(
    input: Tensor,
    residual: Tensor,
    gate: Tensor,
    *,  # torch.jit.script stops here, and shows this line: record with torch.jit.trace instead
    casting_mode: str = "torch",
) -> Tensor:
    r"""What stands between two norms of a diffusion transformer: ``s = residual + gate · input``, in one pass.

    Args:
        input, residual: ``[*, D]``, of one shape.
        gate, casting_mode: as in :func:`rmsnorm.modulated_norm`; ``"llama"`` rounds the product, too.

    Returns:
        The sum, contiguous.

    Raises:
        RuntimeError: tensors that don't fit, or of no real floating type.
        ValueError: an unknown casting mode.

    Examples:
        >>> gated_add(torch.ones(1, 2, 2), torch.zeros(1, 2, 2), torch.tensor([[2.0, 3.0]]))
        tensor([[[2., 3.],
                 [2., 3.]]])

    Source: Peebles & Xie 2022, arXiv 2212.09748.
    """
    name, tensors = "gated_add", (input, residual, gate)
    if type(input) is Tensor and not has_torch_function_variadic(input, gate):
        try:
            if not is_dynamo_compiling():
                found = _added_straight(None, input, residual, gate, ROUND_FIRST[casting_mode])
                if found is not None:
                    return found
            along = input, residual, calls.along(gate, input, 1)
            found = calls.everyday(_added, along, (ROUND_FIRST[casting_mode],))
            if found is not None:
                return found
        except (RuntimeError, AttributeError, TypeError, IndexError, KeyError, ValueError):
            pass
    if has_torch_function_variadic(*tensors) and _arguments.are_objects(*tensors):
        named = _arguments.given(casting_mode=(casting_mode, "torch"))
        return handle_torch_function(gated_add, tensors, *tensors, **named)
    _arguments.check_tensors(name, input=input, residual=residual)
    if gate is None:
        raise TypeError(f"{name}: gate must be a torch.Tensor, but is None; without one it is input + residual")
    _arguments.check_dense(name, input=input)
    _, _, round_first, native = functional._resolve(name, input, input.shape[-1:], None, 0.0, casting_mode)
    rows = calls.check_rows(name, {"input": input, "residual": residual, "gate": gate}, 1, ("gate",))
    if ranks := _everyday.distributed(*rows.values()):

        def local(*tensors: Tensor) -> Tensor:
            return gated_add(*tensors, casting_mode=casting_mode)

        return ranks.normalise(name, local, None, 0, rows, {}, shared=("gate",))
    return _added(native, *calls.spread(rows, 1, ("gate",)).values(), round_first)
