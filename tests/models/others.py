"""The RMS-type classes of packages other than transformers: found by reading their sources, built small, and patched.

``others.txt`` has the packages. ``make census-others`` installs them and writes the table of docs/models.md anew;
test_others.py checks each class.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lifting import folder, lift
from oracle import gains
from torch import Tensor, nn

import rmsnorm
from rmsnorm.bench.pages import replace_block

WIDTHS = (32, 96, 128, 384)
HEADS = 2
DOCS = Path(__file__).parents[2] / "docs" / "models.md"
LABEL = "made by `make census-others`"
PINS = dict(
    line.split("==") for line in Path(__file__).with_suffix(".txt").read_text().split("\n") if "==" in line
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
    for home, packages in metadata.packages_distributions().items():
        for package in packages:
            name = re.sub(r"[_.]", "-", package.lower())
            if name in PINS and metadata.version(package) == PINS[name] and folder(home):
                homes[home] = name
    return dict(sorted((h, n) for h, n in homes.items() if h not in {"tests", "test", "models", "examples"}))


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
            if {"tests", "flax", "mlx", "benchmarks"} & set(path.parts) or "jax" in file.stem or not re.search(r"\nclass \w*Norm", text, re.I):
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
VALUES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys([*SIZE_NAMES.split(), "dim_head", "head_dim"], (W,)),
    **dict.fromkeys(["heads", "num_heads", "groups"], (HEADS,)),
    **dict.fromkeys("eps epsilon norm_eps".split(), (1e-6,)),
    **dict.fromkeys("affine elementwise_affine scale weight has_scale include_weight use_weight".split(), (True, False)),
    **dict.fromkeys("bias use_bias unit_offset add_unit_offset channel_first images use_mup".split(), (False, True)),
    **dict.fromkeys("full_precision force_fp32 force_float32_reductions".split(), (True, False)),
    "fix_scale": (False, True),
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
            layer_norm_eps=1e-5, d_model=width, layer_norm_with_affine=True, bias_for_layer_norm=False,
            include_bias=False, init_device="cpu",
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
        for seed, (name, tensor) in enumerate([*module.named_parameters(), *module.named_buffers()]):
            if tensor.is_floating_point() and tensor.dim():
                tensor.data = gains(*tensor.shape, dtype=torch.float32, seed=seed)
        module.options = ", ".join(f"{k}={v}" for k, v in chosen.items() if isinstance(v, bool))  # type: ignore[assignment]
        yield module


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
                reasons.append(own[0].reason)
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
        f"{len({one.package for one in lines()})} other packages have {len(lines())} RMS-type classes that run on a CPU; "
        f"`patch` swaps {len(whole)} at widths {', '.join(map(str, WIDTHS))}.\n",
        "| package | class | meaning, or why it is left |\n|---|---|---|",
    ]
    for one in lines():
        halves = "" if {"bfloat16", "float16"} <= set(one.types) or not one.types else " (in float32 only)"
        fate = "; ".join([*(meaning + halves for meaning in one.meanings), *one.reasons])
        text.append(f"| {one.package} {PINS[one.package]} | {one.path.partition('.')[2]} | {fate} |")
    return "\n".join(text) + "\n"


def main() -> None:
    """Writes the table into docs/models.md."""
    replace_block(DOCS, LABEL, table())


if __name__ == "__main__":
    main()
