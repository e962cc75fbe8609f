"""Finds the RMS-type classes of the packages of others.txt in their sources, and builds each in its configurations."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from importlib import metadata
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lifting import HOME, folder, lift
from oracle import gains
from torch import nn

HEADS = 2
PINS = dict(
    line.split("==") for line in Path(__file__).with_name("others.txt").read_text().splitlines() if "==" in line
)
NAMED = re.compile(r"RMS|Rms[A-Z]|ScaleNorm|PixelNorm")

# By name or formula, and no RMS norms of one input; other things that normalise and are called so aren't listed.
LOOK_ALIKES = {
    "AdaRMSNorm": "its gain is computed from a second input",
    "AdaptiveRMSNorm": "its gain is computed from a second input",
    "LuminaRMSNormZero": "its gain is computed from a second input",
    "MochiRMSNormZero": "its gain is computed from a second input",
    "MochiModulatedRMSNorm": "its gain is a second input",
    "RMSScaleShiftNorm": "its gain is computed from a second input",
    "RmsNormAct": "an activation follows it",
    "RmsNormActFp32": "an activation follows it",
    "RmsNormAct2d": "an activation follows it",
    "RmsNormAct2dFp32": "an activation follows it",
    "ChanFirstRMSNorm": "it normalises the last dimension and multiplies the first",
    "RMSNormPreBridge": "a wrapper around the norm of another model",
    "RMSNormalizationBridge": "a wrapper around the norm of another model",
    "GatedRMSNormBridge": "a wrapper around the norm of another model",
    "QRMSNorm": "a wrapper around the norm of another model",
    "xlstm.xlstm_large.components.MultiHeadRMSNorm": "it also joins the heads: its output has another shape",
    "diffsynth.models.flux3_dit.RMSNorm": "it only holds a weight",
}
# Norms that don't run here.
ELSEWHERE = {
    "CuTeRMSNorm": "on GPUs only",
    "FusedRMSNorm": "on GPUs only",
    "TritonRMSNorm": "on GPUs only",
    "ExtendedRMSNorm": "on GPUs only",
    "_AITERRMSNorm": "on GPUs only",
    "zeta.nn.attention.multiquery_attention.LPRMSNorm": "it asks a tensor for an attribute that tensors don't have",
}


def installed() -> dict[str, str]:
    """The folders of those of the packages that are here, and their names."""
    homes: dict[str, str] = {}
    for package in metadata.distributions(path=[str(HOME)]):
        name = re.sub(r"[_.]", "-", package.name.lower())
        if PINS.get(name) == package.version:
            homes |= dict.fromkeys({file.parts[0] for file in package.files or () if file.suffix == ".py"}, name)
    return dict(
        sorted((h, n) for h, n in homes.items() if folder(h) and h not in {"tests", "test", "models", "examples"})
    )


@functools.cache
def classes() -> tuple[str, ...]:
    """The dotted paths of modules that are called RMSNorm or the like."""
    found = []
    for home in installed():
        top = folder(home)
        assert top is not None
        for file in sorted(top.rglob("*.py")):
            path = file.relative_to(top.parent)
            text = file.read_text(errors="replace")
            if (
                {"tests", "flax", "mlx", "benchmarks"} & set(path.parts)
                or "jax" in file.stem
                or not re.search(r"\nclass \w*Norm", text, re.I)
            ):
                continue
            module = ".".join(path.with_suffix("").parts)
            found += [f"{module}.{node.name}" for node in ast.parse(text).body if _may_be_one(node, text)]
    return tuple(found)


def _may_be_one(node: ast.stmt, text: str) -> bool:
    if not isinstance(node, ast.ClassDef) or not NAMED.search(node.name) or "norm" not in node.name.lower():
        return False
    bases = " ".join(map(ast.unparse, node.bases))
    return ("Module" in bases or "Norm" in bases) and "Handler" not in bases


def excluded(path: str) -> str:
    """Why a class isn't counted."""
    name = path.rpartition(".")[2]
    return LOOK_ALIKES.get(path) or LOOK_ALIKES.get(name) or ELSEWHERE.get(path) or ELSEWHERE.get(name, "")


