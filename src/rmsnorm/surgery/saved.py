"""The only file that writes a changed model into a directory, and loads one that stock transformers can't.

A folded or rotated model of RMSNorms is one of its class: ``from_pretrained`` loads it. LayerNorms that became
RMSNorms, new biases and centred arguments are in no configuration. Such weights are written under the name of a
variant, so that ``from_pretrained`` finds none instead of loading them wrongly; ``rmsnorm.json`` has what it lacks.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..module import RMSNorm
from . import edits
from .norms import Norm
from .streams import CentredArgument, Swap

MANIFEST = "rmsnorm.json"
VARIANT = "rmsnorm"
SHARD = 2 * 10**9
"""Bytes of a file of weights, at most: those of one are in memory a second time while it is written."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ckpt", ".index.json")


def lacking(model: Any, known: Collection[str]) -> dict[str, Any]:
    """What the model's class wouldn't make of its configuration: plain data, empty if it makes all.

    Args:
        model: after surgery.
        known: the names of the weights that it had before.
    """
    modules = dict(model.named_modules())
    hooks = ((name, hook) for name, one in modules.items() for hook in one._forward_pre_hooks.values())
    biases = [name.removesuffix(".bias") for name, _ in model.named_parameters() if name not in known]
    found = {
        "norms": {name: one.eps for name, one in modules.items() if type(one) is RMSNorm},
        "biases": [name for name in biases if not isinstance(modules.get(name), RMSNorm) and name in modules],
        "centred": [[name, hook.key] for name, hook in hooks if isinstance(hook, CentredArgument)],
    }
    return {"class": type(model).__name__, **found} if any(found.values()) else {}


def write(model: Any, folder: Path, manifest: dict[str, Any], source: Path | None, tokenizer: Any, text: str) -> None:
    """Writes weights, configuration, tokenizer and ``README.md`` into an empty directory.

    Args:
        model: of transformers.
        folder: exists, and is empty.
        manifest: plain data for ``rmsnorm.json``; under ``"lacking"`` what :func:`lacking` found.
        source: a directory whose other files are copied: tokenizer, licence, pre-processing.
        tokenizer: is written where there is no such directory.
        text: is added to the README.
    """
    told = bool(manifest["lacking"])
    if source is None:  # a GGUF file: its weights aren't quantised any more, and are saved as what they are
        model.hf_quantizer = None
        vars(model.config).pop("quantization_config", None)
    model.save_pretrained(
        folder, max_shard_size=SHARD, variant=VARIANT if told else None, save_original_format=not told
    )
    for entry in sorted(source.iterdir()) if source else ():
        wanted = entry.is_file() and not entry.name.startswith(".") and not entry.name.endswith(_WEIGHTS)
        if wanted and not (folder / entry.name).exists():
            shutil.copyfile(entry, folder / entry.name)
    if source is None and tokenizer is not None:
        tokenizer.save_pretrained(folder)
    readme = folder / "README.md"
    before = readme.read_text(errors="replace").rstrip() + "\n\n" if readme.exists() else ""
    readme.write_text(before + text)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for entry in folder.iterdir():
        handle = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def put(folder: Path, out: Path) -> None:
    """Gives a directory its name; one of that name is replaced, and comes back if that fails."""
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    there = out.exists()
    if there:
        out.rename(old)
    try:
        folder.rename(out)
    except BaseException:
        if there:
            with suppress(OSError):
                old.rename(out)
        raise
    if there:
        shutil.rmtree(old)


def load(directory: str | Path, dtype: torch.dtype | None = None) -> Any:
    """A model that ``rmsnorm convert`` wrote, whether stock transformers can load it or not.

    Args:
        directory: what ``--out`` named.
        dtype: of the weights; None: as they were saved.

    Returns:
        The model, of its class in transformers, in evaluation mode.

    Raises:
        ValueError: the directory was written by something else, or its class is none of transformers.
        OSError: there is no such directory, or it can't be read.

    Examples:
        LayerNorms that became RMSNorms are in no configuration of GPT-2, so stock transformers can't load them:

        >>> import subprocess, sys, tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> place = tempfile.mkdtemp()
        >>> config = GPT2Config(vocab_size=256, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
        >>> GPT2LMHeadModel(config).save_pretrained(f"{place}/in")
        >>> command = [sys.executable, "-m", "rmsnorm", "convert", f"{place}/in", "--to-rms", "--out", f"{place}/out"]
        >>> subprocess.run(command, capture_output=True).returncode
        0
        >>> model = rmsnorm.surgery.load(f"{place}/out")
        >>> type(model).__name__, type(model.transformer.ln_f).__name__
        ('GPT2LMHeadModel', 'RMSNorm')
    """
    place = Path(directory) / MANIFEST
    try:
        told = json.loads(place.read_text())
        lacking, name = told["lacking"], told["class"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place} is not what `rmsnorm convert` writes: {error}") from error
    transformers: Any = importlib.import_module("transformers")
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"{place}: {name} is no model of transformers {transformers.__version__}")
    options = {"dtype": dtype or "auto"}
    if not lacking:
        return cls.from_pretrained(directory, **options).eval()  # type: ignore[attr-defined]
    shell = _shell(cls, lacking)
    model, found = shell.from_pretrained(directory, variant=VARIANT, output_loading_info=True, **options)
    if wrong := sorted([*found["missing_keys"], *found["unexpected_keys"]]):
        raise ValueError(f"{directory}: its weights aren't those that {MANIFEST} describes, the first is {wrong[0]}")
    model.__class__ = cls
    return model.eval()


def _shell(cls: Any, lacking: dict[str, Any]) -> Any:
    """A class whose instances have, before weights are loaded, what the configuration doesn't say."""

    def __init__(self: Any, *args: Any, **options: Any) -> None:
        cls.__init__(self, *args, **options)
        plan = edits.Plan(biases=lacking["biases"])
        for name, eps in lacking["norms"].items():
            weight = "weight" if getattr(self.get_submodule(name), "weight", None) is not None else None
            plan.swaps[name] = Swap(Norm(name, "", weight, None, eps))
        plan.hooks = [(name, CentredArgument(key)) for name, key in lacking["centred"]]
        edits.carry_out(self, plan, keep=False)

    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})
