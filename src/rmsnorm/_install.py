"""The only file that changes torch: on request it puts our CPU kernels behind torch's own ``F.rms_norm``.

``F.rms_norm`` and ``torch.nn.RMSNorm`` call ``aten::_fused_rms_norm``, for which torch has no CPU kernel: there it
runs seven or eight operators one after the other. ``install()`` registers ours in that empty slot. What torch builds
around the operator stays torch's: autograd, double backward, forward mode, vmap, compile. ``csrc/aten.cpp`` has the
kernels; what they don't take is handed to the operators below, which hold torch's own formula.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import _native, _vmap

_SCHEMAS = {
    "_fused_rms_norm": "aten::_fused_rms_norm(Tensor input, int[] normalized_shape, Tensor? weight, float? eps)"
    " -> (Tensor, Tensor)",
    "_fused_rms_norm_backward": "aten::_fused_rms_norm_backward(Tensor grad_out, Tensor input, "
    "int[] normalized_shape, Tensor rstd, Tensor? weight, bool[2] output_mask) -> (Tensor, Tensor)",
}

_lock = threading.RLock()
_installed = False
_rule: torch.library.Library | None = None  # made by the first install(); it stays, as the backward kernel does


def install() -> None:
    """Runs every ``F.rms_norm`` and ``torch.nn.RMSNorm`` of this process on our CPU kernels, whoever wrote the model.

    float32, bfloat16, float16 and float64, with a weight of the same dtype or none; everything else keeps torch's own
    formula. Results meet the numerics contract (docs/numerics.md) instead of torch's fp32 rounding, so they may
    differ in the last bit from before. Graphs that ``torch.compile`` has made already keep what they have.

    Installing twice is installing once. ``uninstall()`` undoes it, ``with installed():`` does both;
    ``RMSNORM_INSTALL=1`` and ``python -m rmsnorm run script.py`` do it for programs that don't know of us.

    Raises:
        RuntimeError: the native library is missing, torch's operator is not the one we know, or somebody else has
            filled the slot. Nothing is changed then.

    Examples:
        >>> install()
        >>> torch.nn.RMSNorm(4, eps=0.0)(torch.tensor([0.1, 0.1, 0.2, 0.3])).detach()  # on our kernel
        tensor([0.5164, 0.5164, 1.0328, 1.5492])
        >>> uninstall()
    """
    global _installed, _rule
    with _lock:
        if _installed:
            return
        if reason := refusal():
            raise RuntimeError(f"rmsnorm.install: torch's operator stays as it is: {reason}")
        if error := _native.fill_slot(True):
            raise RuntimeError(f"rmsnorm.install: torch refused the kernels: {error}")
        _decompose_for_export(True)
        if _rule is None:
            # torch has no batching rule for the backward operator; without one, jacrev loops over the batch and warns.
            _rule = torch.library.Library("aten", "IMPL")
            torch.library.register_vmap("aten::_fused_rms_norm_backward", _vmap.fused_backward, lib=_rule)
        _installed = True
        _forget()


def uninstall() -> None:
    """Empties the slot again: torch's own formula runs. Without an ``install()`` before it, does nothing.

    What was recorded for autograd before can still run backward. No other thread may be inside a norm meanwhile:
    torch frees the kernel that it leaves.

    Examples:
        >>> uninstall()
        >>> info().installed
        False
    """
    global _installed
    with _lock:
        if _installed:
            _native.fill_slot(False)
            _decompose_for_export(False)
            _installed = False
            _forget()


@contextmanager
def installed() -> Iterator[None]:
    """``install()`` for the length of a ``with`` block; leaves things as it found them. For the whole process, not
    for one thread.

    Raises:
        RuntimeError: as :func:`rmsnorm.install`.

    Examples:
        >>> with installed():
        ...     info().installed
        True
    """
    before = is_installed()
    install()
    try:
        yield
    finally:
        if not before:
            uninstall()


def is_installed() -> bool:
    """Whether torch's operator runs on our kernels now."""
    return _installed


def refusal() -> str | None:
    """Why ``install()`` would refuse, or None."""
    if _native.why_not() is not None:
        return f"there are no native kernels: {_native.why_not()}"
    for name, known in _SCHEMAS.items():
        operator = getattr(getattr(torch.ops.aten, name, None), "default", None)
        if operator is None or str(operator._schema) != known:
            return f"torch {torch.__version__} has {operator and operator._schema}, and these kernels are for {known}"
        ours = _rule is not None and name.endswith("backward")
        if not ours and torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CPU"):
            return f"torch {torch.__version__} or another library has a CPU kernel for aten::{name} already"
    return None


def autoload() -> None:
    """``install()`` for ``RMSNORM_INSTALL=1``, where a refusal is a warning: the program runs without it too."""
    try:
        install()
    except RuntimeError as refused:
        warnings.warn(f"RMSNORM_INSTALL=1 asks for it, but {refused}", RuntimeWarning, stacklevel=2)


def _decompose_for_export(on: bool) -> None:
    """An operator with a kernel for the device stays whole in a graph. That is right for ``torch.compile``, which runs
    it here; exported programs, which torch's table of decompositions takes apart, have to do without it, as ever."""
    from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

    operator = torch.ops.aten._fused_rms_norm.default
    composite = torch._C.DispatchKey.CompositeImplicitAutograd

    def traced(mode: Any, *args: Any, **kwargs: Any) -> Any:
        # While it decomposes, torch.export puts the table's entries here; NotImplemented says that one is to be kept.
        if decompose := operator.py_kernels.get(composite):
            with mode:
                output = decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        return mode.__torch_dispatch__(operator, (), args, kwargs)

    if on:
        operator.py_impl(ProxyTorchDispatchMode)(traced)
    else:
        operator.python_key_table.pop(ProxyTorchDispatchMode, None)


def _forget() -> None:
    """Drops what torch's Python dispatcher, which traces graphs, remembers of the operators."""
    for name in _SCHEMAS:
        getattr(torch.ops.aten, name).default._dispatch_cache.clear()


# torch's own formulas: the composite kernel that the slot hides, and torch's decomposition of the backward operator.
_library = torch.library.Library("rmsnorm", "FRAGMENT")
_library.define(
    "torch_fused_rms_norm(Tensor input, int[] normalized_shape, Tensor? weight, float? eps) -> (Tensor, Tensor)"
)
_library.define(
    "torch_fused_rms_norm_backward(Tensor grad, Tensor input, int[] normalized_shape, Tensor rstd, Tensor? weight, "
    "bool need_input, bool need_weight) -> (Tensor, Tensor)"
)


def _torch_fused_rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    with _native.telling():
        return torch.ops.aten._fused_rms_norm.default.decompose(input, normalized_shape, weight, eps)


def _torch_fused_rms_norm_backward(
    grad: Tensor,
    input: Tensor,
    normalized_shape: list[int],
    rstd: Tensor,
    weight: Tensor | None,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    from torch._decomp import decomposition_table

    formula = decomposition_table[torch.ops.aten._fused_rms_norm_backward.default]
    with _native.telling():
        return formula(grad, input, normalized_shape, rstd, weight, [need_input, need_weight])


_library.impl("torch_fused_rms_norm", _torch_fused_rms_norm, "CompositeExplicitAutograd")
_library.impl("torch_fused_rms_norm_backward", _torch_fused_rms_norm_backward, "CompositeExplicitAutograd")
