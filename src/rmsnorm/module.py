"""The only file with a layer: it owns the parameter and remembers the options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import _arguments, functional

_as_objects, _ROUND_FIRST = functional._as_objects, functional.ROUND_FIRST  # found sooner here


class RMSNorm(torch.nn.RMSNorm):
    r"""Root mean square normalisation layer; a drop-in for ``torch.nn.RMSNorm`` (and a subclass of it).

        y = x / sqrt(mean(x²) + eps) · (offset + weight)

    Args:
        normalized_shape: sizes of the last dimensions to normalise over; an int means the last one.
        eps: see :func:`rmsnorm.rms_norm`. None means the machine epsilon of the accumulation type.
        elementwise_affine: False for a layer without weight.
        device, dtype: of the weight.
        offset: added to the weight in fp32. The weight starts at ``1 - offset``, so a fresh layer has gain 1
            (Gemma's ``1 + weight`` starts at 0).
        casting_mode: ``"torch"`` or ``"llama"``; see :func:`rmsnorm.rms_norm`.
        memory: ``"lean"`` keeps the output for backward instead of the input; see :func:`rmsnorm.rms_norm`.

    Shape:
        ``[*, *normalized_shape]`` to the same. ``forward(x, residual)`` returns ``(output, x + residual)``.

    The state_dict is torch's: one ``weight``, both ways.

    Examples:
        >>> layer = RMSNorm(4, eps=0.0)
        >>> layer(torch.tensor([0.1, 0.1, 0.2, 0.3])).detach()
        tensor([0.5164, 0.5164, 1.0328, 1.5492])
        >>> layer.load_state_dict(torch.nn.RMSNorm(4).state_dict())
        <All keys matched successfully>
    """

    # Class-level defaults: pickles of torch's layer and layers whose class is swapped in place need no migration.
    offset: float = 0.0
    casting_mode: str = "torch"
    memory: str | None = None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        offset: float = 0.0,
        casting_mode: str = "torch",
        memory: str | None = None,
    ) -> None:
        _arguments.check_one_of("RMSNorm", "casting_mode", casting_mode, functional.ROUND_FIRST)
        if memory is not None:
            _arguments.check_one_of("RMSNorm", "memory", memory, functional.MEMORY)
            self.memory = memory
        for label, value in (("eps", eps), ("offset", offset)):
            _arguments.as_number(type(self).__name__, label, value)
        self.offset = offset
        self.casting_mode = casting_mode
        super().__init__(
            _arguments.as_shape(type(self).__name__, normalized_shape), eps, elementwise_affine, device, dtype
        )

    def reset_parameters(self) -> None:
        """Sets the weight so that the gain ``offset + weight`` is 1."""
        if self.elementwise_affine:
            torch.nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        """Normalises ``x``; with a residual, returns ``(output, x + residual)``."""
        # nn.Module looks for parameters in Python, 0.4 µs, unless one knows where they lie.
        weight = self._parameters.get("weight")
        if weight is None:  # there is none, or it is computed
            weight = self.weight
        if residual is None:
            # Asked here, too: a call with names, of a function that takes further ones, is 0.03 of a recorded one.
            if not is_dynamo_compiling():
                try:
                    eps, offset, first, memory = self.eps, self.offset, _ROUND_FIRST[self.casting_mode], self.memory
                    y = _as_objects(0, self.normalized_shape, eps, offset, first, None, memory, None, x, None, weight)
                    if y is not None:
                        return y
                except (RuntimeError, KeyError):
                    pass  # served, or worded, the long way
            return functional.rms_norm(
                x,
                self.normalized_shape,
                weight,
                self.eps,
                offset=self.offset,
                casting_mode=self.casting_mode,
                memory=self.memory,
            )
        norm = _either if isinstance(residual, torch.fx.Proxy) and _may_be_none(residual) else _norm
        options = self.offset, self.casting_mode, self.memory
        return norm(x, residual, self.normalized_shape, weight, self.eps, *options)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """What ``torch.jit.script`` compiles in its place: torch's layer with the same weight, if it means the same."""
        if type(self) is not RMSNorm or self.offset or self.casting_mode != "torch":
            raise _not_scriptable(self)
        twin = torch.nn.RMSNorm.__new__(torch.nn.RMSNorm)
        vars(twin).update(vars(self))
        return twin

    def extra_repr(self) -> str:
        """torch's text, and the options that differ from torch's."""
        text = super().extra_repr()
        if self.offset:
            text += f", offset={self.offset}"
        if self.casting_mode != "torch":
            text += f", casting_mode={self.casting_mode!r}"
        if self.memory is not None:
            text += f", memory={self.memory!r}"
        return text


def _norm(
    x: Tensor,
    residual: Tensor | None,
    shape: tuple[int, ...],
    weight: Tensor | None,
    eps: float | None,
    offset: float,
    casting_mode: str,
    memory: str | None,
) -> Any:
    if residual is None:
        return functional.rms_norm(x, shape, weight, eps, offset=offset, casting_mode=casting_mode, memory=memory)
    return functional.add_rms_norm(
        x, residual, shape, weight, eps, offset=offset, casting_mode=casting_mode, memory=memory
    )


def _may_be_none(proxy: torch.fx.Proxy) -> bool:
    """Whether it stands for an argument of a graph that has None as its default: the layer alone was traced."""
    return proxy.node.op == "placeholder" and proxy.node.args == (None,)


def _either(*arguments: Any) -> Any:
    """``_norm`` as a node of such a graph, which finds out when it runs."""
    if isinstance(arguments[0], torch.fx.Proxy):
        return torch.fx.Proxy.__torch_function__(_either, (), arguments)
    return _norm(*arguments)


def _not_scriptable(module: object) -> NotImplementedError:
    """For ``torch.jit.script``, which reads source that isn't TorchScript."""
    return NotImplementedError(
        f"{type(module).__name__}: torch.jit.script can't compile it, as TorchScript has no operator with its meaning; "
        "record the model with torch.jit.trace(model, example_inputs), or torch.export.export(model, example_inputs)"
    )
