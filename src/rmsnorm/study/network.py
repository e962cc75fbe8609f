"""The only file that knows the model and the step: transformers' own LLaMA, the optimiser, the rate at each step."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .arms import ARMS, replace_norms
from .plan import Setting

BYTES = 256
BETAS, DECAY = (0.9, 0.95), 0.1
WARM_UP, LAST = 0.1, 0.1
"""The rate rises for a tenth of the steps, then falls along a cosine to a tenth. Gradients are not clipped: clipping
would hide the instability that is the question."""


def build(setting: Setting, arm: str, seed: int) -> Any:
    """A fresh model. The norms draw nothing, so the arms of one seed start from the same weights."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded, and nobody is asked
    llama: Any = importlib.import_module("transformers.models.llama")
    config = llama.LlamaConfig(
        vocab_size=BYTES,
        hidden_size=setting.width,
        intermediate_size=setting.width * 8 // 3 // 8 * 8,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.heads,
        max_position_embeddings=setting.context,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = llama.LlamaForCausalLM(config)
    replaced = replace_norms(model, ARMS[arm].make)
    assert replaced == 2 * setting.layers + 1, f"{replaced} norms in {setting.layers} layers"
    return model.train()


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    """AdamW; gains and biases don't decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=BETAS)


def rate_at(step: int, steps: int, peak: float) -> float:
    """The learning rate of a step."""
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return peak * (LAST + (1 - LAST) * (1 + math.cos(math.pi * done)) / 2)


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean nats per byte of ``[batch, context + 1]``, each byte predicted from those before it."""
    logits = model(input_ids=windows[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread: sums then have one order, so results depend neither on the cores nor on who else uses them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
