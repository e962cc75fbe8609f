"""The only file that knows libraries which bring torch operators of their own: zentorch, and vLLM's CPU kernels.

Both take torch's tensors and run on its threads, for inference alone. zentorch wants two contiguous dimensions and
doesn't refuse others; a case has nothing else. Their add + norm is in place: the sum goes into the residual, the norm
into the input, so that the sum grows from call to call, as in a model.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .peers import EPS

if TYPE_CHECKING:
    from .contenders import Problem

Call = Callable[[], Any]
Bind = Callable[["Problem"], Call]


def _in_place(p: Problem, add: Callable[[Tensor, Tensor], None]) -> Call:
    """A call of `add` on copies of input and residual, which it overwrites."""
    x, residual = p.x.clone(), p.residual.clone()

    def call() -> tuple[Tensor, Tensor]:
        add(x, residual)
        return x, residual

    return call


def _zentorch(p: Problem) -> Any:
    """Its operators, where it has a kernel for the type."""
    importlib.import_module("zentorch")  # it registers them

    if p.dtype is torch.float16 and not torch.cpu.get_capabilities().get("avx512_fp16"):
        # It would log an error, and return memory that nobody has written.
        raise NotImplementedError("float16 needs a CPU with AVX512-FP16")
    return torch.ops.zentorch


def _zentorch_norm(p: Problem) -> Call:
    return partial(_zentorch(p).zentorch_rms_norm.default, p.x, p.weight, EPS)


def _zentorch_add(p: Problem) -> Call:
    add = _zentorch(p).zentorch_add_rms_norm_.default
    return _in_place(p, lambda x, residual: add(x, p.weight, residual, EPS))


ZENTORCH: Mapping[str, Bind] = {"forward": _zentorch_norm, "add": _zentorch_add}


def vllm_library() -> Path:
    """The kernels for this CPU, as vLLM itself chooses them; its Python, which needs much more, is not imported.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
    """
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'vllm'")
    has = torch.cpu.get_capabilities()
    avx512 = all(has.get(f"avx512_{part}") for part in ("f", "bw", "dq", "vl"))
    name = "_C" if has.get("avx512_bf16") or not has.get("avx2") else "_C_AVX512" if avx512 else "_C_AVX2"
    return Path(found.submodule_search_locations[0]) / f"{name}.abi3.so"


def _vllm() -> Any:
    if not hasattr(torch.ops._C, "rms_norm"):
        torch.ops.load_library(vllm_library())
    return torch.ops._C


def _vllm_norm(p: Problem) -> Call:
    norm = _vllm().rms_norm.default

    def call() -> Tensor:
        out = torch.empty_like(p.x)
        norm(out, p.x, p.weight, EPS)
        return out

    return call


def _vllm_warm(p: Problem) -> Call:
    norm = _vllm().rms_norm.default

    def call() -> Tensor:
        norm(p.out, p.x, p.weight, EPS)
        return p.out

    return call


def _vllm_add(p: Problem) -> Call:
    add = _vllm().fused_add_rms_norm.default
    return _in_place(p, lambda x, residual: add(x, residual, p.weight, EPS))


VLLM: Mapping[str, Bind] = {"forward": _vllm_norm, "warm": _vllm_warm, "add": _vllm_add}
