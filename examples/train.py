"""Trains a small LLaMA, written out below with rmsnorm.RMSNorm, on the bytes of a text.

    python examples/train.py                       # the text of Python's own `help()`; a minute on two cores
    python examples/train.py --text book.txt --steps 2000 --width 256 --layers 6

In the model the residual is added by the norm behind it: ``y, h = norm(update, h)`` is ``h = h + update; y = norm(h)``
in one pass over memory. It prints the loss of training and of text that is held out, in nats per byte (noise has 5.55),
and a sample.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics  # the text of help()

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rmsnorm


class Layer(nn.Module):
    """Attention, then a gated MLP; a norm before each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = rmsnorm.RMSNorm(width, eps=1e-5), rmsnorm.RMSNorm(width, eps=1e-5)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 6 * width, bias=False), nn.Linear(3 * width, width, bias=False)

    def forward(self, update: Tensor, h: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.attention_norm(update, h)
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)  # [batch, heads, time, size]
        update = F.scaled_dot_product_attention(rotate(q, turn), rotate(k, turn), v, is_causal=True)
        y, h = self.mlp_norm(self.out(update.transpose(1, 2).flatten(2)), h)
        gate, up = self.gate_up(y).chunk(2, -1)
        return self.down(F.silu(gate) * up), h


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary position embedding: the pair of numbers j and j + size/2 is turned by its position · 10000^(-2j/size)."""
    (a, b), cos, sin = x.chunk(2, -1), turn.cos(), turn.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Llama(nn.Module):
    """Bytes ``[batch, time]`` to the logits of the next, ``[batch, time, 256]``."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(256, width), nn.Linear(width, 256, bias=False)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = rmsnorm.RMSNorm(width, eps=1e-5)
        size = width // heads
        self.register_buffer("frequencies", 10000 ** (-torch.arange(0, size, 2) / size))
        for matrix in (m for m in self.parameters() if m.dim() == 2):
            nn.init.normal_(matrix, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        turn = torch.outer(torch.arange(ids.shape[1]), self.frequencies)
        update = self.embedding(ids)
        h = torch.zeros_like(update)
        for layer in self.layers:
            update, h = layer(update, h, turn)
        return self.head(self.norm(update, h)[0])


def loss_of(model: nn.Module, text: Tensor, starts: Tensor, context: int) -> Tensor:
    window = text[starts[:, None] + torch.arange(context + 1)]
    return F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, help="any file; without it, the text of Python's help()")
    for name, default in {"steps": 300, "width": 128, "layers": 4, "heads": 4, "context": 128, "batch": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{default}, if not given")
    options = parser.parse_args()
    if options.width % (2 * options.heads):
        parser.error(f"--width {options.width}: must be a multiple of twice --heads, {2 * options.heads}")
    if options.text and not options.text.is_file():
        parser.error(f"--text {options.text}: no such file")
    content = options.text.read_bytes() if options.text else "\n".join(topics.values()).encode()
    text = torch.frombuffer(bytearray(content), dtype=torch.uint8).long()
    learned, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    if len(held_out) < 2 * options.context:
        parser.error(f"the text has {len(text)} bytes; --context {options.context} wants {20 * options.context}")

    torch.manual_seed(0)
    model = Llama(options.width, options.layers, options.heads)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, {len(learned):,} bytes to learn from")
    optimizer, begin = torch.optim.AdamW(model.parameters(), weight_decay=0.1), time.perf_counter()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=options.steps + 1)
    for step in range(1, options.steps + 1):
        starts = torch.randint(len(learned) - options.context, (options.batch,))
        loss = loss_of(model, learned, starts, options.context)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        if step == 1 or step % max(1, options.steps // 10) == 0:
            each = (time.perf_counter() - begin) / step
            print(f"step {step:5}  loss {loss.item():.3f}  {1e3 * each:.0f} ms a step", flush=True)
    with torch.inference_mode():
        starts = torch.arange(0, len(held_out) - options.context, options.context)[:64]
        print(f"held out    {loss_of(model, held_out, starts, options.context):.3f}")
        ids = torch.tensor([list(b"The ")])
        for _ in range(60):
            next_byte = torch.multinomial(model(ids[:, -options.context :])[:, -1].div(0.7).softmax(-1), 1)
            ids = torch.cat((ids, next_byte), 1)
    print("sample      " + repr(bytes(ids[0].tolist()).decode(errors="replace")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
