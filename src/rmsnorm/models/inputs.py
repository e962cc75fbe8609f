"""The only file that knows what a model of transformers can be called with: tensors made from its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

DECODED = 16
"""Tokens that the decoder of an encoder-decoder gets."""
SOUND = 16_000
"""Samples of a sound: a second of what speech models hear."""
MAIN = ("input_ids", "pixel_values", "pixel_values_videos", "input_features", "input_values")
"""What forwards call their input. Those that end on ``_values`` or ``_features`` are made of noise."""


class Uncallable(Exception):
    """Why a model can't be called, in one line."""


def inputs_of(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """The first of several guesses that the model's forward takes; the model is run once for each guess.

    Args:
        model: from transformers, on the CPU.
        ids: tokens ``[n]`` for those that read text.

    Raises:
        Uncallable: none of them is taken; carries what the model said to the first.
    """
    said = ""
    for guess in _guesses(model, ids):
        try:
            with torch.inference_mode():
                model(**guess)
        except Exception as error:  # whatever a stranger's forward says to what it can't use
            said = said or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            return guess
    raise Uncallable(said or "its forward takes nothing that is known here")


def positions(model: Any) -> int:
    """The longest text that the model has positions for."""
    most = getattr(text_config(model), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else 2**31


def text_config(model: Any) -> Any:
    """The part of the configuration that is about text."""
    return model.config.get_text_config()


def vocabulary(model: Any) -> int:
    """How many tokens the model knows; 1 where it reads none."""
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        return 1


def tokens_of(tokenizer: Any, text: str, vocabulary: int) -> Tensor:
    """The text's tokens; without a tokenizer, or with one for another model, its bytes in the vocabulary."""
    if tokenizer is not None:
        ids: Tensor = tokenizer(text, return_tensors="pt")["input_ids"][0].long()
        if not ids.numel() or ids.max() < vocabulary:
            return ids
    return torch.tensor([byte % vocabulary for byte in text.encode()], dtype=torch.long)


def _guesses(model: Any, ids: Tensor) -> Iterator[dict[str, Tensor]]:
    """The main input alone; all that the forward names; the dummies of the class."""
    takes = inspect.signature(model.forward).parameters
    main = model.main_input_name
    pairs = model.config.is_encoder_decoder and "decoder_input_ids" in takes
    more = {"decoder_input_ids": _decoded(model, ids)} if pairs else {}
    for value in _values(model, main, ids):
        yield {main: value, **more}
    several = {name: next(_values(model, name, ids), None) for name in MAIN if name in takes}
    yield {name: value for name, value in several.items() if value is not None} | more
    dummies = getattr(model, "dummy_inputs", None)
    if isinstance(dummies, Mapping):
        yield {**dummies, **more}


def _values(model: Any, name: str, ids: Tensor) -> Iterator[Tensor]:
    """What an input of this name may be."""
    if name == "input_ids":
        yield ids[None]
        return
    generator = torch.Generator().manual_seed(0)
    for shape in _SHAPES.get(name, lambda config: iter(()))(model.config):
        yield torch.randn(shape, generator=generator).to(model.dtype)


def _decoded(model: Any, ids: Tensor) -> Tensor:
    """The start token and some that follow it."""
    config = text_config(model)
    starts = (getattr(config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    start = next((token for token in starts if isinstance(token, int)), 0)
    known = getattr(config, "vocab_size", None) or 1
    follow = ids[: DECODED - 1] if model.main_input_name == "input_ids" else torch.arange(DECODED - 1) % known
    return torch.cat([torch.tensor([start]), follow])[None]


def _get(config: Any, names: tuple[str, ...], default: int) -> Any:
    """The first of these settings, of the model or of the part that sees."""
    parts = (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None))
    return next((value for part in parts for name in names if (value := getattr(part, name, None))), default)


def _pictures(config: Any) -> Iterator[tuple[int, ...]]:
    channels, size = _get(config, ("num_channels", "in_channels", "in_chans"), 3), _get(config, ("image_size",), 224)
    if isinstance(size, Mapping):
        size = (size["height"], size["width"])
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    yield 1, channels, height, width
    yield 1, _get(config, ("num_frames",), 16), channels, height, width


def _features(config: Any) -> Iterator[tuple[int, ...]]:
    bands = _get(config, ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel"), 80)
    yield 1, bands, 2 * _get(config, ("max_source_positions",), 1500)  # Whisper's, whose encoder halves it
    yield 1, 100, bands


def _sounds(config: Any) -> Iterator[tuple[int, ...]]:
    yield 1, SOUND
    yield 1, 1, SOUND
    yield 1, _get(config, ("max_length",), 1024), _get(config, ("num_mel_bins",), 128)


_SHAPES: dict[str, Callable[[Any], Iterator[tuple[int, ...]]]] = {
    "pixel_values": _pictures,
    "pixel_values_videos": _pictures,
    "input_features": _features,
    "input_values": _sounds,
}
