"""Small random models of ten architectures, as ``save_pretrained`` writes them, and a tokenizer to go with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from rmsnorm.study.corpus import documentation

VOCABULARY = 300
_WIDTHS = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_HEADS = {"num_attention_heads": 4, "intermediate_size": 48}
_GROUPS = {**_HEADS, "num_key_value_heads": 2, "head_dim": 8}


def _vit() -> Any:
    config = transformers.ViTConfig(**_HEADS, hidden_size=32, num_hidden_layers=2, image_size=16, patch_size=4)
    return transformers.ViTForImageClassification(config)


def _mamba2() -> Any:
    sizes = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 16, "expand": 2}
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**_WIDTHS, **_ENDS, **sizes))


def _t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=VOCABULARY, **sizes, **ends))


def _gpt2() -> Any:
    sizes = {"n_positions": 600, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCABULARY, **_ENDS, **sizes))


def _gemma3() -> Any:
    config = transformers.Gemma3TextConfig(**_WIDTHS, **_GROUPS, **_ENDS, sliding_window=64)
    return transformers.Gemma3ForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_WIDTHS, **_HEADS, **_ENDS, num_key_value_heads=2)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_WIDTHS, **_GROUPS, **_ENDS)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**_WIDTHS, **_GROUPS, **_ENDS, sliding_window=64)
    ),
    "gemma3": _gemma3,
    "olmo2": lambda: transformers.Olmo2ForCausalLM(
        transformers.Olmo2Config(**_WIDTHS, **_HEADS, **_ENDS, num_key_value_heads=2)
    ),
    "mamba2": _mamba2,
    "t5": _t5,
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**_WIDTHS, **_HEADS)),
    "vit": _vit,
    "gpt2": _gpt2,
}


def save(name: str, place: Path) -> Path:
    """Writes a model there; returns the place."""
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(place)
    return place


def tokenizer() -> Any:
    """Bytes and a few dozen merges, learnt from Python's documentation."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "<unk>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([documentation().decode()[:50_000]], trainer)
    ends = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "<s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **ends)
