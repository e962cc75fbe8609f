"""The only file that finds what a model is traced and measured on, where the caller gives nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..models.comparison import writes
from ..models.inputs import Uncallable, inputs_of, positions, tokens_of, vocabulary
from ..study.corpus import documentation
from .proof import Trial

TRACED, SCORED, PROMPT = 48, 256, 24
"""Tokens of each kind."""


def trial_of(model: Any, inputs: Any, tokenizer: Any, tokens: int, name: str) -> Trial:
    """What to call it with, and for a language model a text and a prompt.

    Raises:
        ValueError: no inputs were given, and none can be made.
    """
    known = _of_transformers(model)
    ids = _text(model, tokenizer, SCORED + 1) if known else torch.empty(0, dtype=torch.long)
    if inputs is None:
        inputs = [_made(model, ids[:TRACED], name)]
    given = list(inputs) if isinstance(inputs, list) else [inputs]
    given = [(one,) if isinstance(one, Tensor) else dict(one) if isinstance(one, Mapping) else one for one in given]
    if not (known and writes(model)):
        return Trial(given)
    return Trial(given, ids, ids[:PROMPT], max(0, min(tokens, positions(model) - PROMPT)))


def _of_transformers(model: Any) -> bool:
    """Whether it says of itself what models of transformers do: others have a ``config``, too."""
    return hasattr(getattr(model, "config", None), "get_text_config") and hasattr(model, "main_input_name")


def _made(model: nn.Module, ids: Tensor, name: str) -> dict[str, Tensor]:
    if not _of_transformers(model):
        raise ValueError(
            f"{name}: this model is none of transformers, so what it is called with isn't known; give inputs=, a "
            "tensor, a tuple of arguments or a dict of keyword arguments"
        )
    try:
        return inputs_of(model, ids)
    except Uncallable as reason:
        raise ValueError(f"{name}: the model can't be called with made-up inputs ({reason}); give inputs=") from reason


def _text(model: Any, tokenizer: Any, count: int) -> Tensor:
    known = vocabulary(model)
    count = min(count, positions(model) - 1)
    return tokens_of(tokenizer, documentation().decode()[: 12 * count], known)[:count]