# What the constructors of all classes take: the values that each parameter is tried with, W standing for the width.
W = object()
SIZE_NAMES = "dim hidden_size size d_model num_features features channels chan num_channels normalized_shape shape"
ON_NAMES = """affine elementwise_affine scale weight has_scale include_weight use_weight
    full_precision force_fp32 force_float32_reductions"""
OFF_NAMES = "bias use_bias unit_offset add_unit_offset channel_first images use_mup fix_scale"
VALUES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys([*SIZE_NAMES.split(), "dim_head", "head_dim"], (W,)),
    **dict.fromkeys(["heads", "num_heads", "groups"], (HEADS,)),
    **dict.fromkeys(["eps", "epsilon", "norm_eps"], (1e-6,)),
    **dict.fromkeys(ON_NAMES.split(), (True, False)),
    **dict.fromkeys(OFF_NAMES.split(), (False, True)),
}
# What doesn't follow from a parameter's name.
SPECIAL: dict[str, list[dict[str, Any]]] = {
    "litgpt.model.RMSNorm": [{"size": W}, {"size": W, "add_unit_offset": True}],
    "make_a_video_pytorch.make_a_video.RMSNorm": [{"chan": W}],
    "zeta.nn.modules.space_time_unet.RMSNorm": [{"chan": W}],
    **{f"denoising_diffusion_pytorch.karras_unet{which}.PixelNorm": [{"dim": 1}] for which in ("", "_1d", "_3d")},
    "diffsynth.models.ltx2_common.PixelNorm": [{}],
    "diffusers.models.autoencoders.autoencoder_kl_ltx2_audio.LTX2AudioPixelNorm": [{}],
    "olmo_core.nn.attention.recurrent.NemotronRMSNormGated": [{"hidden_size": W, "group_size": W}],
    "ltx_video.models.autoencoders.pixel_norm.PixelNorm": [{}],
    "lumiere_pytorch.mp_lumiere.PixelNorm": [{"dim": 1}],
    "meshgpt_pytorch.meshgpt_pytorch.PixelNorm": [{"dim": 1}],
    "olmo.model.RMSLayerNorm": [{"config": "olmo", "size": W}],
    "stripedhyena.layers.RMSNorm": [{"config": "stripedhyena"}],
    "torchtitan.models.common.nn_modules.RMSNorm": [{"config": {"normalized_shape": W}}],
    "torchtitan.models.muse_glimmer.model.RMSGainCenterNorm": [{"config": {"normalized_shape": W, "gain_center": 1.0}}],
    "torchtitan.models.qwen3_5.model.OffsetRMSNorm": [{"config": {"dim": W}}],
    "torchtitan.models.qwen3_5.model.RMSNormGated": [{"config": {"dim": W}}],
}


class Options(SimpleNamespace):
    """A configuration that is asked for attributes, and for what it may not have."""

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


def _config(cls: type, which: Any, width: int) -> Any:
    if which == "olmo":
        return Options(
            layer_norm_eps=1e-5,
            d_model=width,
            layer_norm_with_affine=True,
            bias_for_layer_norm=False,
            include_bias=False,
            init_device="cpu",
        )
    if which == "stripedhyena":
        return Options(eps=1e-6, hidden_size=width, params_dtype=torch.float32)
    return cls.Config(**{name: width if value is W else value for name, value in which.items()})  # type: ignore[attr-defined]


def instances(path: str, width: int) -> Iterator[nn.Module]:
    """The class in each of its configurations, with random weights."""
    cls = lift(path)
    names = [name for name in inspect.signature(cls).parameters if name in VALUES]
    options = [dict(zip(names, values, strict=True)) for values in product(*(VALUES[name] for name in names))]
    for chosen in SPECIAL.get(path, options):
        given = {name: width if value is W else value for name, value in chosen.items()}
        if "config" in given:
            given["config"] = _config(cls, given["config"], width)
        module: nn.Module = cls(**given)
        for seed, tensor in enumerate([*module.parameters(), *module.buffers()]):
            if tensor.is_floating_point() and tensor.dim():
                tensor.data = gains(*tensor.shape, dtype=torch.float32, seed=seed)
        module.options = ", ".join(f"{k}={v}" for k, v in chosen.items() if isinstance(v, bool))  # type: ignore[assignment]
        yield module
